"""Tables of speed: single layers and whole models, on CPUs and GPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tables_shared import DEMO, UNMEASURED, measured_on, results


def cpu_decode_table() -> str:
    """Decoding beside peers, one table per device and model."""
    parts = []
    for data in results("*/cpu_decode.json"):
        for random in (False, True):
            rows = [row for row in data["rows"] if row["quality"].startswith("random weights") == random]
            if not rows:
                continue
            head = ("goal", "job", "peer", "bits", "peer's bits", "peer's time / ours", "of streaming read", "measured")
            lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
            for row in rows:
                bits, theirs = (
                    "-" if row.get(name) is None else f"{row[name]:.2f}"
                    for name in ("bits_per_weight", "peer_bits_per_weight")
                )
                share = "-" if row.get("fraction_of_limit") is None else f"{row['fraction_of_limit']:.0%}"
                where = f"{row['goal']} | {row['job']} | {row['peer']} | {bits} | {theirs}"
                lines.append(f"| {where} | {row['ratio']:.2f} | {share} | {row['note']} |")
            model = "Llamas with random weights" if random else f"{DEMO}; {rows[0]['quality']}"
            facts = f"{model}; bits of all weights that a token reads, head included; {rows[0]['load']}."
            measured = measured_on({**data, "rows": rows})
            parts.append("\n".join([*lines, "", f"{facts} All in one process and in turns; {measured}"]))
    return "\n\n".join(parts) or UNMEASURED


def cpu_layer_table() -> str:
    """Single layers for one token beside peers, one table for each device, shape, instruction set and executor."""
    parts = []
    for data in results("*/cpu_gemv.json"):
        kinds: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
        for row in data["rows"]:
            if row["tokens"] == 1 and row["threads"] == 1:
                kind = tuple(row[name] for name in ("shape", "instructions", "executor"))
                kinds.setdefault(kind, {}).setdefault(row["job"], {})[row["peer"]] = row
        for (shape, instructions, executor), jobs in kinds.items():
            known = {peer: None for rows in jobs.values() for peer in rows}
            peers = [peer for peer in known if peer != "streaming read" and not peer.startswith("own ")]
            head = ("weight", "bits", "us", "of streaming read", *peers, "own")
            lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
            for job, rows in jobs.items():
                row = next(iter(rows.values()))
                ratios = [f"{rows[peer]['ratio']:.2f}" if peer in rows else "-" for peer in peers]
                own = [f"{found['ratio']:.2f} of {name[4:]}" for name, found in rows.items() if name.startswith("own ")]
                cells = [job, f"{row['bits_per_weight']:.2f}", f"{row['microseconds']:.0f}"]
                cells += [f"{row['fraction_of_limit']:.0%}", *ratios, *(own or ["-"])]
                lines.append(f"| {' | '.join(cells)} |")
            measured = measured_on({**data, "rows": [row for rows in jobs.values() for row in rows.values()]})
            facts = f"{shape}, one token, one thread, {instructions}, `{executor}`; peers: their time / ours."
            parts.append("\n".join([*lines, "", f"{facts} {measured}"]))
    return "\n\n".join(parts) or UNMEASURED


def gpu_decode_table() -> str:
    """Whole-model decoding on GPUs, one table for each device: a line for each kind and number of sequences."""
    parts = []
    for data in results("*/gpu_decode.json"):
        lines = ["| weights | bits | sequences | tokens/s | of the byte limit | as fast as |", "|---" * 6 + "|"]
        kinds: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for row in data["rows"]:
            kinds.setdefault((row["job"], row["batch"]), []).append(row)
        for (job, batch), rows in kinds.items():
            peers = {row["peer"]: row["ratio"] for row in rows if row["peer"] != job}
            told = ", ".join(f"{ratio:.2f}x {PEERS.get(peer, peer)}" for peer, ratio in peers.items())
            first = rows[0]
            speed = f"{first['tokens_per_second']:,.0f} | {first['fraction_of_limit']:.2f}"
            lines.append(f"| {job} | {first['bits_per_weight']:.2f} | {batch} | {speed} | {told or '-'} |")
        parts.append("\n".join([*lines, "", f"{data['rows'][0]['note']}; {measured_on(data)}"]))
    return "\n\n".join(parts) or UNMEASURED


def step_table() -> str:
    """What a decoding step's time goes to, one table for each device, kind of weights and number of sequences."""
    parts = []
    for data in results("*/gpu_step.json"):
        steps: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for row in data["rows"]:
            steps.setdefault((row["job"], row["batch"]), []).append(row)
        for (job, batch), rows in steps.items():
            lines = ["| launches | what | us | share | us of their bytes |", "|---" * 5 + "|"]
            for row in sorted(rows, key=lambda row: -row["microseconds"]):
                nbytes = f"{row['microseconds_of_bytes']:.0f}" if row["microseconds_of_bytes"] else "-"
                where = f"{row['launches']} | {row['phase']} | {row['microseconds']:.0f} | {row['share']:.0%}"
                lines.append(f"| {where} | {nbytes} |")
            facts = f"{job}, batch {batch}; {rows[0]['note']}; {measured_on({**data, 'rows': rows})}"
            parts.append("\n".join([*lines, "", facts]))
    return "\n\n".join(parts) or UNMEASURED


def linear_table() -> str:
    """Single layers in code on GPUs, one table for each device."""
    parts = []
    for data in results("*/gpu_linear.json"):
        names = ("weights", "shape", "tokens", "us", "of the limit", "times bf16", "times the best peer")
        lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
        for row in sorted(data["rows"], key=lambda row: (row["rows"], row["columns"], row["job"], row["tokens"])):
            lines.append(
                f"| {row['job']} | {row['rows']}x{row['columns']} | {row['tokens']} | {row['microseconds']:.1f} | "
                f"{row['fraction_of_limit']:.2f} | {row.get('ratio_to_bf16', '-')} | {row['ratio']} ({row['peer']}) |"
            )
        parts.append("\n".join([*lines, "", measured_on(data)]))
    return "\n\n".join(parts) or UNMEASURED


def rates_table() -> str:
    """How fast tensor cores multiply, one table for each device."""
    parts = []
    for data in results("*/gpu_rates.json"):
        lines = ["| numbers | products a second | times bf16 |", "|---" * 3 + "|"]
        for row in data["rows"]:
            lines.append(f"| {row['job']} | {row['tera_products']:.0f} x 10^12 | {row['ratio']:.2f} |")
        parts.append("\n".join([*lines, "", measured_on(data)]))
    return "\n\n".join(parts) or UNMEASURED


# What README shows: file, which rows, and what they are in words.
SHOWN: list[tuple[str, dict[str, Any], str]] = [
    ("cpu_decode", {"job": "decode after 128", "peer": "demo-q4_0"}, "SmolLM2 decoding, one CPU thread, 4.4 bits"),
    ("cpu_decode", {"job": "decode after 128", "peer": "torch float32"}, "SmolLM2 decoding, one CPU thread, 4.4 bits"),
    ("gpu_decode", {"job": "W4 g128", "batch": 1}, "8B shape decoding, one sequence, 4-bit weights and head"),
    ("gpu_decode", {"job": "W4 g128", "batch": 32}, "8B shape decoding, 32 sequences, 4-bit weights and head"),
    ("gpu_kv_decode", {"job": "decode attention, uniform 4 bit by token", "tokens": 1 << 17},
     "attention of a token over 131,072 in 4 bits"),
    ("gpu_attention", {"job": "plan, pooled means", "tokens": 1 << 17, "goal": "prefill"},
     "prefill attention of 131,072 tokens, a tenth of the blocks, estimator included"),
]  # fmt: skip
PEERS = {
    "demo-q4_0": "llama.cpp Q4_0", "torch float32": "HF eager float32", "dense flash": "torch's dense flash attention",
    "dense cudnn": "dense cuDNN", "dense fa4": "dense FlashAttention 4", "torch cudnn bf16": "cuDNN over bf16",
    "bf16, same runner": "bf16 in the same runner", "tinygemm W4, same runner": "tinygemm W4 in the same runner",
    "GemLite W4, same runner and head": "GemLite W4 in the same runner, with our head",
}  # fmt: skip


def short_table() -> str:
    """One line per job and device that ran it, with every peer."""
    lines = ["| job | on | as fast as |", "|---" * 3 + "|"]
    for words in dict.fromkeys(words for *_, words in SHOWN):
        beside: dict[str, dict[str, float]] = {}
        for name, wanted, _ in (each for each in SHOWN if each[2] == words):
            for data in results(f"*/{name}.json"):
                for row in data["rows"]:
                    if all(row.get(key) == value for key, value in wanted.items()) and row["peer"] != row["job"]:
                        beside.setdefault(data["device"], {})[PEERS.get(row["peer"], row["peer"])] = row["ratio"]
        for device, peers in beside.items():
            told = ", ".join(f"{ratio:.2f}x {peer}" for peer, ratio in sorted(peers.items(), key=lambda each: each[1]))
            lines.append(f"| {words} | {device} | {told} |")
    return "\n".join(lines) if len(lines) > 2 else UNMEASURED


TABLES: dict[str, Callable[[], str]] = {
    "speed-short": short_table,
    "cpu-decode": cpu_decode_table,
    "cpu-layer": cpu_layer_table,
    "gpu-decode": gpu_decode_table,
    "gpu-step": step_table,
    "gpu-linear": linear_table,
    "gpu-rates": rates_table,
}
