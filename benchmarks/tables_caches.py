"""Tables of KV caches in code: quality, and the speed of attention over them."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

from tables_shared import LAB, UNMEASURED, Rows, measured_on, results

SHOWN_TOKENS = (8192, 131072, 1048576)


def cache_table(model: str, only: str = "") -> str:
    """KV caches of a model whose names match, one table for each device, regime and context."""
    parts = []
    for data in results("*/kv_accuracy.json"):
        own = [row for row in data["rows"] if row["model"] == model and re.search(only, row["cache"])]
        own = [row for row in own if row["goal"] == "KV"]
        for protocol in dict.fromkeys(row["protocol"] for row in own):
            rows = [row for row in own if row["protocol"] == protocol]
            lines = ["| cache | bits | nats above dense | 95% interval | KL | top-1 |", "|---|---|---|---|---|---|"]
            for row in sorted(rows, key=lambda row: -row["bits_per_weight"]):
                lines.append(
                    f"| {row['cache']} | {row['bits_per_weight']:.3f} | {row['gap']:+.4f} | "
                    f"{row['gap_low']:+.4f} .. {row['gap_high']:+.4f} | {row['kl']:.4f} | {row['top1_agreement']:.1%} |"
                )
            facts = f"{model}, {protocol}, {rows[0]['tokens']} predicted tokens, dense {rows[0]['dense_nll']:.4f} nats;"
            parts.append("\n".join([*lines, "", f"{facts} {measured_on({**data, 'rows': rows})}"]))
    return "\n\n".join(parts) or UNMEASURED


def paired_table() -> str:
    """Caches against another one on the same windows, one table for each device and protocol."""
    parts = []
    for data in results("*/kv_accuracy.json"):
        own = [row for row in data["rows"] if row["goal"] == "KV paired"]
        for model, protocol in dict.fromkeys((row["model"], row["protocol"]) for row in own):
            rows = [row for row in own if (row["model"], row["protocol"]) == (model, protocol)]
            lines = ["| cache | bits | against | bits | nats more than that | 95% interval |", "|---" * 6 + "|"]
            for row in rows:
                lines.append(
                    f"| {row['cache']} | {row['bits_per_weight']:.3f} | {row['versus']} | {row['versus_bits']:.3f} | "
                    f"{row['gap']:+.4f} | {row['gap_low']:+.4f} .. {row['gap_high']:+.4f} |"
                )
            facts = f"{model}, {protocol}, {rows[0]['tokens']} predicted tokens;"
            parts.append("\n".join([*lines, "", f"{facts} {measured_on({**data, 'rows': rows})}"]))
    return "\n\n".join(parts) or UNMEASURED


def decode_table() -> str:
    """Attention of one token over coded caches, one table for each device; every other length is in the results."""
    parts = []
    for data in results("*/gpu_kv_decode.json"):
        lines = ["| cache | tokens | bits | us | times torch bf16 | times fp8 | of the byte limit |", "|---" * 7 + "|"]
        for row in [row for row in data["rows"] if row["tokens"] in SHOWN_TOKENS]:
            lines.append(
                f"| {row['job'].removeprefix('decode attention, ')} | {row['tokens']:,} | "
                f"{row['bits_per_weight']:.2f} | {row['microseconds']:.0f} | {row['ratio']:.2f} | "
                f"{row['ratio_to_fp8']:.2f} | {row['fraction_of_limit']:.2f} |"
            )
        parts.append("\n".join([*lines, "", measured_on(data)]))
    return "\n\n".join(parts) or UNMEASURED


def stack_table() -> str:
    """Stores of the recipes in a stack of layers, one table for each device and goal."""
    parts = []
    for data in results("*/gpu_kv_stack.json"):
        for goal, build in (("KV stack", _stack_lines), ("KV prefill", _prefill_lines), ("KV longest", _longest_lines),
                            ("KV encode", _encode_lines)):  # fmt: skip
            rows = [row for row in data["rows"] if row["goal"] == goal]
            if rows:
                facts = "; ".join(dict.fromkeys(row["note"] for row in rows))
                parts.append("\n".join([*build(rows), "", f"{facts}; {measured_on({**data, 'rows': rows})}"]))
    return "\n\n".join(parts) or UNMEASURED


def model_table() -> str:
    """Whole steps of a model over coded caches, one table for each device."""
    parts = []
    for data in results("*/gpu_kv_model.json"):
        lines = ["| cache | tokens | bits | ms a token | tokens/s | times bf16 | cache | all memory | of a step |"]
        lines.append("|---" * 9 + "|")
        for row in data["rows"]:
            sizes = f"{row['cache_bytes'] / 1e9:.2f} GB | {row['total_bytes'] / 1e9:.1f} GB"
            lines.append(
                f"| {row['job']} | {row['tokens']:,} | {row['bits_per_weight']:.2f} | "
                f"{row['microseconds'] / 1e3:.2f} | {row['tokens_per_second']:.0f} | {row['ratio']:.2f} | {sizes} | "
                f"{row['step_bytes'] / 1e6:.1f} MB |"
            )
        facts = f"a layer's past in bf16 is {data['rows'][0]['layer_bytes'] / 1e6:.0f} MB"
        parts.append("\n".join([*lines, "", f"{facts}; {measured_on(data)}"]))
    return "\n\n".join(parts) or UNMEASURED


def _stack_lines(rows: Rows) -> list[str]:
    lines = ["| cache | tokens | bits | us a layer | times torch bf16 | tokens/s of 32 layers | a step allocates |"]
    lines.append("|---" * 7 + "|")
    for row in rows:
        lines.append(
            f"| {row['job']} | {row['tokens']:,} | {row['bits_per_weight']:.2f} | {row['microseconds']:.0f} | "
            f"{row['ratio']:.2f} | {row['tokens_per_second']:.0f} | {row['peak_bytes'] / 1e6:.1f} MB |"
        )
    return lines


def _prefill_lines(rows: Rows) -> list[str]:
    lines = ["| cache | tokens | ms that a chunk's layer takes | ms that encoding adds | share | ms of the host |"]
    lines.append("|---" * 6 + "|")
    for row in rows:
        times = f"{row['peer_milliseconds']:.2f} | {row['milliseconds']:.3f}"
        share = f"{row['milliseconds'] / row['peer_milliseconds']:.1%}"
        lines.append(f"| {row['job']} | {row['tokens']:,} | {times} | {share} | {row['host_milliseconds']:.2f} |")
    return lines


def _encode_lines(rows: Rows) -> list[str]:
    lines = ["| codes | bits | us of one launch | us of torch's operations | share of stored numbers that differ |"]
    lines.append("|---" * 5 + "|")
    for row in rows:
        times = f"{row['microseconds']:.1f} | {row['peer_microseconds']:,.0f}"
        lines.append(f"| {row['job']} | {row['bits_per_weight']:.2f} | {times} | {row['max_rel_error']:.0%} |")
    return lines


def _longest_lines(rows: Rows) -> list[str]:
    lines = ["| cache | tokens | bits | size | ms a token | TB/s |", "|---" * 6 + "|"]
    for row in rows:
        size, took = row["cache_bytes"] / 1e9, row["milliseconds"]
        lines.append(
            f"| {row['job']} | {row['tokens']:,} | {row['bits_per_weight']:.2f} | {size:.1f} GB | {took:.1f} | "
            f"{size / took:.2f} |"
        )
    return lines


def kv_cpu_table() -> str:
    """Attention of one token over coded caches on processors, one table for each device."""
    parts = []
    for data in results("*/cpu_kv_decode.json"):
        lines = ["| cache | tokens | threads | bits | us | times float16 | times torch bf16 |", "|---" * 7 + "|"]
        for row in data["rows"]:
            lines.append(
                f"| {row['job'].removeprefix('decode attention, ')} | {row['tokens']:,} | {row['threads']} | "
                f"{row['bits_per_weight']:.2f} | {row['microseconds']:.0f} | {row['ratio']:.2f} | "
                f"{row['ratio_to_torch']:.1f} |"
            )
        facts = "; ".join(dict.fromkeys(row["note"] for row in data["rows"]))
        parts.append("\n".join([*lines, "", f"{facts}; {measured_on(data)}"]))
    return "\n\n".join(parts) or UNMEASURED


TABLES: dict[str, Callable[[], str]] = {
    "kv-demo": partial(cache_table, "SmolLM2-135M-Instruct"),
    "kv-lab": partial(cache_table, LAB),
    "kv-paired": paired_table,
    "kv-decode": decode_table,
    "kv-model": model_table,
    "kv-stack": stack_table,
    "kv-cpu": kv_cpu_table,
}
