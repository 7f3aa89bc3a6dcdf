"""Kernels over lists of blocks compile for a GPU, which needs none: types of loops are checked here only."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64",
    torch.uint8: "*u8",
}  # fmt: skip


def kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    if hasattr(value, "block_shape"):  # a tensor as the copy engine is told of it
        return f"tensordesc<{TYPES[value.base.dtype][1:]}{value.block_shape}>"
    return "fp32" if isinstance(value, float) else "i64" if abs(value) >= 2**31 else "i32"


def compile_run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
    """What a launch would run, compiled for compute capability 9.0."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    given = {name: options.pop(name) for name in ("num_warps", "num_stages", "launch_pdl") if name in options}
    bound = {**dict(zip(names, arguments, strict=False)), **options}
    constant = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    signature = {name: "constexpr" if name in constant else kind(value) for name, value in bound.items()}
    constants = {(names.index(name),): bound[name] for name in names if name in constant}
    source = ASTSource(fn=kernel, signature={name: signature[name] for name in names}, constexprs=constants)
    triton.compile(source, target=GPUTarget("cuda", 90, 32), options=given)
    print(kernel.fn.__name__)


def compile_all() -> None:
    from triton.runtime.jit import JITFunction

    from rarefy.kernels.coded import Tiles
    from rarefy.kernels.triton import block_attention as prefill
    from rarefy.kernels.triton import step
    from rarefy.kernels.triton.block_decode import BlockDecode, Paged, choose_blocks
    from rarefy.kernels.triton.block_mass import block_mass
    from rarefy.kernels.triton.block_select import partial_blocks, select_blocks
    from rarefy.kernels.triton.decode_attention import DecodeAttention
    from rarefy.kernels.triton.folded_mass import folded_mass

    JITFunction.run = compile_run  # type: ignore[method-assign]
    step._early = lambda device: True  # type: ignore[assignment]
    query, key = (torch.ones(2, heads, 512, 128, dtype=torch.bfloat16) for heads in (8, 2))
    lines, rows = torch.zeros(2, 8, 4, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)
    packed = torch.zeros(2, 512, dtype=torch.int64)
    columns = torch.zeros(2 * 8 * 4 * 4, dtype=torch.int32)
    shape: dict[str, Any] = {"block_q": 128, "block_k": 128, "scaling": 0.1, "offset": 0}
    for engine in (True, False):
        prefill.has_engine = lambda device, engine=engine: engine  # type: ignore[assignment]
        for own in ({}, {"window": 64, "first": rows, "stop": rows, "segment": packed}):
            prefill.block_attention(query, key, key, lines, lines, lines, columns, causal=True, **shape, **own)
    for reduce in ("mass", "max"):
        block_mass(query, key, first=rows, reduce=reduce, **shape)
    scores, flags = torch.ones(2, 8, 4, 64), torch.ones(2, 1, 4, 64, dtype=torch.uint8)
    select_blocks(scores, flags, rule="top", share=0.1, include_forced=False)
    select_blocks(scores, rule="top", wanted=3)
    select_blocks(scores, flags, rule="mass", share=0.9)
    select_blocks(scores, flags, rule="cut", limits=torch.ones(8))
    select_blocks(scores, flags, rule="cut", share=0.5, normalized=False)
    partial_blocks(lines, lines, lines, columns, 2)
    one, length = query[:, :, 0].contiguous(), torch.ones(2, dtype=torch.int32)
    pages = torch.ones(2, 2, 8, 128, dtype=torch.bfloat16)
    for low in (None, pages):
        choose_blocks(one, pages, length, 9, tokens=64, scaling=0.1, share=0.1, low=low)
    choose_blocks(one, pages, length, 8, tokens=64, scaling=0.1, wanted=3, include_forced=False, first=rows)
    index, count = torch.zeros(2, 2, 8, dtype=torch.int32), torch.zeros(2, 2, dtype=torch.int32)
    for size, splits in ((16, None), (128, 1)):
        decode = BlockDecode(2, 2, 8, 128, size, device=torch.device("cpu"), splits=splits)
        decode(one, key, key, index, count, length, 0.1)
        paged = Paged(torch.zeros(3, 8, dtype=torch.int64), key, 64)
        decode.paged(one, paged, paged, index, count, length, 0.1, rows)
    numbers = torch.zeros(2, 2, 512, 128, dtype=torch.float16)
    halves = [Tiles(side, ((numbers, numbers, numbers),), 4, 128, 128) for side in ("channel", "token")]
    for size in (64, 128):
        coded = DecodeAttention(*halves, 2, 2, 8, 128, 128, device=torch.device("cpu"), block=size)
        coded(one, 0.1, (index, count), rows)
    folded = [part.unflatten(2, (-1, 16)).flatten(3) for part in (query, key)]
    folded_mass(folded[0], folded[1], stride=16, per_row=8, per_column=8, scaling=0.1, offset=0, count=512,
                blocks=(4, 4), first=rows)  # fmt: skip


@pytest.mark.slow
def test_every_kernel_over_blocks_compiles() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    names = {"_attend", "_mass", "_select", "_partial", "_choose", "_chosen", "_folded", "_merge", "attend_stretch"}
    assert set(done.stdout.split()) == names


if __name__ == "__main__":
    compile_all()
