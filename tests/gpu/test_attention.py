"""Executors and whole plans on a GPU: 16-bit kernels against the reference, and caches of Transformers decoded."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import rarefy
from rarefy.attention.block_map import BlockMap
from rarefy.attention.call import Call
from rarefy.attention.estimators import Extremes, PooledMeans, true_blocks
from rarefy.attention.estimators.gated import Gated
from rarefy.attention.executors import Reference, executors
from rarefy.attention.gate import BlockGate
from rarefy.attention.plan import AttentionPlan
from rarefy.attention.policy import Policy
from rarefy.attention.reach import Reach
from rarefy.attention.report import PlanReport
from rarefy.attention.selectors import Mass, TopK, newest, select_map
from rarefy.attention.source import Plain, Stored
from rarefy.kv.codecs import Exact
from rarefy.kv.plan import LayerCodecs
from rarefy.kv.rotary import Rotary
from rarefy.kv.store import LayerStore
from tests.zoo import VOCABULARY, family_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
DEVICE = torch.device("cuda")


def decoding_gate(heads: int, maps: int, channels: int) -> Gated:
    gate = BlockGate.new(heads, maps, channels, ("max", "min", "mean"), True)
    parts = {name: part.to(DEVICE, torch.bfloat16) for name, part in gate.tensors("decode").items()}
    return Gated({"decode": BlockGate.of(parts, "decode", gate.pools)})


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("name", "block_q", "block_k", "heads"),
    [
        ("fa4", 128, 128, 8), ("fa4", 128, 128, 2), ("triton", 128, 128, 8), ("triton", 128, 64, 2),
        ("triton", 64, 64, 8), ("triton", 16, 16, 2), ("flex", 128, 128, 8),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("queries", "keys"), [(1024, 1024), (300, 1000)])
def test_executors_agree(
    name: str, block_q: int, block_k: int, heads: int, queries: int, keys: int, dtype: Any
) -> None:
    reach = Reach.last(queries, keys)
    blocks = reach.blocks(block_q, block_k, DEVICE)
    scores = torch.randn(2, heads, blocks.rows, blocks.columns, device=DEVICE)
    block_map = select_map(TopK(0.4), scores, blocks, Policy().forced(reach, blocks, 0, heads, 8), reach)
    query, key, value = (
        torch.randn(2, n, h, 128, device=DEVICE, dtype=dtype).transpose(1, 2)
        for n, h in ((queries, 8), (keys, 2), (keys, 2))
    )
    executor, source = executors.get(name)(), Plain(key, value)
    reason = executor.refusal(query, source, block_map)
    if reason is not None:
        pytest.skip(reason)
    expected, expected_lse = Reference().run(query.float(), Plain(key.float(), value.float()), block_map, 0.08)
    found, lse = executor.run(query, source, block_map, 0.08)
    assert relative(found, expected) < 5e-3
    torch.testing.assert_close(lse.float(), expected_lse, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("selector", [TopK(0.1), TopK(count=9), TopK(0.2, include_forced=False), Mass(0.5)])
@pytest.mark.parametrize("tokens", [4096, 40000])
def test_selection_on_the_device_is_the_selector(selector: Any, tokens: int) -> None:
    reach = Reach.last(tokens, tokens)
    blocks = reach.blocks(128, 128, DEVICE)
    scores = torch.randn(1, 4, blocks.rows, blocks.columns, device=DEVICE)
    forced = Policy().forced(reach, blocks, 0, 4, 4)
    found = select_map(selector, scores, blocks, forced, reach)
    expected = BlockMap.from_mask(selector.select(scores, blocks.some, forced), reach, blocks)
    differing = (found.dense() != expected.dense()).sum()
    # Sums in another order may reach a mass one block sooner or later.
    assert int(differing) <= (blocks.rows * 4 // 100 if isinstance(selector, Mass) else 0)


@pytest.mark.parametrize("name", ["quest_pages", "sparge"])
def test_decoding_with_a_cache_that_keeps_state(name: str) -> None:
    model = family_of("llama").build(head_dim=32, max_position_embeddings=1024).to(DEVICE, torch.bfloat16)
    model.generation_config.pad_token_id = 0
    tokens = torch.randint(3, VOCABULARY, (2, 500), device=DEVICE)
    mask = torch.ones_like(tokens)
    mask[0, :37] = 0
    expected = model.generate(tokens, attention_mask=mask, max_new_tokens=30, do_sample=False)
    own = {"phases": "both", "dense_layers": ()} if name == "quest_pages" else {"similarity": -1}
    setup = rarefy.set_attention(model, name, density=1.0, dense_below=0, max_density=1, block_q=64, block_k=16, **own)
    assert setup is not None
    found = model.generate(tokens, attention_mask=mask, max_new_tokens=30, do_sample=False)
    agree = (found == expected)[:, 500:].float().mean()
    assert setup.report.layers[0].executors == {"triton": 30} and float(agree) > 0.8


@pytest.mark.parametrize("reduce", ["mass", "max"])
def test_true_blocks_by_the_kernel(reduce: Any) -> None:
    reach = Reach(700, 1000, 300, first=torch.tensor([0, 137], device=DEVICE))
    query, key = (torch.randn(2, heads, n, 128, device=DEVICE) for heads, n in ((8, 700), (2, 1000)))
    blocks = reach.blocks(64, 64, DEVICE)
    found = true_blocks(Call(query.half(), Plain(key.half(), key.half()), reach, 0.1), blocks, reduce)
    host = Reach(700, 1000, 300, first=torch.tensor([0, 137]))
    call = Call(query.half().float().cpu(), Plain(key.half().float().cpu(), key.cpu()), host, 0.1)
    torch.testing.assert_close(found.cpu(), true_blocks(call, host.blocks(64, 64), reduce), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", ["means", "extremes", "gate"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_token_gets_the_blocks_that_scores_and_selector_choose(
    name: str, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over a cache that keeps state, in one launch and in many."""
    first = torch.tensor([0, 300], device=DEVICE) if padded else None
    makers: dict[str, Any] = {"means": PooledMeans, "extremes": Extremes, "gate": lambda: decoding_gate(8, 2, 128)}
    estimator = makers[name]()
    store = LayerStore(LayerCodecs(Exact(torch.bfloat16), Exact(torch.bfloat16)))
    plan = AttentionPlan(estimator, TopK(0.2), Policy(dense_below=0, max_density=1, local=2), 64, 64, "kv", "triton")
    turn = Rotary(1e4 ** (-torch.arange(0, 128, 2, device=DEVICE).float() / 128))
    for count in (4000, 150, 1, 1):
        seen = store.append(*(torch.randn(2, 2, count, 128, device=DEVICE, dtype=torch.bfloat16) for _ in range(2)))
        query = torch.randn(2, 8, 1, 128, device=DEVICE, dtype=torch.bfloat16)
        places = torch.full((1, 1), seen.length - 1, device=DEVICE)
        cos, sin = (part.to(query.dtype) for part in turn.angles(places))
        reach = Reach(1, seen.length, seen.length - 1, first=first)
        call = Call(
            query, Stored(seen), reach, 0.1, angles=(cos, sin), positions=places, find_rotary=lambda: turn
        )  # fmt: skip
        found = plan.map(call)
        with monkeypatch.context() as patch:
            patch.setattr(newest, "serves", lambda *given: False)
            expected = plan.map(call)
        assert found is not None and expected is not None
        assert torch.equal(found.count, expected.count)
        # Scores that are rounded to 16 bits or not may put blocks at the edge in another order.
        prepared = plan.prepared(call)
        scores = estimator.scores(prepared, reach.blocks(1, 64, DEVICE))
        kept = [scores.masked_fill(~each.dense(), 0.0).sum() for each in (found, expected)]
        torch.testing.assert_close(*kept, rtol=2e-3, atol=1e-2)
        output = plan.attend(call)
        assert output is not None
        own, _ = Reference().run(query, call.source, found, 0.1)
        assert relative(output, own) < 1e-2


def test_a_decoding_step_is_one_graph() -> None:
    """Scores, choice and attention are captured once and follow queries and lengths that change in place."""
    from rarefy.kernels.triton.block_decode import BlockDecode, choose_blocks

    batch, heads, tokens, size = 2, 2, 2048, 64
    key, value = (torch.randn(batch, heads, tokens, 128, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    means = key.unflatten(2, (-1, size)).mean(3).contiguous()
    query = torch.randn(batch, 8, 128, device=DEVICE, dtype=torch.bfloat16)
    length = torch.tensor([1000, 1500], dtype=torch.int32, device=DEVICE)
    attention = BlockDecode(batch, heads, 8, 128, size, device=DEVICE)

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        _, _, count, columns = choose_blocks(query, means, length, tokens // size, tokens=size, scaling=0.1, share=0.2)
        output, _ = attention(query, key, value, columns.view(batch, heads, -1), count[:, :, 0], length, 0.1)
        return output, count

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output, count = step()
    for _ in range(3):
        query.copy_(torch.randn_like(query))
        length.add_(150)
        graph.replay()
        expected, kept = step()
        assert torch.equal(kept, count)
        torch.testing.assert_close(output, expected)
        visible = (length - 1) // size + 1
        assert torch.equal(kept[:, 0, 0], (visible * 0.2 - 1e-6).ceil().int())


def test_a_plan_over_a_coded_cache_is_one_graph() -> None:
    """Estimate, selection and attention over blocks in code and a tail, captured once, follow a query that changes."""
    from rarefy.contracts import kv_recipes
    from rarefy.kv.plan import HeadShape
    from rarefy.recipes import discover

    discover()
    recipe = kv_recipes.get("kivi")(num_bits=4, group_size=32, residual=64, sink=2)
    store = LayerStore(recipe.codecs(HeadShape(2, 128, 128, torch.bfloat16), {}))
    store.append(*(torch.randn(1, 2, 2176, 128, device=DEVICE, dtype=torch.bfloat16) for _ in range(2)))
    query = torch.randn(1, 8, 1, 128, device=DEVICE, dtype=torch.bfloat16)
    policy = Policy(dense_below=0, max_density=1)
    plan = AttentionPlan(PooledMeans(), TopK(0.3), policy, 64, 64, "kv", "triton")
    call, report = Call(query, Stored(store), Reach.last(1, store.length), 0.08), PlanReport()

    def step() -> torch.Tensor:
        output = plan.attend(call, report)
        assert output is not None
        return output

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    counted = report.density()
    assert 0.25 < counted < 0.4
    report.clear()  # which a graph must not need: what it reads has to stay
    torch.cuda.empty_cache()
    for _ in range(3):
        query.copy_(torch.randn_like(query))
        graph.replay()
        block_map = plan.map(call)
        assert block_map is not None
        expected, _ = Reference().run(query, call.source, block_map, 0.08)
        assert relative(captured, expected) < 1e-2
        torch.testing.assert_close(captured, step())
