"""The CUDA executor against the interpreter: captured on a GPU, launch by launch in Triton's interpreter elsewhere."""

from __future__ import annotations

import copy
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

import rarefy
from rarefy.core.errors import OptionError, UnsupportedError
from rarefy.decoding import interpreter
from rarefy.decoding.batch import Batch
from rarefy.decoding.build import build
from rarefy.decoding.cache import KeyValues, Sequences
from rarefy.decoding.products import Together
from rarefy.decoding.program import Program
from rarefy.decoding.runner import Runner
from rarefy.decoding.sampling import Sampling
from rarefy.kernels.cuda.join import join_
from rarefy.kernels.cuda.prepared import prepare
from rarefy.kernels.cuda.program import Tuning
from rarefy.layers.linear import CompressedLinear
from tests.decoding.models import DECODERS, build_model, compress, prompt
from tests.kernels.cuda import emulation

pytest.importorskip("triton")
from rarefy.decoding.graph import GraphExecutor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs are run one by one here, even those that find nothing to do."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr("rarefy.kernels.triton.step.FILL", 8)
        monkeypatch.setattr("rarefy.kernels.triton.step.LEAST", 1)


def small(family: str = "llama", **changes: Any) -> Any:
    return build_model(family, **changes).to(DEVICE)


def kept(program: Program, sequences: int | None = None, dtype: torch.dtype = torch.float32) -> Any:
    sizes = (program.layers, program.kv_heads, program.head_dim, dtype, program.positions, DEVICE)
    return KeyValues(*sizes) if sequences is None else Sequences(sequences, *sizes)


def distance(ours: Tensor, wanted: Tensor) -> float:
    return float((ours.float() - wanted.float()).abs().max() / wanted.float().abs().max())


def both(model: Any, sizes: list[int], dtype: torch.dtype = torch.float32) -> float:
    program, tokens = build(model), prompt(sum(sizes)).to(DEVICE)
    wanted = [interpreter.run(program, part, cache, every=True) for cache in [kept(program, dtype=dtype)]
              for part in tokens.split(sizes)]  # fmt: skip
    execute, cache = GraphExecutor(program), kept(program, dtype=dtype)
    ours = [execute(part, cache, every=True) for part in tokens.split(sizes)]
    return distance(torch.cat(ours), torch.cat(wanted))


@pytest.mark.parametrize("family", DECODERS)
def test_families_compute_what_the_interpreter_does(family: str) -> None:
    assert both(small(family), [9, 1, 1, 4, 1]) < 1e-5


def test_beyond_every_window_and_tile() -> None:
    longer = {"max_position_embeddings": 256, "num_hidden_layers": 1}
    assert both(small("llama", **longer), [150, 1, 1]) < 1e-5
    assert both(small("mistral", sliding_window=70, **longer), [150, 1, 20, 1]) < 1e-5
    assert both(small("mistral", sliding_window=1, **longer), [70, 1]) < 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": True, "mlp_bias": True},
        {"num_key_value_heads": 1, "head_dim": 80},
        {"hidden_act": "gelu"},
        {"hidden_act": "gelu_pytorch_tanh"},
        {"hidden_act": "relu"},
    ],
)
def test_variants(changes: dict[str, Any]) -> None:
    assert both(small("llama", num_hidden_layers=1, **changes), [5, 1]) < 1e-5


def test_compressed_layers() -> None:
    assert both(compress(small("qwen3")), [5, 1, 1]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits(dtype: torch.dtype) -> None:
    assert both(small("gemma3").to(dtype), [9, 1, 1], dtype) < (2e-2 if dtype == torch.bfloat16 else 2e-3)


def test_weights_of_one_input_lie_together_and_are_no_copies() -> None:
    model = small(attention_bias=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    program = build(model)
    for _ in range(2):  # the second time they lie there already
        executor = GraphExecutor(program)
        attention, mlp = model.model.layers[0].self_attn, model.model.layers[1].mlp
        for parts in ((attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)):
            assert len({part.weight.untyped_storage().data_ptr() for part in parts}) == 1
            held = parts[0].weight.untyped_storage().nbytes()
            assert held == sum(part.weight.numel() * part.weight.element_size() for part in parts)
    assert executor.name == "cuda graph"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def sequences(executor: GraphExecutor, parts: list[Tensor]) -> tuple[Sequences, Tensor]:
    """Caches of several prompts, and the likeliest token after each."""
    cache = kept(executor.program, len(parts))
    last = [executor.read(part, cache, number) for number, part in enumerate(parts)]
    return cache, torch.cat(last).argmax(-1)


def alone(program: Program, part: Tensor, count: int) -> list[int]:
    """What the interpreter writes after ``part``."""
    cache, written = kept(program), []
    for _ in range(count):
        part = interpreter.run(program, part, cache)[0].argmax()[None]
        written.append(int(part))
    return written


def test_several_sequences_are_what_each_is_alone() -> None:
    program = build(small("qwen3"))
    executor = GraphExecutor(program)
    parts = [prompt(length, seed=length).to(DEVICE) for length in (3, 11, 6)]
    cache, tokens = sequences(executor, parts)
    logits = executor.advance(tokens, cache).clone()
    assert cache.lengths == [4, 12, 7]
    for number, (part, token) in enumerate(zip(parts, tokens, strict=True)):
        wanted = interpreter.run(program, torch.cat([part, token[None]]), kept(program))
        assert distance(logits[number : number + 1], wanted) < 1e-5


def test_steps_of_what_was_last_in_use_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rarefy.decoding.graph.KEPT", 2)
    program = build(small(num_hidden_layers=1))
    executor = GraphExecutor(program)
    for count in (1, 2, 1, 3, 2):
        parts = [prompt(3 + number, seed=number).to(DEVICE) for number in range(count)]
        cache, tokens = sequences(executor, parts)
        written = executor.write(tokens, cache, 2)
        assert [int(tokens[-1]), *written[-1].tolist()] == alone(program, parts[-1], 3)
    assert list(executor._steps) == [3, 2]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_it_writes_what_the_interpreter_would(family: str) -> None:
    program = build(small(family))
    executor = GraphExecutor(program)
    part = prompt(5).to(DEVICE)
    wanted = alone(program, part, 9)
    cache = kept(program)
    first = executor(part, cache).argmax(-1)
    more = executor.write(first, cache, 5)
    last = executor.write(more[:, -1], cache, 3)
    assert [*first.tolist(), *more[0].tolist(), *last[0].tolist()] == wanted and cache.length == 13
    parts = [prompt(length, seed=length).to(DEVICE) for length in (4, 7)]
    many, tokens = sequences(executor, parts)
    written = executor.write(tokens, many, 4)
    for part, token, row in zip(parts, tokens, written, strict=True):
        assert [int(token), *row.tolist()] == alone(program, part, 5)


def test_a_cache_that_grows_is_followed() -> None:
    program = build(small(num_hidden_layers=1, max_position_embeddings=600))
    executor, cache, oracle = GraphExecutor(program), kept(program), kept(program)
    tokens = prompt(260).to(DEVICE)
    for part in tokens.split([254, 1, 1, 1, 1, 1, 1]):
        ours, wanted = executor(part, cache), interpreter.run(program, part, oracle)
        assert distance(ours, wanted) < 1e-5
    assert cache.capacity == 512


def test_draws_are_reproducible_and_follow_the_seed() -> None:
    program = build(small())
    executor = GraphExecutor(program)
    written = []
    for seed in (1, 1, 2):
        cache = kept(program)
        executor(prompt(5).to(DEVICE), cache)
        written.append(executor.write(torch.tensor([7]), cache, 8, Sampling(temperature=3.0, seed=seed)).tolist())
    assert written[0] == written[1] != written[2]


def test_what_cannot_be_is_refused() -> None:
    model = small()
    program = build(model)
    executor, cache = GraphExecutor(program), kept(program)
    with pytest.raises(OptionError, match="0 tokens cannot be written"):
        executor.write(torch.tensor([1]), cache, 0)
    with pytest.raises(OptionError, match="66 tokens do not fit the model's 64 positions"):
        executor.write(torch.tensor([1]), cache, 66)
    for options in ({"temperature": 0.0}, {"top_k": -1}, {"top_p": 0.0}):
        with pytest.raises(OptionError, match="cannot be drawn from"):
            Sampling(**options)  # type: ignore[arg-type]
    table = model.model.embed_tokens
    table.weight.data = table.weight.data.T.contiguous().T
    with pytest.raises(UnsupportedError, match="an embedding whose rows lie together"):
        GraphExecutor(program)


class Recorder:
    def __init__(self) -> None:
        self.seen: list[int] = []
        self.ended = False

    def put(self, tokens: Tensor) -> None:
        self.seen += tokens.flatten().tolist()

    def end(self) -> None:
        self.ended = True


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runners of models on the CPU take this executor too, in pieces of three tokens."""
    monkeypatch.setattr(Runner, "_executor", lambda self: GraphExecutor(self.program))
    monkeypatch.setattr("rarefy.integrations.transformers.generation.EVERY", 3)


def test_generate_writes_the_models_text(graphs: None) -> None:
    model, ids = small(), prompt(6)[None].to(DEVICE)
    runner = rarefy.runner(model)
    assert runner.name == "cuda graph" and runner.writes
    given = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    wanted = model.generate(ids, **given)
    recorder = Recorder()
    assert torch.equal(runner.generate(ids, streamer=recorder, **given), wanted)
    assert recorder.seen == wanted[0].tolist() and recorder.ended
    for end in wanted[0, 6:9].tolist():  # at the start, within and at the end of a piece
        given["eos_token_id"] = end
        stopped = model.generate(ids, **given)
        assert torch.equal(runner.generate(ids, **given), stopped)
        assert runner.tokens == stopped[0, :-1].tolist()
    more = torch.cat([stopped, ids], 1)
    given["eos_token_id"] = None
    assert torch.equal(runner.generate(more, **given), model.generate(more, **given))
    assert torch.equal(runner.generate(ids[:, :1], **given), model.generate(ids[:, :1], **given))
    given["repetition_penalty"] = 1.5  # which needs the logits
    assert torch.equal(runner.generate(ids, **given), model.generate(ids, **given))


def test_generate_draws_on_the_gpu(graphs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = small(), prompt(6)[None].to(DEVICE)
    runner = rarefy.runner(model)
    asked: list[Any] = []
    write = Runner.write
    monkeypatch.setattr(Runner, "write", lambda self, *given: [asked.append(given), write(self, *given)][1])
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(
            runner.generate(ids, max_new_tokens=6, do_sample=True, temperature=2.0, top_k=20, top_p=0.9, pad_token_id=0)
        )
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert len({sampling for *_, sampling in asked}) == 2
    assert {(each.temperature, each.top_k, each.top_p) for *_, each in asked} == {(2.0, 20, 0.9)}
    asked.clear()
    runner.generate(ids, max_new_tokens=2, do_sample=True, min_p=0.1, pad_token_id=0)
    assert not asked


def test_more_than_is_remembered_is_written_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rarefy.decoding.graph.WRITTEN", 4)
    program = build(small(num_hidden_layers=1))
    executor, part = GraphExecutor(program), prompt(5).to(DEVICE)
    cache = kept(program)
    first = executor(part, cache).argmax(-1)
    assert [*first.tolist(), *executor.write(first, cache, 6)[0].tolist()] == alone(program, part, 7)
    assert cache.length == 11


def test_generate_takes_several_prompts_of_several_lengths(graphs: None) -> None:
    model = small()
    ids = torch.stack([torch.nn.functional.pad(prompt(length, length), (7 - length, 0)) for length in (7, 3, 5)])
    ids, mask = ids.to(DEVICE), torch.tensor([[1] * 7, [0] * 4 + [1] * 3, [0] * 2 + [1] * 5], device=DEVICE)
    runner = rarefy.runner(model)
    given = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    wanted = model.generate(ids, **given)
    assert torch.equal(runner.generate(ids, **given), wanted)
    for ends in ([int(wanted[0, 8])], wanted[:, 9].tolist(), wanted[:, 7].tolist()):  # of one, and of all of them
        given["eos_token_id"] = ends
        assert torch.equal(runner.generate(ids, **given), model.generate(ids, **given))
    with pytest.raises(UnsupportedError, match="drawn by temperature, top-k and top-p alone"):
        runner.generate(ids, repetition_penalty=2.0, **given)
    given["attention_mask"] = mask.flip(1)
    with pytest.raises(UnsupportedError, match="attention_mask hides some"):
        runner.generate(ids, **given)


def test_places_that_nobody_asked_for_change_nothing() -> None:
    program = build(small(num_hidden_layers=1))
    executor, parts = GraphExecutor(program), [prompt(1 + number, number).to(DEVICE) for number in range(9)]
    batch = Batch(executor, program, parts, torch.float32, DEVICE)
    written = torch.cat([batch.write(2), batch.write(2)], 1)
    assert written.shape == (9, 4)
    for part, row in list(zip(parts, written, strict=True))[::4]:
        assert row.tolist() == alone(program, part, 4)
    with pytest.raises(OptionError, match="at least one token"):
        Batch(executor, program, [torch.tensor([], dtype=torch.int64)], torch.float32, DEVICE)


@pytest.mark.skipif(DEVICE.type != "cpu" or emulation.COMPILER is None, reason="run by this processor")
@pytest.mark.parametrize(
    ("family", "kinds"), [("llama", ["added", "gated", "added", "", "added", "gated"]), ("gemma2", ["gated", "gated"])]
)
def test_linked_products_compute_the_same(family: str, kinds: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_hidden_layers": 2}
    model = compress(small(family, **sizes).to(torch.bfloat16))
    program, parts = build(model), prompt(6).to(DEVICE).split([4, 1, 1])
    exact, plain = (
        torch.cat([interpreter.run(own, part, cache) for cache in [kept(own, dtype=dtype)] for part in parts])
        for own, dtype in ((build(copy.deepcopy(model).to(torch.float32)), torch.float32), (program, torch.bfloat16))
    )
    execute, cache = GraphExecutor(program), kept(program, dtype=torch.bfloat16)
    for product in execute._products.values():
        assert isinstance(product, Together)
        if not isinstance(product._linears[0], CompressedLinear):
            continue  # the head
        for each in product._linears:
            each.restore_()
        layers = [[prepare(*term.operation()) for term in each.terms] for each in product._linears]
        product.terms = [join_(terms) for terms in zip(*layers, strict=True)]
    ended: list[str] = []

    def launch(*given: Any) -> None:
        ended.append(given[-1].kind)
        emulation.program_linear(*given)

    monkeypatch.setattr(import_module("rarefy.kernels.cuda.linear"), "_compiles", lambda: True)
    monkeypatch.setattr("rarefy.kernels.cuda.program.linear", launch)
    cut = Tuning(1, 1, 2, 1, 1, spread=True)
    monkeypatch.setattr("rarefy.kernels.cuda.tuning.choose_with", lambda *given: cut)
    made = torch.cat([execute(part, cache) for part in parts])
    assert distance(made, exact) < 1.5 * distance(plain, exact)
    assert ended == kinds * 2
