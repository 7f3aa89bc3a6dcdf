"""Kernels of estimators compile for a GPU, which needs none: the interpreter does not check types and tiles."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float8_e4m3fn: "*fp8e4nv",
    torch.int8: "*i8", torch.int64: "*i64",
}  # fmt: skip


class Compiled:
    """In the place of a kernel: what a launch would run, compiled for compute capability 9.0."""

    def __init__(self, kernel: Any):
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self._compile

    def _compile(self, *arguments: Any, **options: Any) -> None:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        names = list(inspect.signature(self._kernel.fn).parameters)
        given = {name: options.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in options}
        kinds = [
            TYPES[each.dtype] if isinstance(each, torch.Tensor) else "i32" if isinstance(each, int) else "fp32"
            for each in arguments
        ]
        signature = {**dict(zip(names, kinds, strict=False)), **dict.fromkeys(options, "constexpr")}
        constants = {(names.index(name),): value for name, value in options.items()}
        source = ASTSource(fn=self._kernel, signature=signature, constexprs=constants)
        triton.compile(source, target=GPUTarget("cuda", 90, 32), options=given)
        print(self._kernel.fn.__name__)


def compile_all() -> None:
    from rarefy.kernels.triton import anchored_scores, block_means, block_summaries, window_shares

    for module, names in (
        (block_means, ("_means",)),
        (block_summaries, ("_summaries",)),
        (window_shares, ("_totals", "_shares", "_blocks")),
        (anchored_scores, ("_keys", "_queries", "_anchored")),
    ):
        for name in names:
            setattr(module, name, Compiled(getattr(module, name)))
    for dtype, channels, first in ((torch.bfloat16, 128, None), (torch.float32, 64, torch.zeros(1, dtype=torch.int64))):
        query, key = (torch.zeros(1, heads, 512, channels, dtype=dtype) for heads in (8, 2))
        angles, means = torch.zeros(1, 512, channels), torch.zeros(1, 2, 31, channels, dtype=dtype)
        for likeness in (True, False):
            block_means.block_means(key.unflatten(2, (-1, 128)), likeness)
        for kinds in (("mean",), ("max", "min", "mean")):
            block_summaries.block_summaries(key.unflatten(2, (-1, 64)), angles, angles, kinds)
        windows: dict[str, Any] = {"size": 32, "stride": 16, "scaling": 0.1, "offset": 0, "first": first}
        for block_q in (1, 64, 128):
            for coarse in (None, means[:, :, ::4]):
                totals = window_shares.window_totals(
                    query, means, coarse, block_q=block_q, coarse_size=128, coarse_stride=64, **windows
                )
            shares = window_shares.window_shares(query, means, totals, block_q=block_q, **windows)
            window_shares.block_scores(shares, 8, size=32, stride=16, block_k=64)
        asked, kept = (torch.zeros(1, heads, channels) for heads in (8, 2))
        for block_q, block_k, every, codes in (
            (64, 32, 1, torch.float8_e4m3fn), (64, 64, 4, torch.int8), (128, 128, 1, torch.float8_e4m3fn),
        ):  # fmt: skip
            anchored_scores.anchored_scores(
                query, key, asked if block_k < 128 else None, kept, most=7, block_q=block_q, block_k=block_k,
                every=every, sink=block_k, local=128, scaling=0.1, offset=0, first=first, dtype=codes,
            )  # fmt: skip


@pytest.mark.slow
def test_kernels_of_estimators_compile() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    windows, low_bit = {"_totals", "_shares", "_blocks"}, {"_keys", "_queries", "_anchored"}
    assert set(done.stdout.split()) == {"_means", "_summaries", *windows, *low_bit}


if __name__ == "__main__":
    compile_all()
