"""What the accuracy benchmarks measure: a name for tables, a recipe, and its options.

Names say the recipe and where its numbers lie: ``int4 g128 Z`` is 4-bit integers in groups of 128 with an integer
zero point, ``F`` a float zero point (the range runs from minimum to maximum), ``50%`` a share of zeros, ``2:4`` two
zeros among any four. Plans stand in the order in which they are worth having when time runs out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from rarefy.calibration.calibrated import needed
from rarefy.recipes import load_recipe


@dataclass(frozen=True)
class Plan:
    """``job``: the row's name; ``recipe`` and ``options`` as ``rarefy.compress`` takes them."""

    job: str
    recipe: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def calibrates(self) -> bool:
        """Whether the recipe needs data. Raises RecipeError when it does not know an option."""
        return bool(needed(load_recipe(self.recipe, self.options)))


def integers(recipe: str, bits: int, group: int, zero: str = "Z", note: str = "", **options: Any) -> Plan:
    """``recipe`` on evenly spaced integers."""
    point = {"Z": {}, "F": {"zero_point": "float"}}[zero]
    job = f"{recipe} int{bits} g{group} {zero}{note and ' '}{note}"
    return Plan(job, recipe, {"num_bits": bits, "group_size": group, **point, **options})


def pruned(recipe: str, pattern: str, bits: int | None = None) -> Plan:
    """``recipe`` to half of the weights, alone or with the other half in integers."""
    shape: dict[str, Any] = {"sparsity": 0.5} if pattern == "50%" else {"n": 2, "m": 4}
    job = f"{recipe} {pattern}" + (f" int{bits} g128 Z" if bits else "")
    return Plan(job, recipe, {**shape, **({"num_bits": bits, "group_size": 128} if bits else {})})


def as_published(job: str, **options: Any) -> Plan:
    """spqr with the second level of its paper: 3 bits, and the codes nearest to what the whole range asks for."""
    return Plan(f"{job} as published", "spqr", {"scale_bits": 3, "zero_bits": 3, "clip": "none", **options})


# The table of calibrated recipes: equal grids side by side, the ladder from rounding to outliers, sparsity.
RECIPES = [
    *(integers(recipe, bits, 128) for bits in (3, 4) for recipe in ("rtn", "gptq", "awq")),
    Plan("spqr int3", "spqr", {"num_bits": 3}),
    Plan("spqr int3 3.95 bits", "spqr", {"num_bits": 3, "target_bits": 3.95}),
    Plan("spqr int4", "spqr", {"num_bits": 4}),
    Plan("spqr int4 5 bits", "spqr", {"num_bits": 4, "target_bits": 5.0}),
    integers("rtn", 3, 16),
    integers("gptq", 3, 16),
    integers("gptq", 3, 16, "F", "bilevel", scales="bilevel"),
    Plan("spqr int3 no outliers", "spqr", {"num_bits": 3, "outlier_threshold": None}),
    as_published("spqr int3", num_bits=3),
    as_published("spqr int3 3.95 bits", num_bits=3, target_bits=3.95),
    as_published("spqr int3 no outliers", num_bits=3, outlier_threshold=None),
    as_published("spqr int4", num_bits=4),
    as_published("spqr int4 5 bits", num_bits=4, target_bits=5.0),
    Plan("spqr int4 32 rows", "spqr", {"num_bits": 4, "scale_rows": 32}),
    Plan("spqr int3 3.95 bits 32 rows", "spqr", {"num_bits": 3, "target_bits": 3.95, "scale_rows": 32}),
    Plan("spqr int4 5 bits 32 rows", "spqr", {"num_bits": 4, "target_bits": 5.0, "scale_rows": 32}),
    Plan("spqr int3 3-bit scales", "spqr", {"num_bits": 3, "scale_bits": 3, "zero_bits": 3}),
    integers("gptq", 3, 16, "F"),
    integers("gptq", 3, 128, note="no clip", clip="none"),
    integers("gptq", 3, 16, note="no clip", clip="none"),
    integers("gptq", 3, 128, note="file order", act_order=False),
    integers("gptq", 3, 128, note="true-sequential", true_sequential=True),
    *(pruned(recipe, pattern, bits) for bits in (None, 4) for pattern in ("50%", "2:4")
      for recipe in ("sparsegpt", "wanda")),
    *(integers(recipe, bits, group) for group in (64, 32) for bits in (3, 4) for recipe in ("rtn", "gptq", "awq")),
]  # fmt: skip


def float_code(name: str, group: int, solver: str, scales: int, **options: Any) -> Plan:
    """A float format under ``solver``, with one scale or one for each sign."""
    job = f"{'afpq' if scales == 2 else 'one scale'} {solver} {name} g{group}"
    if scales == 2:
        return Plan(job, "afpq", {"format": name, "group_size": group, "solver": solver, "solver_options": options})
    return Plan(job, solver, {"format": name, "group_size": group, **options})


def tables(bits: int, note: str = "", **options: Any) -> Plan:
    """squeeze_llm without outliers unless ``options`` ask for them."""
    shares = {"sensitive_share": 0.0, "magnitude_share": 0.0}
    return Plan(f"squeeze_llm lut{bits}{note and ' '}{note}", "squeeze_llm", {"num_bits": bits, **shares, **options})


def spared(saliency: str, bits: int = 3, note: str = "", **options: Any) -> Plan:
    """gwq with 1% of outliers by some saliency, from minimum to maximum unless ``options`` ask for a searched range."""
    what = {"num_bits": bits, "group_size": 128, "saliency": saliency, "clip": "none", **options}
    return Plan(f"gwq int{bits} g128 {saliency}{note and ' '}{note}", "gwq", what)


def groups(sparsity: float, note: str = "", bits: int = 4, **options: Any) -> Plan:
    """gqsa: integers in what stays of groups of 16."""
    what = {"sparsity": sparsity, "num_bits": bits, **options}
    return Plan(f"gqsa int{bits} {sparsity:.0%}{note and ' '}{note}", "gqsa", what)


def group_values(size: int) -> Plan:
    """gqsa: 16-bit values in half of the groups of ``size``, so that pruning alone costs quality."""
    return Plan(f"gqsa values g{size} 50%", "gqsa", {"sparsity": 0.5, "num_bits": None, "group_size": size})


PERCENT = {"sensitive_share": 0.0005, "magnitude_share": 0.004}
# Tables, outliers, two scales and groups, each beside what it has to beat at equal bits.
WEIGHT_RECIPES_I = [
    tables(3),
    tables(3, "0.45%", **PERCENT),
    tables(3, "equal", importance="equal"),
    tables(3, "8 rows", rows_per_lut=8),
    tables(3, "8 rows feedback", rows_per_lut=8, feedback=True),
    Plan("gptq int3 per row", "gptq", {"num_bits": 3, "group_size": None}),
    integers("gptq", 3, 128),
    tables(3, "feedback", feedback=True),
    tables(3, "0.45% feedback", feedback=True, **PERCENT),
    Plan("gptq lut3 per row", "gptq", {"format": "lut", "num_bits": 3}),
    *(spared(saliency) for saliency in ("gradient", "fisher", "hessian", "magnitude", "random")),
    integers("rtn", 3, 128),
    *(spared(saliency, note="feedback", feedback=True, clip="mse")
      for saliency in ("gradient", "fisher", "hessian", "magnitude")),
    spared("gradient", note="+0.25% magnitude", outlier_share=0.0075, magnitude_share=0.0025),
    spared("taylor"),
    *(spared(saliency, note="clip", clip="mse")
      for saliency in ("gradient", "taylor", "hessian", "magnitude", "random")),
    integers("rtn", 3, 128, note="clip", clip="mse"),
    *(groups(sparsity) for sparsity in (0.5, 0.4, 0.3, 0.2)),
    pruned("sparsegpt", "2:4"),
    pruned("sparsegpt", "2:4", 4),
    integers("gptq", 2, 32),
    groups(0.5, "one round", rounds=1),
    groups(0.5, "one round mean", rounds=1, saliency="mean"),
    *(groups(sparsity, f"{rows} rows", rows=rows) for rows in ("fisher", "equal") for sparsity in (0.5, 0.3)),
    groups(0.5, "16-bit scales", scales="float16"),
    *(groups(sparsity, bits=3) for sparsity in (0.22, 0.2, 0.1, 0.3)),
    *(group_values(size) for size in (16, 8, 4, 2)),
    *(float_code(name, group, solver, scales)
      for name in ("nf3", "nf4") for group in (32, 128) for solver in ("gptq", "rtn", "awq") for scales in (2, 1)),
    # The second scale costs what groups of half the size cost: these pairs are equal in bits.
    *(float_code(name, 16, solver, 1) for name in ("nf3", "nf4") for solver in ("gptq", "rtn")),
    *(float_code(name, 64, solver, scales)
      for name in ("nf3", "nf4") for solver in ("gptq", "rtn") for scales in (2, 1)),
    *(float_code("fp4", 32, solver, scales) for solver in ("gptq", "rtn") for scales in (2, 1)),
    *(integers(solver, bits, 32) for bits in (3, 4) for solver in ("gptq", "rtn", "awq")),
    tables(4),
    tables(4, "0.45%", **PERCENT),
    Plan("gptq int4 per row", "gptq", {"num_bits": 4, "group_size": None}),
    integers("gptq", 4, 128),
    *(spared(saliency, 4) for saliency in ("gradient", "magnitude", "random")),
    integers("rtn", 4, 128),
]  # fmt: skip

# Grids under plain rounding.
GRIDS = [
    integers("rtn", 8, 128),
    integers("rtn", 6, 128),
    integers("rtn", 5, 128),
    integers("rtn", 4, 32, "F"),
    integers("rtn", 4, 128, note="clip", clip="mse"),
    Plan("rtn int4 g128 symmetric", "rtn", {"num_bits": 4, "symmetric": True}),
    Plan("rtn nf4 g64", "rtn", {"format": "nf4", "group_size": 64}),
    Plan("rtn nf4 g64 two scales", "rtn", {"format": "nf4", "group_size": 64, "two_scales": True}),
    Plan("rtn fp4 g64", "rtn", {"format": "fp4", "group_size": 64}),
    Plan("rtn lut4 per row", "rtn", {"format": "lut", "num_bits": 4}),
    integers("rtn", 3, 128, note="clip", clip="mse"),
    integers("rtn", 3, 16, "F", "bilevel", scales="bilevel"),
    Plan("rtn nf3 g64", "rtn", {"format": "nf3", "group_size": 64}),
    Plan("rtn lut3 per row", "rtn", {"format": "lut", "num_bits": 3}),
    integers("rtn", 2, 64, note="clip", clip="mse"),
    Plan("rtn ternary g64", "rtn", {"format": "ternary", "group_size": 64}),
]

QUICK = [integers(recipe, bits, 128) for bits in (4, 3) for recipe in ("rtn", "gptq")]


def chosen(plans: list[Plan], only: str | None) -> list[Plan]:
    """The plans whose job the regular expression ``only`` finds; all without one."""
    found = [plan for plan in plans if only is None or re.search(only, plan.job)]
    if not found:
        raise SystemExit(f"No plan matches '{only}'; known: {', '.join(plan.job for plan in plans)}.")
    return found
