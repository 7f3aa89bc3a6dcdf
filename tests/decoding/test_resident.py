"""A step in one launch, run by this processor, against the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rarefy.core.errors import UnsupportedError
from rarefy.decoding import interpreter, resident
from rarefy.decoding.build import build
from rarefy.decoding.cache import KeyValues
from rarefy.decoding.fuse import AddNorm, Projects, fuse
from rarefy.kernels.cuda.join import join_
from rarefy.kernels.cuda.prepared import prepare
from rarefy.layers.linear import CompressedLinear
from tests.decoding.models import CODED, build_model, coded, compress
from tests.kernels.cuda import emulation

pytestmark = pytest.mark.skipif(emulation.COMPILER is None, reason="there is no C++ compiler")

BLOCKS = 5
SIZES = {  # a product in one piece, and one in several
    "hidden_size": 128, "intermediate_size": 704, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "num_hidden_layers": 1, "vocab_size": 170, "max_position_embeddings": 1024, "initializer_range": 0.06,
}  # fmt: skip
WIDE = {  # enough rows of keys for a tile
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
def prepared_of(linears: Any) -> Any:
    """As ``decoding/products.py`` does on a GPU."""
    if not all(isinstance(each, CompressedLinear) for each in linears):
        return None
    columns = []
    for terms in zip(*([*each.terms] for each in linears), strict=True):
        parts = []
        for term in terms:
            family, arguments, multiplier = term.operation()
            parts.append(prepare(family, arguments, multiplier))
        columns.append(join_(parts))
    return columns if all(each is not None for each in columns) else None


@pytest.fixture(autouse=True)
def few_warps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident, "prepared_of", prepared_of)
    monkeypatch.setattr(resident, "WARPS", 2)
    monkeypatch.setattr(resident, "blocks_of", lambda device: BLOCKS)


def step_of(model: Any, dtype: torch.dtype) -> Any:
    program = build(model)
    return program, resident.ResidentStep(program, fuse(program.operations), dtype, torch.device("cpu"))


def agrees(model: Any, length: int, dtype: torch.dtype, most: float = 3e-2) -> Any:
    """Two steps after ``length`` tokens."""
    program, made = step_of(model, dtype)
    sizes = (program.layers, program.kv_heads, program.head_dim, dtype, program.positions)
    ours, oracle = (KeyValues(*sizes) for _ in range(2))
    tokens = torch.randint(3, program.vocabulary, (length + 2,), generator=torch.Generator().manual_seed(1))
    for cache in (ours, oracle):
        interpreter.run(program, tokens[:length], cache)
        cache.length = length
        cache.reserve(length + 2)
    position = torch.tensor([length], dtype=torch.int32)

    def turned(rotate: Any) -> Tensor:
        return torch.stack(interpreter.turns(rotate, 0, ours.capacity, dtype), 1)

    step = made.bind(ours.keys[:, None], ours.values[:, None], position, turned)
    for token in tokens[length:].split(1):
        embed = made.plan.embed
        made.hidden.copy_(embed.table.weight[token] * torch.tensor(embed.scale, dtype=dtype))
        emulation.step(step, BLOCKS)
        buffers = dict(made.buffers)
        for operation in made.plan.rest:
            if isinstance(operation, AddNorm):
                buffers[operation.norm.out] = interpreter.normalize(operation.norm, buffers[operation.norm.x])
            elif isinstance(operation, Projects):
                (part,) = operation.parts
                buffers[part.out] = part.linear(buffers[part.x])
        wanted = interpreter.run(program, token, oracle).double()
        position += 1
        assert float((buffers["logits"].double() - wanted).norm() / wanted.norm()) < most
    return made


@pytest.mark.parametrize("name", CODED)
def test_logits_are_the_interpreters(name: str) -> None:
    agrees(coded(name, SIZES).to(torch.bfloat16), 1, torch.bfloat16)


def test_positions_are_shared_by_blocks() -> None:
    made = agrees(coded("int4", SIZES).to(torch.float16), 300, torch.float16, 5e-3)
    assert made.form.splits == 2


@pytest.mark.parametrize("family", ["llama_tied", "qwen2", "qwen3", "mistral"])
def test_families_of_models(family: str) -> None:
    model = compress(build_model(family, **WIDE)).to(torch.float16).requires_grad_(False)
    made = agrees(model, 9, torch.float16)
    assert made.plan.rest  # the head is dense


def test_what_is_refused() -> None:
    for model in (build_model("llama"), compress(build_model("gemma2"))):
        with pytest.raises(UnsupportedError):
            step_of(model.to(torch.float16), torch.float16)
