"""Dividing a layer's input by a factor per channel, inside whatever produces that input.

Which parameter produces it is found by trial, not by name: scale a candidate, run the block, and see whether the
input follows and the block's output stays. A factor without such a producer is stored as an input scale.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rarefy.calibration.blocks import parameter_of
from rarefy.calibration.capture import Group, first_input
from rarefy.calibration.weights import Overlay
from rarefy.core.errors import RecipeError
from rarefy.formats.inputs import RawInput, ScaledInput
from rarefy.formats.terms import Term
from rarefy.layers.swap import Site, is_conv1d
from rarefy.statistics import ColumnMoments, Gram, InputStatistic

# Relative error up to which a trial counts as equal. Trial factors are powers of two, which round nowhere but in norms
# that multiply by ``1 + weight``; a wrong candidate is off by tens of percent.
TOLERANCE = 0.01
TRIAL_EXPONENTS = 5


class Producer(NamedTuple):
    """``parameter[start : start + n]`` (rows of a linear layer, channels of a norm) makes the input's channels.

    ``offset``: 1 for norms that multiply by ``1 + weight``.
    """

    module: str
    start: int
    offset: float


class InputScales:
    """Folds factors into producers, block by block; the same place is tried first in the next block.

    ``producers``: the places found so far, by the layer's name within a block; None where there is none. ``agree``
    makes one rank's answer everybody's.
    """

    def __init__(self, agree: Callable[[str], str] = str) -> None:
        self.factors: dict[str, Tensor] = {}  # site -> the factor its weight is multiplied by
        self.producers: dict[str, Producer | None] = {}
        self._explicit: set[str] = set()  # sites whose stored input scale divides by the factor
        self._agree = agree

    def clear(self) -> None:
        """Forget one block's factors."""
        self.factors.clear()
        self._explicit.clear()

    def explicit(self, site: Site) -> Tensor | None:
        """The factor by which the site's stored input scale has to divide, if nothing before it does."""
        return self.factors[site.name] if site.name in self._explicit else None

    def fold(
        self,
        block: nn.Module,
        prefix: str,
        group: Group,
        factor: Tensor,
        weights: Overlay,
        probe: Callable[[], Tensor],
    ) -> None:
        """Multiply the weights of ``group`` by ``factor [in]`` and divide their input, and what is known of it, by it.

        ``probe`` runs the block on some data and returns its output. ``weights`` gets the producer's new tensors.
        Raises RecipeError when ``factor`` is not one positive number per input column.
        """
        names = [site.name for site in group.sites]
        width = group.sites[0].shape[-1]
        if factor.shape != (width,) or not bool((factor > 0).all() and torch.isfinite(factor).all()):
            raise RecipeError(
                f"Layer '{names[0]}': its recipe's input_scale is not {width} positive finite numbers; mend the recipe."
            )
        self.factors.update(dict.fromkeys(names, factor))
        producer = self._find(block, prefix, group, width, probe)
        if producer is None:
            self._explicit.update(names)
        else:
            _scale_consumers(block, prefix, group.sites, factor)
            _apply(block, producer, 1 / factor, prefix, weights)
        group.inputs = scaled_inputs(group.inputs, factor)

    def observed(self, group: Group) -> Group:
        """``group``, observed after ``fold``, with what is known of it on the scale of its factor."""
        factor = self.explicit(group.sites[0])
        return group if factor is None else Group(group.sites, scaled_inputs(group.inputs, factor))

    def _find(
        self, block: nn.Module, prefix: str, group: Group, width: int, probe: Callable[[], Tensor]
    ) -> Producer | None:
        local = group.sites[0].name[len(prefix) + 1 :]
        known = self.producers.get(local)
        if group.sites[0].kind == "experts" or (local in self.producers and known is None):
            return None
        module = block.get_submodule(local)
        expected = _observe(module, probe)
        # A strong factor tells candidates apart; its consumers are scaled to match while the trial lasts.
        exponents = torch.randint(0, TRIAL_EXPONENTS, (width,), generator=torch.Generator().manual_seed(0))
        strong = (0.5**exponents).to(expected[0].device)
        best, smallest = None, TOLERANCE
        _scale_consumers(block, prefix, group.sites, strong)
        for candidates in ([known] if known else [], _candidates(block, prefix, group.sites, width)):
            for producer in candidates if best is None else ():
                undo = _apply(block, producer, 1 / strong, prefix, None)
                seen_input, seen = _observe(module, probe)
                undo()
                error = max(_distance(seen_input * strong, expected[0]), _distance(seen, expected[1]))
                if error < smallest:
                    best, smallest = producer, error
        _scale_consumers(block, prefix, group.sites, 1 / strong)
        chosen = json.loads(self._agree(json.dumps(best)))
        self.producers[local] = None if chosen is None else Producer(*chosen)
        return self.producers[local]


def scaled_inputs(inputs: Mapping[str, InputStatistic], factor: Tensor) -> dict[str, InputStatistic]:
    """Statistics of ``x / factor`` from those of ``x``; these stay as they are."""
    scaled: dict[str, InputStatistic] = {}
    for name, statistic in inputs.items():
        other = scaled[name] = copy.copy(statistic)
        if isinstance(other, Gram):
            other.sum = other.sum / (factor[:, None] * factor)
        elif isinstance(other, ColumnMoments):
            other.absolute, other.square = other.absolute / factor, other.square / factor.double().square()
    return scaled


def scaled_terms(terms: Sequence[Term], factor: Tensor) -> list[Term]:
    """``terms`` of a weight on ``x / factor`` as terms on ``x``, which store the division as their input scale."""
    scaled = []
    for term in terms:
        assert isinstance(term.spec.input, RawInput)
        spec = term.spec.model_copy(update={"input": ScaledInput()})
        scale = (1 / factor).float().expand(*term.stack, factor.numel()).contiguous()
        scaled.append(spec.build(term.shape, {**dict(term.named_buffers()), "input_scale": scale}))
    return scaled


def _candidates(block: nn.Module, prefix: str, consumers: Sequence[Site], width: int) -> Iterator[Producer]:
    """Norms of that many channels first, then stretches of that many rows of the other linear layers."""
    own = {site.name[len(prefix) + 1 :] for site in consumers}
    for name, module in block.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 1 and weight.numel() == width:
            yield Producer(name, 0, 0.0)
            yield Producer(name, 0, 1.0)
    for name, module in block.named_modules():
        if name in own or not (isinstance(module, nn.Linear) or is_conv1d(module)):
            continue
        rows = _rows(module)
        for start in range(0, rows - width + 1, width):
            yield Producer(name, start, 0.0)


def _rows(module: nn.Module) -> int:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.shape[1] if is_conv1d(module) else weight.shape[0]


def _apply(
    block: nn.Module, producer: Producer, factor: Tensor, prefix: str, weights: Overlay | None
) -> Callable[[], None]:
    """Multiply a producer's output channels; returns what undoes it in the block."""
    module = block.get_submodule(producer.module)
    before: list[tuple[nn.Parameter, Tensor]] = []
    part = slice(producer.start, producer.start + factor.numel())
    for label in ("weight", "bias"):
        parameter = module._parameters.get(label)
        if parameter is None:
            continue
        before.append((parameter, parameter.data))
        offset = producer.offset if label == "weight" else 0.0
        columns = label == "weight" and is_conv1d(module)

        def scaled(tensor: Tensor, offset: float = offset, columns: bool = columns) -> Tensor:
            wide = tensor.to(device=factor.device, dtype=torch.float32, copy=True)
            wide = wide.T if columns else wide
            shape = (-1,) + (1,) * (wide.dim() - 1)
            wide[part] = (wide[part] + offset) * factor.view(shape) - offset
            return (wide.T if columns else wide).contiguous()

        parameter.data = scaled(parameter.data).to(parameter.dtype)
        if weights is not None:
            name = f"{prefix}.{producer.module}.{label}"
            stored = weights.read(name)
            # Norms and biases go back to their own precision; a weight that will be compressed keeps all of it.
            weights.changed[name] = scaled(stored).to(torch.float32 if stored.dim() > 1 else stored.dtype)

    def undo() -> None:
        for parameter, data in before:
            parameter.data = data

    return undo


def _scale_consumers(block: nn.Module, prefix: str, sites: Sequence[Site], factor: Tensor) -> None:
    for site in sites:
        parameter = parameter_of(block, prefix, site)
        shape = (-1, 1) if site.kind == "conv1d" else (-1,)
        parameter.data = (parameter.data.float() * factor.to(parameter.device).view(shape)).to(parameter.dtype)


def _observe(module: nn.Module, probe: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """The module's input and the probe's output."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(first_input(args, kwargs).detach().clone())

    handle = module.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        output = probe()
    finally:
        handle.remove()
    return seen[0], output


def _distance(found: Tensor, expected: Tensor) -> float:
    """Relative, in the Frobenius norm; infinite where a value is not finite."""
    distance = float((found.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-30))
    return math.inf if math.isnan(distance) else distance
