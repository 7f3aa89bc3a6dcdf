"""Who a compressed layer on the CPU is held against: torch's products, ONNX Runtime and OpenVINO with 4-bit weights.

The last two are optional; ``available`` leaves out what is not installed and says so.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], object]
# (rows, columns, x) -> bytes of the weight, and what makes one call over a random weight of its own.
Peer = Callable[[int, int, Tensor], tuple[int, Callable[[], Call]]]


def available(names: list[str] | None = None) -> dict[str, Peer]:
    """Peers by name: those named, or all, that are installed."""
    found: dict[str, Peer] = {}
    for name, (module, peer) in _PEERS.items():
        if names is not None and name not in names:
            continue
        if importlib.util.find_spec(module) is None:
            print(f"without {name}: {module} is not installed", file=sys.stderr)
            continue
        found[name] = peer
    return found


def group_of(columns: int) -> int:
    """Columns that share a scale: 128, or 64 where columns are no multiple of that."""
    return 128 if columns % 128 == 0 else 64


def _linear(dtype: torch.dtype) -> Peer:
    def peer(rows: int, columns: int, x: Tensor) -> tuple[int, Callable[[], Call]]:
        own = x.to(dtype)

        def make() -> Call:
            weight = torch.randn(rows, columns).to(dtype)
            return lambda: torch.nn.functional.linear(own, weight)

        return rows * columns * dtype.itemsize, make

    return peer


def _int4pack(rows: int, columns: int, x: Tensor) -> tuple[int, Callable[[], Call]]:
    """Torch's own 4-bit product, with activations in bfloat16, as it is fastest."""
    group, own = group_of(columns), x.bfloat16()

    def make() -> Call:
        codes = torch.randint(0, 16, (rows, columns), dtype=torch.int32)
        packed = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
        scales = torch.rand(columns // group, rows, 2).bfloat16()
        return lambda: torch._weight_int4pack_mm_for_cpu(own, packed, group, scales)

    return rows * columns // 2, make


def _onnx_runtime(rows: int, columns: int, x: Tensor) -> tuple[int, Callable[[], Call]]:
    """MatMulNBits with activations in 8 bits (accuracy level 4), as it is fastest."""
    import onnx
    import onnxruntime

    group = group_of(columns)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1

    def make() -> Call:
        codes = torch.randint(0, 256, (rows, columns // group, group // 2), dtype=torch.uint8).numpy()
        scales = torch.rand(rows * columns // group).numpy()
        node = onnx.helper.make_node(
            "MatMulNBits", ["x", "codes", "scales"], ["y"], domain="com.microsoft", K=columns, N=rows, bits=4,
            block_size=group, accuracy_level=4,
        )  # fmt: skip
        number = onnx.TensorProto.FLOAT
        graph = onnx.helper.make_graph(
            [node], "layer", [onnx.helper.make_tensor_value_info("x", number, list(x.shape))],
            [onnx.helper.make_tensor_value_info("y", number, [x.shape[0], rows])],
            [onnx.numpy_helper.from_array(codes, "codes"), onnx.numpy_helper.from_array(scales, "scales")],
        )  # fmt: skip
        versions = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
        model = onnx.helper.make_model(graph, opset_imports=versions, ir_version=10)
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        binding = session.io_binding()
        binding.bind_cpu_input("x", x.numpy())
        binding.bind_output("y")
        return lambda: session.run_with_iobinding(binding)

    return rows * columns // 2, make


def _openvino(rows: int, columns: int, x: Tensor) -> tuple[int, Callable[[], Call]]:
    """A matrix product whose weight is 4-bit codes, zero points and scales, which the CPU plugin fuses."""
    import openvino
    from openvino import opset13 as ops

    group = group_of(columns)
    core = openvino.Core()
    settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "NUM_STREAMS": 1}

    def constant(packed: Tensor, shape: list[int]) -> Any:
        return openvino.op.Constant(openvino.Tensor(packed.numpy(), shape, openvino.Type.u4))

    def make() -> Call:
        groups = columns // group
        codes = constant(torch.randint(0, 256, (rows * columns // 2,), dtype=torch.uint8), [rows, groups, group])
        zeros = constant(torch.randint(0, 256, (rows * groups // 2,), dtype=torch.uint8), [rows, groups, 1])
        scales = ops.constant(torch.rand(rows, groups, 1).half().numpy())
        centred = ops.subtract(ops.convert(codes, "f16"), ops.convert(zeros, "f16"))
        weight = ops.reshape(ops.multiply(centred, scales), ops.constant([rows, columns]), special_zero=False)
        given = ops.parameter(list(x.shape), openvino.Type.f32, name="x")
        product = ops.matmul(given, ops.convert(weight, "f32"), transpose_a=False, transpose_b=True)
        request = core.compile_model(openvino.Model([product], [given]), "CPU", settings).create_infer_request()
        request.set_input_tensor(openvino.Tensor(x.numpy(), shared_memory=True))
        return request.infer

    return rows * columns // 2, make


_PEERS: dict[str, tuple[str, Peer]] = {
    "torch int4pack": ("torch", _int4pack),
    "torch bfloat16": ("torch", _linear(torch.bfloat16)),
    "torch float32": ("torch", _linear(torch.float32)),
    "onnxruntime MatMulNBits": ("onnxruntime", _onnx_runtime),
    "openvino int4": ("openvino", _openvino),
}
