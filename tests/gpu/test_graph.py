"""The CUDA executor on models of real widths, in the dtypes people use, against the interpreter on the same GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import rarefy
from rarefy.contracts import Recipe, Rule
from rarefy.decoding import interpreter
from rarefy.decoding.build import build
from rarefy.decoding.cache import FLOAT8, KeyValues, Sequences
from rarefy.decoding.link import Linked
from rarefy.decoding.program import Program
from rarefy.decoding.runner import Runner
from rarefy.decoding.sampling import Sampling
from rarefy.kernels.cuda import attend_token
from tests.decoding.models import CODED, coded

pytest.importorskip("triton")
from rarefy.decoding.graph import GraphExecutor
from rarefy.kernels.triton import step
from rarefy.kernels.triton.step import PLAIN, Gain, Heads

pytestmark = pytest.mark.gpu

# Sizes of SmolLM2-135M with fewer layers: widths that are no power of two, ragged groups of 128.
SMALL = {
    "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3,
    "num_hidden_layers": 4, "vocab_size": 49152, "max_position_embeddings": 8192,
}  # fmt: skip
VOCABULARY = SMALL["vocab_size"]


def model_of(dtype: torch.dtype, bits: int | None = None, **changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SMALL, **changes})).eval()
    if bits is not None:
        rule = Rule(targets=("Linear",), method="rtn", options={"num_bits": bits, "group_size": 64})
        rarefy.compress(model, Recipe(name="rtn", rules=(rule,)))
    return model.to(dtype).cuda()


def kept(program: Program, dtype: torch.dtype, sequences: int | None = None) -> Any:
    sizes = (program.layers, program.kv_heads, program.head_dim, dtype, program.positions, torch.device("cuda", 0))
    return KeyValues(*sizes) if sequences is None else Sequences(sequences, *sizes)


def prompt(length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).cuda()


def distance(ours: Tensor, wanted: Tensor) -> float:
    return float((ours.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.float16, 5e-3), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("length", [1, 63, 1500])
def test_logits_are_the_interpreters(dtype: torch.dtype, most: float, bits: int | None, length: int) -> None:
    model = model_of(dtype, bits)
    program, tokens = build(model), prompt(length + 3)
    execute, ours, oracle = GraphExecutor(program), kept(program, dtype), kept(program, dtype)
    for part in tokens.split([length, 1, 1, 1]):
        assert distance(execute(part, ours), interpreter.run(program, part, oracle)) < most


@pytest.mark.parametrize("name", CODED)
def test_every_kind_of_code(name: str) -> None:
    model = coded(name, {**SMALL, "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2})
    program, tokens = build(model.to(torch.float16).cuda()), prompt(74)
    execute, ours, oracle = GraphExecutor(program), kept(program, torch.float16), kept(program, torch.float16)
    for part in tokens.split([70, 1, 1, 1, 1]):
        assert distance(execute(part, ours), interpreter.run(program, part, oracle)) < 1e-2


@pytest.mark.parametrize("name", CODED)
@pytest.mark.parametrize("sequences", [1, 5, 16])
def test_linked_products_are_those_alone(name: str, sequences: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every kind of code, in bfloat16: linked to what surrounds them and launch by launch."""
    sizes = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 2}
    program = build(coded(name, {**SMALL, **sizes}).to(torch.bfloat16).cuda())
    tokens, logits = torch.arange(5, 5 + sequences, device="cuda"), []
    monkeypatch.setattr("rarefy.decoding.graph.MOST_LINKED", 16)
    for linked in (True, False):
        if not linked:
            monkeypatch.setattr("rarefy.decoding.graph.can_end", lambda *given: False)
        execute, cache = GraphExecutor(program), kept(program, torch.bfloat16, sequences)
        assert any(isinstance(each, Linked) for each in execute.steps(sequences)) == linked
        for number in range(sequences):
            execute.read(prompt(3 + 40 * number, seed=number), cache, number)
        logits.append(torch.stack([execute.advance(tokens, cache).clone() for _ in range(3)]))
    assert distance(*logits) < 3e-2


@pytest.mark.parametrize(("group", "channels"), [(4, 128), (8, 128), (1, 64)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"softcap": 20.0}, {"window": 100}])
def test_attention_of_a_token_is_the_portable_one(
    group: int, channels: int, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    heads, lengths = 2, [0, 1, 63, 64, 700, 2999]
    angles = torch.arange(3000, device="cuda")[:, None] * 0.9 ** torch.arange(channels // 2, device="cuda")
    turns = torch.stack([angles.cos(), angles.sin()], 1).to(dtype)
    gain = Gain(torch.rand(channels, device="cuda").to(dtype) + 0.5, 1e-6, PLAIN)
    layer = Heads(heads * group, heads, channels, channels**-0.5, turns, q_gain=gain, k_gain=gain, **options)
    positions = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    cached = torch.randn(2, len(lengths), heads, 3000, channels, device="cuda").to(dtype)
    q, k, v = (
        torch.randn(len(lengths), count * channels, device="cuda").to(dtype)
        for count in (heads * group, heads, heads)
    )
    found = []
    for kind in (attend_token.Attention, step.Attention):
        keys, values = cached.clone()
        attention = kind(len(lengths), heads * group, heads, channels, torch.device("cuda", 0))
        for _ in range(2):
            out = attention(q, k, v, keys, values, positions, layer)
        found.append((out, keys, values))
    for ours, portable in zip(*found, strict=True):
        assert distance(ours, portable) < (2e-3 if dtype == torch.float16 else 1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", [[1], [300], [700, 3, 64, 33, 1500]])
def test_a_cache_in_eight_bits(dtype: torch.dtype, lengths: list[int]) -> None:
    program = build(model_of(dtype, 4))
    execute, cache = GraphExecutor(program), kept(program, FLOAT8, len(lengths))
    for number, length in enumerate(lengths):
        execute.read(prompt(length, seed=number), cache, number)
    tokens = torch.arange(5, 5 + 3 * len(lengths), device="cuda").view(3, -1)
    made = [execute.advance(each, cache).clone() for each in tokens]
    for number, length in enumerate(lengths):
        oracle = kept(program, FLOAT8)
        interpreter.run(program, prompt(length, seed=number), oracle)
        for token, logits in zip(tokens[:, number], made, strict=True):
            wanted = interpreter.run(program, token[None], oracle)
            assert distance(logits[number : number + 1], wanted) < 5e-2
    assert cache.byte_count() < 0.52 * cache.keys.numel() * (2 * dtype.itemsize)


def test_many_sequences_of_many_lengths() -> None:
    model = model_of(torch.float32, 4)
    program = build(model)
    execute, cache = GraphExecutor(program), kept(program, torch.float32, 32)
    parts = [prompt(1 + 37 * number % 600, seed=number) for number in range(32)]
    tokens = torch.cat([execute.read(part, cache, number) for number, part in enumerate(parts)]).argmax(-1)
    written = execute.write(tokens, cache, 6)
    for number in (0, 1, 16, 31):
        alone, text = kept(program, torch.float32), parts[number]
        for token in (int(tokens[number]), *written[number].tolist()):
            logits = interpreter.run(program, text, alone)[0]
            # Of two logits that are equal but for rounding either may win.
            assert float(logits.max() - logits[token]) < 1e-4 * float(logits.abs().max())
            text = torch.tensor([token], device="cuda")


def test_a_step_replayed_across_tiles_and_growth() -> None:
    model = model_of(torch.float32)
    program, tokens = build(model), prompt(530)
    execute, ours, oracle = GraphExecutor(program), kept(program, torch.float32), kept(program, torch.float32)
    interpreter.run(program, tokens[:250], oracle)
    execute(tokens[:250], ours)
    for number, token in enumerate(tokens[250:].split(1)):
        logits, wanted = execute(token, ours), interpreter.run(program, token, oracle)
        if number % 40 < 8:
            assert distance(logits, wanted) < 1e-5


def test_the_runner_takes_graphs_and_generates_as_the_model() -> None:
    model = model_of(torch.float32, 4)
    runner = Runner(model)
    assert runner.name == "cuda graph"
    ids = prompt(20)[None]
    given = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0, "eos_token_id": 5}
    assert torch.equal(rarefy.runner(model).generate(ids, **given), model.generate(ids, **given))


def test_draws_follow_the_seed_wherever_they_are_cut() -> None:
    program = build(model_of(torch.bfloat16))
    execute = GraphExecutor(program)
    found = []
    for cuts in ([12], [5, 7], [1] * 12):
        cache = kept(program, torch.bfloat16)
        execute(prompt(9), cache)
        last, text = torch.tensor([7]), []
        for count in cuts:
            written = execute.write(last, cache, count, Sampling(temperature=1.5, top_k=40, top_p=0.95, seed=3))
            text += written[0].tolist()
            last = written[:, -1]
        found.append(text)
    assert found[0] == found[1] == found[2]


def test_a_compiled_model_computes_the_same() -> None:
    model = model_of(torch.float32, 4, num_hidden_layers=2)
    ids = prompt(12)[None]
    with torch.inference_mode():
        wanted = model(input_ids=ids, use_cache=False).logits
        compiled = torch.compile(model.forward)(input_ids=ids, use_cache=False).logits
    assert distance(compiled, wanted) < 1e-5
