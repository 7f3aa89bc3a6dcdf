"""A step in one launch, run by this processor, against the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rarefy.decoding import interpreter, resident
from rarefy.decoding.build import build
from rarefy.decoding.cache import KeyValues
from rarefy.decoding.fuse import fuse
from rarefy.formats.grids import BinaryGrid, Grid, IntegerGrid, LutGrid
from rarefy.formats.scales import BilevelScale
from rarefy.formats.terms import Quantized, Residual
from rarefy.kernels.cuda.join import join_
from rarefy.kernels.cuda.prepared import prepare
from rarefy.layers.linear import CompressedLinear
from tests.kernels.cuda import emulation

pytestmark = pytest.mark.skipif(emulation.COMPILER is None, reason="there is no C++ compiler")

SIZES = {
    "hidden_size": 256, "intermediate_size": 416, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "num_hidden_layers": 2, "vocab_size": 330, "max_position_embeddings": 1024, "initializer_range": 0.06,
}  # fmt: skip
GRIDS: dict[str, tuple[Grid, bool]] = {  # and whether there are outliers
    "int4": (IntegerGrid(num_bits=4, group_size=64), False),
    "int4 in short groups": (IntegerGrid(num_bits=4, group_size=16, zero="integer"), True),
    "int3 with zeros": (IntegerGrid(num_bits=3, group_size=64, zero="float"), True),
    "two-level scales": (IntegerGrid(num_bits=3, group_size=16, zero="float", scales=BilevelScale(rows=16)), True),
    "tables of rows": (LutGrid(num_bits=3), True),
    "tables of 16": (LutGrid(num_bits=4, group_size=32), False),
    "binary": (BinaryGrid(group_size=128), False),
    "int2 in rows": (IntegerGrid(num_bits=2), False),
    "int8": (IntegerGrid(num_bits=8, group_size=32), False),
}  # fmt: skip


def prepared_of(linears: Any) -> Any:
    """As ``decoding/products.py`` does on a GPU."""
    columns = []
    for terms in zip(*([*each.terms] for each in linears), strict=True):
        parts = []
        for term in terms:
            family, arguments, multiplier = term.operation()
            parts.append(prepare(family, arguments, multiplier))
        columns.append(join_(parts))
    return columns


def step_of(model: Any, dtype: torch.dtype) -> Any:
    program = build(model)
    return program, resident.ResidentStep(program, fuse(program.operations), dtype, torch.device("cpu"))


def model_of(name: str, dtype: torch.dtype, **changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes})).eval()
    grid, with_outliers = GRIDS[name]
    for path, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear):
            weight = module.weight.data
            params = grid.fit(weight)
            terms: list[Any] = [Quantized.from_codes(grid.encode(weight, params), params, grid)]
            if with_outliers:
                left = weight - terms[0].decode()
                terms.append(Residual.from_weight(left, left.abs() > left.abs().quantile(0.97)))
            model.set_submodule(path, CompressedLinear(terms))
    return model.to(dtype)


@pytest.mark.parametrize(("length", "dtype"), [(1, torch.bfloat16), (300, torch.float16)])
@pytest.mark.parametrize("name", GRIDS)
def test_logits_are_the_interpreters(
    name: str, length: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resident, "prepared_of", prepared_of)
    monkeypatch.setattr(resident, "WARPS", 4)
    model = model_of(name, dtype)
    program, made = step_of(model, dtype)
    kept = [KeyValues(2, 2, 64, dtype, 1024) for _ in range(2)]
    tokens = torch.randint(3, 330, (length + 2,), generator=torch.Generator().manual_seed(1))
    for cache in kept:
        interpreter.run(program, tokens[:length], cache)
        cache.length = length
        cache.reserve(length + 2)
    ours, oracle = kept
    position = torch.tensor([length], dtype=torch.int32)

    def turned(rotate: Any) -> torch.Tensor:
        return torch.stack(interpreter.turns(rotate, 0, ours.capacity, dtype), 1)

    step = made.bind(ours.keys[:, None], ours.values[:, None], position, turned)
    for token in tokens[length:].split(1):
        made.hidden.copy_(made.plan.embed.table.weight[token])
        emulation.step(step, blocks=5)
        wanted = interpreter.run(program, token, oracle).double()
        position += 1
        assert float((made.logits.double() - wanted).norm() / wanted.norm()) < 3e-2
