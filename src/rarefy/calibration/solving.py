"""From a group of layers and what is known of them to terms and a record of the work, on one rank or several."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from rarefy.calibration.capture import Group, unseen_inputs
from rarefy.calibration.fold import InputScales, scaled_terms
from rarefy.calibration.gradients import KINDS, GradientFiles
from rarefy.calibration.journal import Solved
from rarefy.calibration.parallel import Ranks
from rarefy.calibration.report import LayerReport
from rarefy.calibration.stored import build_terms, describe_terms, term_tensors
from rarefy.calibration.weights import Overlay
from rarefy.contracts import Layer, Rule, Schedule, Solution, WeightRecipe
from rarefy.core.devices import fast_dtype
from rarefy.core.errors import FormatError, RecipeError
from rarefy.core.progress import Advance
from rarefy.formats.bytes import total
from rarefy.formats.terms import Term
from rarefy.layers.swap import Site

Install = Callable[[Site, Sequence[Term]], None]


class Solver:
    """Hands layers to their recipes. ``weights`` holds what earlier steps changed, ``scales`` what they divided by."""

    def __init__(self, rules: Mapping[str, Rule], weights: Overlay, device: torch.device, ranks: Ranks, seed: int):
        self.rules, self.weights, self.device, self.ranks, self.seed = rules, weights, device, ranks, seed
        self.recipes: dict[int, WeightRecipe] = {id(rule): rule.recipe() for rule in rules.values()}
        self.scales = InputScales(ranks.tell)
        self.gradients: GradientFiles | None = None
        self.held: Mapping[str, Tensor] = {}  # weights that are on the device anyway, as they are stored

    def recipe(self, site: Site) -> WeightRecipe:
        return self.recipes[id(self.rules[site.name])]

    def schedule(self, site: Site) -> Schedule:
        return self.recipe(site).schedule()

    def layer(self, site: Site, group: Group) -> Layer:
        """The layer's weight in float32 on the device, as scaled so far, with what is known of it."""
        changed = site.parameter in self.weights.changed
        held = None if changed else self.held.get(site.parameter)
        stored = self.weights.read(site.parameter) if held is None else held
        weight = stored.to(device=self.device, dtype=torch.float32)
        weight = weight.T.contiguous() if site.kind == "conv1d" else weight
        factor = self.scales.factors.get(site.name)
        weight = weight if factor is None else weight * factor
        statistics = group.statistics()
        if self.gradients is not None:
            statistics = self.gradients.add_to(statistics, site, self.recipe(site).needs, self.device)
        return Layer(site.name, weight, statistics)

    def solve(
        self, groups: Sequence[Group], advance: Advance, install: Install | None
    ) -> dict[str, Solved]:
        """Solve each group on one rank and bring all solutions to all ranks, and by ``install`` into the model.

        Statistics are freed as they are used up: they are the largest part of a job's memory.
        """
        owners = self.ranks.share([_cost(group) for group in groups])
        mine: dict[str, Solved] = {}
        for group, owner in zip(groups, owners, strict=True):
            if owner == self.ranks.rank:
                mine.update(self._group(group))
                for site in group.sites:
                    advance(note=_note(mine[site.name][1]))
            group.inputs = {}
        solved: dict[str, Solved] = {}
        for group, owner in zip(groups, owners, strict=True):
            for site in group.sites:
                solved[site.name] = self.exchange(mine.get(site.name), owner)
                if owner != self.ranks.rank:
                    advance(note=_note(solved[site.name][1]))
                if install is not None:
                    install(site, solved[site.name][0])
        return solved

    def _group(self, group: Group) -> dict[str, Solved]:
        solved: dict[str, Solved] = {}
        for site in group.sites if not group.inputs else ():
            # Inputs were wanted, but none came: made here and not before, since of many experts few may be seen.
            group.inputs.update(unseen_inputs(site, self.recipe(site).needs, self.device))
        for recipe in {id(self.recipe(site)): self.recipe(site) for site in group.sites}.values():
            sites = [site for site in group.sites if self.recipe(site) is recipe]
            start = time.monotonic()
            layers = [self.layer(site, group) for site in sites]
            # A seed of its own: whether blocks before it were solved in this process must not matter.
            torch.manual_seed(self.seed ^ zlib.crc32(sites[0].name.encode()))
            solutions = _ask(recipe, layers)
            for site, layer, solution in zip(sites, layers, solutions, strict=True):
                notes = [*_data_notes(layer), *solution.notes]
                seconds = (time.monotonic() - start) / len(sites)
                solved[site.name] = self._record(site, layer, solution.terms, notes, seconds)
        return solved

    def _record(self, site: Site, layer: Layer, terms: list[Term], notes: list[str], seconds: float) -> Solved:
        difference = layer.weight - decoded(terms)
        lost, norm = output_error(layer, difference), float(layer.weight.norm())
        relative = float(difference.norm()) / norm if norm else 0.0
        if (factor := self.scales.explicit(site)) is not None:
            terms = scaled_terms(terms, factor)
        count = total([term.byte_count() for term in terms])
        report = LayerReport(
            name=site.name, method=self.rules[site.name].method, shape=site.shape,
            bits_per_weight=count.total * 8 / max(1, site.count), relative_error=relative, output_error=lost,
            seconds=seconds, notes=tuple(notes),
        )  # fmt: skip
        return terms, report

    def exchange(self, own: Solved | None, owner: int) -> Solved:
        """A solution that ``owner`` has, at every rank."""
        if self.ranks.size == 1:
            assert own is not None
            return own
        data: dict[str, Tensor] = {} if own is None else term_tensors(own[0])
        about = "" if own is None else f"{describe_terms(own[0])}\n{own[1].model_dump_json()}"
        data, about = self.ranks.spread(data, about, owner)
        description, _, report = about.partition("\n")
        return build_terms(description, data), LayerReport.model_validate_json(report)


def decoded(terms: Sequence[Term]) -> Tensor:
    """The dense weight that ``terms`` stand for, float32."""
    dense = terms[0].decode()
    for term in terms[1:]:
        dense = dense + term.decode()
    return dense


def output_error(layer: Layer, difference: Tensor) -> float | None:
    """``|difference X| / |W X|`` over the calibration data, from the Gram matrix; None without one."""
    gram = layer.statistics.gram
    if gram is None or bool(gram.unseen().all()):
        return None
    moments = gram.sum if gram.members is None else gram.sum * ~gram.unseen()[:, None, None]
    lost, whole = ((_product(w, moments) * w).sum(dtype=torch.float64) for w in (difference, layer.weight))
    return float((lost / whole).clamp(min=0).sqrt()) if float(whole) > 0 else 0.0


def _product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right``, float32. On a GPU, whose tensor cores know no float32, matrices are sums of two of 16 bits,
    and of their products the smallest is left out: a relative error of some 2^-16."""
    if not left.is_cuda or left.dim() > 2 or fast_dtype(left.device) != torch.bfloat16:
        return left @ right
    (a, b), (c, d) = map(_halves, (left, right))
    whole, *others = (torch.mm(x, y, out_dtype=torch.float32) for x, y in ((a, c), (a, d), (b, c)))
    return whole.add_(others[0].add_(others[1]))


def _halves(matrix: Tensor) -> tuple[Tensor, Tensor]:
    high = matrix.bfloat16()
    return high, (matrix - high).bfloat16()


def _data_notes(layer: Layer) -> list[str]:
    """What the calibration data lacked for this layer."""
    notes = []
    unseen = layer.statistics.unseen()
    if unseen is not None and unseen.dim():
        experts = unseen.nonzero().flatten().tolist()
        listed = ", ".join(map(str, experts))
        notes += [f"no calibration data reached expert {listed}; solved without"] if experts else []
    elif unseen is not None and bool(unseen):
        notes.append("no calibration data reached it; solved without")
    for kind in KINDS:
        statistic = getattr(layer.statistics, kind)
        if statistic is not None and int(statistic.skipped):
            total = int(statistic.skipped + statistic.sequences)
            notes.append(f"{int(statistic.skipped)} of {total} sequences had no finite gradient and were left out")
    return list(dict.fromkeys(notes))


def _ask(recipe: WeightRecipe, layers: list[Layer]) -> list[Solution]:
    for layer in layers:
        if not bool(torch.isfinite(layer.weight).all()):
            raise RecipeError(f"Layer '{layer.name}': The weight holds NaN or infinite values; repair or ignore it.")
    try:
        return recipe.solve_group(layers)
    except FormatError as failure:
        raise RecipeError(f"Layer '{layers[0].name}': {failure}") from None


def _cost(group: Group) -> float:
    """Work of solving a group: one factorization of its inputs, and a pass over all columns for all rows."""
    columns, rows = group.sites[0].shape[-1], sum(site.shape[-2] for site in group.sites)
    return float(group.sites[0].members * (columns**3 + rows * columns**2))


def _note(report: LayerReport) -> str:
    if report.output_error is None:
        return f"{report.name} error {report.relative_error:.4f}"
    return f"{report.name} output error {report.output_error:.4f}"
