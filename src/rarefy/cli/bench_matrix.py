"""``rarefy bench --matrix``: what every model costs with every attention and cache under every load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rarefy.cli.common import print_record, print_table

if TYPE_CHECKING:
    from rarefy.evaluation.efficiency.matrix import Efficiency, Matrix, Row
    from rarefy.evaluation.forward import CacheFactory
    from rarefy.evaluation.results import Comparison


def bench_matrix(path: Path, work_dir: Path | None = None, as_json: bool = False) -> None:
    """Measure the matrix in the YAML file ``path`` and print it; ``work_dir`` keeps what is finished."""
    from rarefy.evaluation.efficiency.matrix import read_matrix

    found = _measure(read_matrix(path), work_dir)
    if as_json:
        print_record("efficiency", found.model_dump())
    else:
        print_efficiency(found)


def _measure(matrix: Matrix, work_dir: Path | None) -> Efficiency:
    import torch

    from rarefy import api
    from rarefy.core.errors import OptionError
    from rarefy.evaluation.efficiency.matrix import DENSE, run_matrix
    from rarefy.integrations.transformers.kv_evaluation import cache_factory
    from rarefy.integrations.transformers.plan_evaluation import check_plans, dense_cache, set_plan
    from rarefy.integrations.transformers.subjects import open_subjects

    if matrix.windows and matrix.reference is None:
        raise OptionError("Windows measure quality against a model; name it as 'reference', or leave 'windows' out.")
    if matrix.threads is not None:
        torch.set_num_threads(matrix.threads)
    check_plans(matrix.attention)
    subjects = open_subjects(matrix.models, None, dtype=matrix.dtype, device=matrix.device)
    caches: dict[str, CacheFactory | None] = {
        name: dense_cache if name == DENSE else cache_factory(name, subjects.tokenizer) for name in matrix.caches
    }

    def judge(model: str, cache: str, factory: CacheFactory | None, attention: str) -> Comparison:
        coded = cache != DENSE
        return api.compare(
            [model], reference=matrix.reference, data=matrix.data, context=matrix.context, windows=matrix.windows,
            dtype=matrix.dtype, device=matrix.device, cache=factory if coded else None, chunk=64 if coded else None,
            attention=() if attention == DENSE else (attention,),
        )  # fmt: skip

    return run_matrix(
        matrix, subjects.candidates, caches, subjects.device, attend=set_plan, judge=judge, work_dir=work_dir
    )


def print_efficiency(found: Efficiency) -> None:
    """A row for each combination, then the roof and what was measured how."""
    headings = (
        "model", "attention", "cache", "batch x tokens", "first ms", "token ms", "p95", "tokens/s", "peak GB",
        "memory", "compute", "roofline", "J/token", "smaller", "perplexity",
    )  # fmt: skip
    print_table(headings, [_cells(row) for row in found.rows])
    roof, first = found.roof, found.rows[0].cost
    print(
        f"roof: {roof.bytes_per_second / 1e9:.1f} GB/s, {roof.flops_per_second / 1e9:.0f} GFLOP/s in {roof.dtype}; "
        f"{first.threads} threads, {first.device}, {first.dtype}; memory, compute: shares of what there is; roofline: "
        "share that a decoding step reaches; smaller: times"
    )
    sources = {row.cost.energy.source for row in found.rows if row.cost.energy is not None}
    print(f"energy: {', '.join(sorted(sources)) or 'no counter can be read here; give watts for a model of it'}")
    if found.protocol is not None:
        print(f"perplexity: {found.protocol}")


def _cells(row: Row) -> tuple[str, ...]:
    cost, load = row.cost, row.cost.load
    size = f"{load.batch} x {load.prompt_tokens}+{load.new_tokens}"
    return (
        row.model, row.attention, row.cache, size, f"{1e3 * cost.first_token.p50:.1f}", f"{1e3 * cost.token.p50:.1f}",
        f"{1e3 * cost.token.p95:.1f}", f"{cost.new_tokens_per_second:.1f}", f"{cost.memory.peak_bytes / 1e9:.2f}",
        _share(cost.memory.utilization), _share(cost.compute_utilization), _share(cost.decode_roofline),
        "-" if cost.joules_per_token is None else f"{cost.joules_per_token:.3g}",
        "-" if row.compression_ratio is None else f"{row.compression_ratio:.2f}",
        "-" if row.perplexity is None else f"{row.perplexity:.3f}",
    )  # fmt: skip


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
