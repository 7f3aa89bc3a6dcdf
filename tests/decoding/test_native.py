"""The native step against the interpreter: families, instruction sets, weights; what it does not read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from rarefy.contracts import Recipe, Rule
from rarefy.core.errors import OptionError, UnsupportedError
from rarefy.decoding import interpreter
from rarefy.decoding.build import build
from rarefy.decoding.cache import FLOAT8, KeyValues
from rarefy.decoding.native import NativeExecutor
from rarefy.decoding.program import Program
from rarefy.decoding.runner import Runner
from rarefy.kernels.cpu import library
from tests.decoding.models import DECODERS, build_model, compress, prompt

pytestmark = pytest.mark.skipif(not library.available(), reason="the native library was not built")
SIZES = [9, 5, *[1] * 10]


def wide(family: str, **changes: Any) -> Any:
    """A model whose heads are 16 channels wide, as the native step needs."""
    width = {"hidden_size": 64} if family == "qwen2" else {"head_dim": 16}
    return build_model(family, **{**width, **changes})


def empty_cache(program: Program, dtype: torch.dtype = torch.float32) -> KeyValues:
    return KeyValues(program.layers, program.kv_heads, program.head_dim, dtype, program.positions)


def both(model: Any, mode: Any = "exact", dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Logits of the native step and of the interpreter over a prefill, a chunk and single tokens."""
    program, tokens = build(model), prompt(24)
    native = NativeExecutor(program, mode)
    caches = empty_cache(program, dtype), empty_cache(program)
    ours, wanted = [], []
    for part in tokens.split(SIZES):
        ours.append(native(part, caches[0], every=True))
        wanted.append(interpreter.run(program, part, caches[1], every=True))
    return torch.cat(ours), torch.cat(wanted)


def distance(ours: Tensor, wanted: Tensor) -> float:
    return float((ours - wanted).abs().max() / wanted.abs().max())


@pytest.fixture(params=library.supported())
def instructions(request: Any) -> Iterator[str]:
    with library.using(request.param):
        yield request.param


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("family", DECODERS)
def test_dense_and_compressed_models(family: str, instructions: str) -> None:
    assert distance(*both(wide(family))) < 1e-5
    model = compress(wide(family))
    assert distance(*both(model)) < 1e-5
    assert distance(*both(model, "fast")) < 0.12  # of 8-bit activations in a model of random weights


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_two_threads_change_no_bit(family: str, two_threads: None) -> None:
    model = compress(wide(family))
    many, _ = both(model)
    torch.set_num_threads(1)
    assert torch.equal(many, both(model)[0])


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"hidden_act": "gelu"}),
        ("llama", {"hidden_act": "relu"}),
        ("llama", {"num_key_value_heads": 4, "head_dim": 80}),
        ("llama", {"num_key_value_heads": 1, "head_dim": 32}),
        ("llama", {"hidden_size": 52, "intermediate_size": 77, "vocab_size": 101}),
        ("mistral", {"sliding_window": 1}),
        ("gemma", {"hidden_act": "gelu_pytorch_tanh"}),
        ("gemma2", {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5}),
    ],
)
def test_variants(family: str, changes: dict[str, Any], instructions: str) -> None:
    assert distance(*both(wide(family, **changes))) < 1e-5


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("rtn", {"num_bits": 3, "group_size": 16, "symmetric": True}),
        ("rtn", {"num_bits": 4, "group_size": 48, "scales": "bilevel"}),
        ("rtn", {"num_bits": 8, "group_size": 16, "zero_point": "float"}),
        ("rtn", {"format": "nf4", "group_size": 16}),
        ("squeeze_llm", {"num_bits": 4}),
    ],
)
def test_what_recipes_store(method: str, options: dict[str, Any]) -> None:
    import rarefy

    model = wide("llama")
    given = {"data": prompt(64).reshape(2, 32)} if method != "rtn" else {}
    rarefy.compress(model, Recipe(name=method, rules=(Rule(method=method, options=options),)), **given)
    assert distance(*both(model)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_weights(dtype: torch.dtype, instructions: str) -> None:
    model = wide("gemma3").to(dtype)
    ours, _ = both(model)
    assert distance(ours, both(model.float())[1]) < 2e-3  # the model's embedding scale and gains stay rounded
    assert Runner(model.to(dtype)).cache.keys.dtype == torch.float16


def test_a_half_precision_cache(instructions: str) -> None:
    model = wide("qwen3")
    ours, wanted = both(model, dtype=torch.float16)
    assert 0 < distance(ours, wanted) < 5e-3


def test_the_runner_takes_it_and_forgets_as_ever() -> None:
    model, tokens = wide("mistral"), prompt(20)
    runner = Runner(model)
    assert runner.name == f"native {library.instructions()} exact"
    runner.start(tokens)
    other = torch.cat([tokens[:11], prompt(6, seed=1)])
    program = build(model)
    wanted = interpreter.run(program, other, empty_cache(program))
    assert torch.allclose(runner.start(other), wanted, atol=1e-4)
    with pytest.raises(OptionError, match="65 tokens do not fit"):
        runner.extend(prompt(48))


def test_greedy_text_is_that_of_the_model() -> None:
    import rarefy

    for family in DECODERS:
        model = compress(wide(family))
        given = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0, "eos_token_id": 95}
        ids = prompt(9)[None]
        assert torch.equal(rarefy.runner(model).generate(ids, **given), model.generate(ids, **given))


def test_what_it_does_not_read_goes_to_torch_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = build_model("llama")  # heads of 12 channels
    with pytest.raises(UnsupportedError, match="head of 12 channels is not a multiple of 16"):
        NativeExecutor(build(narrow))
    said: list[str] = []
    monkeypatch.setattr("rarefy.decoding.runner.log.warning", lambda text, *values: said.append(text % values))
    assert Runner(narrow).name == "torch"
    assert len(said) == 1 and said[0].startswith("Torch decodes, exactly: The native step cannot run this model")


def test_sizes_are_checked_before_anything_runs() -> None:
    program = build(wide("llama"))
    native, tokens = NativeExecutor(program), prompt(4)
    with pytest.raises(OptionError, match=r"float32 or float16, not a cache of torch\.bfloat16"):
        native(tokens, empty_cache(program, torch.bfloat16))
    with pytest.raises(OptionError, match="Token 96 lies outside the vocabulary of 96"):
        native(torch.tensor([96]), empty_cache(program))
    cache = empty_cache(program)
    native(tokens, cache)
    assert cache.length == 4
    with pytest.raises(OptionError, match="'fats' is unknown"):
        Runner(wide("llama"), mode="fats")  # type: ignore[arg-type]


def _widths(native: NativeExecutor) -> None:
    native._native.widths[0] = 7


def _operation(**fields: Any) -> Any:
    """Write ``fields`` into the first operation of their kind."""

    def change(native: NativeExecutor) -> None:
        kind = fields.pop("kind")
        place = next(i for i in range(native._native.count) if native._native.ops[i].kind == kind)
        for name, value in fields.items():
            setattr(native._native.ops[place], name, value)

    return change


def _program(**fields: Any) -> Any:
    def change(native: NativeExecutor) -> None:
        for name, value in fields.items():
            setattr(native._native, name, value)

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_widths, "operation 0 embeds into a buffer of another width"),
        (_operation(kind=0, rows=95), "operation 0 embeds"),
        (_operation(kind=1, heads=7), "a norm of another width"),
        (_operation(kind=2, rows=4096), "projects between buffers of other widths"),
        (_operation(kind=2, x=99), "reads a buffer that is not there"),
        (_operation(kind=2, terms=99), "has no weight"),
        (_operation(kind=3, heads=5), "rotates heads of another width"),
        (_operation(kind=4, layer=2), "attends with heads of another width"),
        (_operation(kind=5, y=0), "gates buffers of different widths"),
        (_operation(kind=6, y=3), "adds buffers of different widths"),
        (_operation(kind=7, softcap=0.0), "has no cap"),
        (_operation(kind=4, **{"layer": 0, "window": -1}), "attends with heads"),
        (_program(logits=0), "no buffer of logits"),
        (_program(kv_heads=3), "not a multiple of 16"),
        (_program(head=1), "attends after the last layer"),
    ],
)
def test_a_program_that_contradicts_itself_is_refused_by_the_library(change: Any, says: str) -> None:
    native = NativeExecutor(build(compress(wide("gemma2"))))  # which has operations of every kind
    change(native)
    with pytest.raises(UnsupportedError, match=says):
        native.check()


def test_memory_that_is_too_small_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    program = build(wide("llama"))
    native = NativeExecutor(program)
    asked = native._library.bytes
    monkeypatch.setattr(native._library, "bytes", lambda *arguments: asked(*arguments) - 64)
    with pytest.raises(OptionError, match=r"The step works in \d+ bytes, not \d+"):
        native(prompt(4), empty_cache(program))


def test_a_number_that_is_none_stays_none() -> None:
    model = wide("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight[3, 5] = torch.nan
    ours, wanted = both(model)
    assert torch.equal(ours.isnan(), wanted.isnan()) and bool(ours.isnan().any())


def test_a_cache_that_the_executor_does_not_keep_is_refused() -> None:
    with pytest.raises(OptionError, match=r"does not keep keys and values of this model in torch\.float8_e4m3fn"):
        Runner(wide("llama"), cache_dtype=FLOAT8)
