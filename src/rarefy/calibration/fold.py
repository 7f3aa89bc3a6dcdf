"""Dividing a layer's input by a factor per channel, inside whatever produces that input.

Which parameter produces it is found by trial, not by name: scale a candidate, run the block, and see whether the
input follows and the block's output stays. A factor without such a producer is stored as an input scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rarefy.calibration.capture import Group
from rarefy.calibration.weights import Overlay
from rarefy.formats.inputs import RawInput, ScaledInput
from rarefy.formats.terms import Term
from rarefy.layers.swap import Site, is_conv1d
from rarefy.statistics import ColumnMoments, Gram, Statistics

# Relative error up to which a probe counts as equal; wrong candidates are off by tens of percent.
TOLERANCE = 0.03


@dataclass(frozen=True)
class Producer:
    """``parameter[start : start + n]`` (rows of a linear layer, channels of a norm) makes the input's channels.

    ``offset``: 1 for norms that multiply by ``1 + weight``.
    """

    module: str
    start: int
    offset: float


class InputScales:
    """Folds factors into producers, block by block; the same place is tried first in the next block."""

    def __init__(self) -> None:
        self.factors: dict[str, Tensor] = {}  # site -> the factor its weight is multiplied by
        self.explicit: dict[str, Tensor] = {}  # site -> the factor its stored input scale divides by
        self._known: dict[str, Producer | None] = {}

    def clear(self) -> None:
        """Forget one block's factors."""
        self.factors.clear()
        self.explicit.clear()

    def fold(
        self,
        block: nn.Module,
        prefix: str,
        group: Group,
        factor: Tensor,
        weights: Overlay,
        probe: Callable[[], Tensor],
        may_probe: bool = True,
    ) -> None:
        """Multiply the weights of ``group`` by ``factor [in]`` and divide their input by it.

        ``probe`` runs the block on some data and returns its output. ``weights`` gets the producer's new tensors.
        """
        names = [site.name for site in group.sites]
        self.factors.update(dict.fromkeys(names, factor))
        _scale_consumers(block, prefix, group.sites, factor)
        local = group.sites[0].name[len(prefix) + 1 :]
        producer = self._find(block, local, group, prefix, factor, probe) if may_probe else None
        if producer is None:
            self.explicit.update(dict.fromkeys(names, factor))
            _scale_consumers(block, prefix, group.sites, 1 / factor)
            return
        _apply(block, producer, 1 / factor, prefix, weights)

    def _find(
        self, block: nn.Module, local: str, group: Group, prefix: str, factor: Tensor, probe: Callable[[], Tensor]
    ) -> Producer | None:
        if local in self._known and self._known[local] is None:
            return None
        # A strong factor tells candidates apart; its consumers are scaled to match while the trial lasts.
        generator = torch.Generator().manual_seed(0)
        strong = (0.5 + 1.5 * torch.rand(factor.numel(), generator=generator)).to(factor)
        _scale_consumers(block, prefix, group.sites, 1 / factor)
        module = block.get_submodule(local) if group.sites[0].kind != "experts" else None
        found = None
        if module is not None:
            expected_input, expected = _observe(module, probe)
            _scale_consumers(block, prefix, group.sites, strong)
            known = self._known.get(local)
            for producer in [known] if known else list(_candidates(block, prefix, group.sites, factor.numel())):
                undo = _apply(block, producer, 1 / strong, prefix, None)
                seen_input, seen = _observe(module, probe)
                undo()
                if _close(seen_input * strong.to(seen_input.dtype), expected_input) and _close(seen, expected):
                    found = producer
                    break
            _scale_consumers(block, prefix, group.sites, 1 / strong)
        _scale_consumers(block, prefix, group.sites, factor)
        self._known[local] = found
        return found


def scaled_statistics(statistics: Statistics, factor: Tensor) -> Statistics:
    """Statistics of ``x / factor`` from those of ``x``."""
    gram, columns = statistics.gram, statistics.columns
    if gram is not None:
        old, gram = gram, Gram.__new__(Gram)
        gram.__dict__.update(old.__dict__)
        gram.sum = old.sum / (factor[:, None] * factor)
    if columns is not None:
        before, columns = columns, ColumnMoments.__new__(ColumnMoments)
        columns.__dict__.update(before.__dict__)
        columns.absolute, columns.square = before.absolute / factor, before.square / factor.square()
    return Statistics(gram, columns, statistics.fisher, statistics.gradient)


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
        owner, _, label = site.parameter[len(prefix) + 1 :].rpartition(".")
        parameter = block.get_submodule(owner)._parameters[label]
        assert parameter is not None
        shape = (-1, 1) if site.kind == "conv1d" else (-1,)
        parameter.data = (parameter.data.float() * factor.to(parameter.device).view(shape)).to(parameter.dtype)


def _observe(module: nn.Module, probe: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """The module's input and the probe's output."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    try:
        output = probe()
    finally:
        handle.remove()
    return seen[0], output


def _close(found: Tensor, expected: Tensor) -> bool:
    difference = (found.float() - expected.float()).norm()
    return bool(difference <= TOLERANCE * expected.float().norm())
