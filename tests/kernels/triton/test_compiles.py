"""Kernels that the interpreter runs also compile for a GPU, which needs none: types of loops are checked here only."""

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
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip


def compile_launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **options: Any) -> None:
    """What ``step.launch`` would run, compiled for compute capability 9.0."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(inspect.signature(kernel.fn).parameters)
    given = {name: options.pop(name) for name in ("num_warps", "num_stages") if name in options}
    options["EARLY"] = True
    kinds = [
        TYPES[each.dtype] if isinstance(each, torch.Tensor) else "i32" if isinstance(each, int) else "fp32"
        for each in arguments
    ]
    signature = {**dict(zip(names, kinds, strict=False)), **dict.fromkeys(options, "constexpr")}
    constants = {(names.index(name),): value for name, value in options.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    triton.compile(source, target=GPUTarget("cuda", 90, 32), options=given)
    print(kernel.fn.__name__)


def compile_all() -> None:
    from rarefy.kernels.triton import pick, step

    step.launch = pick.launch = compile_launch  # type: ignore[assignment]
    cpu = torch.device("cpu")
    tokens, positions = torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int32)
    for dtype, channels, normed in ((torch.bfloat16, 128, False), (torch.float32, 80, True)):
        gain = step.Gain(torch.ones(channels, dtype=dtype), 1e-5, step.CENTRED) if normed else None
        turns = torch.ones(64, 2, channels // 2, dtype=dtype)
        layer = step.Heads(8, 2, channels, 0.1, turns, 50 if normed else None, 3.0 if normed else None, gain, gain)
        q, k, v = (torch.ones(2, heads * channels, dtype=dtype) for heads in (8, 2, 2))
        keys = torch.ones(2, 2, 64, channels, dtype=dtype)
        step.Attention(2, 8, 2, channels, cpu)(q, k, v, keys, keys, positions, layer)
        x, own = torch.ones(2, 576, dtype=dtype), step.Gain(torch.ones(576, dtype=dtype), 1e-5, step.PLAIN)
        step.embed(tokens, x, 2.0)
        step.add_norm(x, own, x.clone(), own)
        for activation in step.ACTIVATIONS:
            step.gated(x, x, activation)  # type: ignore[arg-type]
        choose = pick.Picker(2, 5000, 8, cpu)
        for some in (False, True):
            choose(torch.ones(2, 5000, dtype=dtype), tokens, positions, draw=some, top_k=some, top_p=some)


@pytest.mark.slow
def test_every_kernel_of_a_step_compiles() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert set(done.stdout.split()) == {"_attend", "_embed", "_add_norm", "_gate", "_weigh", "_narrow", "_pick"}


if __name__ == "__main__":
    compile_all()
