"""How fast the tensor cores of a GPU (compute capability 9.0) multiply numbers of 16, 8 and 1 bits.

The rate of bits decides whether products of bit planes (a weight of p bits times an activation of q bits takes p q of
them) can win against those of bytes. ``microseconds``: of `ROUNDS` times four products of 64 x 256 in two blocks of
each processor; ``ratio``: the rate of multiplications over that of bf16.
"""

from __future__ import annotations

import ctypes
import statistics
from pathlib import Path

import torch
from harness import Row, arguments, write

from rarefy.kernels.cuda import driver

KEY = ("job",)
KINDS = {"bf16": 16, "E4M3": 32, "int8": 32, "bits": 256}  # as rates.cu knows them: columns of a product
ROUNDS, REPEATED = 2000, 9


class Arguments(ctypes.Structure):
    """``Arguments`` of the source."""

    _fields_ = [("out", ctypes.c_void_p), ("rounds", ctypes.c_int)]


def milliseconds(kind: int) -> float:
    """Median time of a launch."""
    kernel = driver.Kernel(Path(__file__).with_name("rates.cu"), "rarefy_rate", [f"-DKIND={kind}"], 0)
    blocks = 2 * torch.cuda.get_device_properties(0).multi_processor_count
    out, stream = torch.empty(blocks, 128, dtype=torch.int32, device="cuda"), torch.cuda.current_stream().cuda_stream
    times = []
    for _ in range(REPEATED):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        kernel((blocks, 1, 1), 128, Arguments(out.data_ptr(), ROUNDS), stream)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[2:])


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    times = {name: milliseconds(number) for number, name in enumerate(KINDS)}
    products = 2 * torch.cuda.get_device_properties(0).multi_processor_count * ROUNDS * 4 * 64 * 256
    rates = {name: products * KINDS[name] / times[name] / 1e9 for name in KINDS}  # 10^12 a second
    rows: list[Row] = [
        {
            "job": name, "peer": "bf16", "microseconds": round(times[name] * 1e3, 1),
            "ratio": round(rates[name] / rates["bf16"], 3), "tera_products": round(rates[name], 1),
        }
        for name in KINDS
    ]  # fmt: skip
    for row in rows:
        print(row, flush=True)
    write(options, rows, KEY)


if __name__ == "__main__":
    main()
