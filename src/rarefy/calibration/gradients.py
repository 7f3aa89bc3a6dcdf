"""The reverse sweep: gradients of a loss for every block's weights, with one block on the device at a time.

A forward pass over the dense model keeps the inputs of some blocks; then the loss of what comes after the blocks gives
the gradient of the last hidden state, and each block, from the last to the first, turns the gradient of its output into
those of its weights and of its input. One sequence at a time, since statistics square each sequence's gradient.

Of ``n`` blocks every ``sqrt(n)``-th has its inputs kept, and the stretch from there is run again when its turn comes:
at most one forward pass more, for ``2 sqrt(n)`` hidden states at a time instead of ``n`` (Chen et al. 2016).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from rarefy.calibration.activations import Shelf
from rarefy.calibration.blocks import Resident
from rarefy.calibration.kept import Kept, keep_tensors
from rarefy.calibration.parallel import Ranks
from rarefy.calibration.replay import Call, Replay, hidden_of
from rarefy.calibration.samples import Batch, on_device
from rarefy.core.errors import RecipeError
from rarefy.core.progress import Advance
from rarefy.layers.swap import Site
from rarefy.statistics import Fisher, Gradient, Statistics
from rarefy.statistics.gradients import GradientStatistic

KINDS: dict[str, type[GradientStatistic]] = {"fisher": Fisher, "gradient": Gradient}
IGNORED = -100  # a target that the cross-entropy leaves out


@dataclass
class Sweep:
    """What the sweep walks over: the surrounded blocks, how each is called, and the sites whose gradients matter."""

    replay: Replay
    resident: Resident
    batches: Sequence[Batch]
    calls: Sequence[Sequence[Call]]  # [batch][block]
    output: Any  # what a block returns, for its form
    sites: Mapping[str, Sequence[Site]]  # block -> sites
    needs: Callable[[Site], frozenset[str]]
    ranks: Ranks
    seed: int
    shelf: Callable[[str], Shelf]  # where hidden states of all batches can be kept

    def kinds(self, site: Site) -> list[str]:
        return sorted(self.needs(site) & KINDS.keys())


class GradientFiles:
    """Gradient statistics in files of a folder, one for each block."""

    def __init__(self, folder: Path | None, blocks: Sequence[str]):
        self._temporary = TemporaryDirectory(prefix="rarefy-") if folder is None else None
        self._folder = Path(self._temporary.name) if self._temporary is not None else folder
        self._blocks = blocks

    def path(self, block: str) -> Path:
        assert self._folder is not None
        return self._folder / f"gradients-{block}.safetensors"

    def add_to(self, statistics: Statistics, site: Site, needs: frozenset[str], device: torch.device) -> Statistics:
        """``statistics`` with those of the site's gradients that ``needs`` names; outside the blocks none are known."""
        block = next((name for name in self._blocks if site.name.startswith(f"{name}.")), None)
        found: dict[str, Any] = {}
        for kind in sorted(needs & KINDS.keys()):
            statistic = found[kind] = KINDS[kind](site.shape, device)
            lead = f"{site.name}.{kind}."
            if block is not None:
                tensors = Kept(self.path(block)).read(lambda name, lead=lead: name.startswith(lead))  # type: ignore[misc]
                for label in statistic.sums():
                    setattr(statistic, label, tensors[lead + label].to(device))
            statistic.assume_uniform_()
        return replace(statistics, **found)


def reverse_sweep(sweep: Sweep, folder: Path | None, advance: Advance) -> GradientFiles:
    """Gradient statistics of all sites, in ``folder`` (each rank's own); not done again when it holds all blocks'.

    ``advance`` counts ``steps`` of them. Raises RecipeError when no sequence gave a finite gradient.
    """
    blocks = sweep.replay.blocks
    files = GradientFiles(folder, blocks)
    if sweep.ranks.all(all(files.path(block).is_file() for block in blocks)):
        return files
    count, length = len(blocks), _stretch(len(blocks))
    states = {0: sweep.shelf("states-0")}
    with sweep.resident.outside(blocks):
        for number, batch in enumerate(sweep.batches):
            own = on_device(batch, sweep.resident.device, sweep.resident.dtype)
            states[0].write(number, sweep.replay.first_call(own)[0])
    _forward(sweep, states, range(count), range(0, count, length), advance)
    upstream = states.pop(count)
    _tail_gradients(sweep, upstream)
    for index in range(count - 1, -1, -1):
        block = blocks[index]
        if index not in states:
            stretch = range(index // length * length, index)
            _forward(sweep, states, stretch, stretch, advance)
        with sweep.resident.block(block) as module:
            statistics = _through(sweep, index, module, states[index], upstream)
        states.pop(index).discard()
        tensors = {}
        for name, statistic in statistics.items():
            sweep.ranks.add_(statistic.sums().values())
            if not int(statistic.sequences):
                raise RecipeError(
                    f"Layer '{name.rpartition('.')[0]}' has no finite gradient on the data; repair the model."
                )
            tensors.update({f"{name}.{label}": tensor for label, tensor in statistic.sums().items()})
        keep_tensors(files.path(block), tensors, {})
        advance(note=block)
    upstream.discard()
    return files


def states_at_once(blocks: int) -> int:
    """Kinds of hidden states that the sweep over so many blocks keeps at a time."""
    length = _stretch(blocks)
    return -(-blocks // length) + length


def steps(blocks: int) -> int:
    """How often a block is run in the sweep over so many."""
    return 3 * blocks - -(-blocks // _stretch(blocks))


def _stretch(blocks: int) -> int:
    """At how many blocks' distance inputs are kept."""
    return math.isqrt(blocks - 1) + 1


def _forward(sweep: Sweep, states: dict[int, Shelf], indices: range, kept: Container[int], advance: Advance) -> None:
    """Run the blocks of ``indices`` on ``states``, the inputs of each block by batch; those of blocks that are not to
    be ``kept`` are given back once used."""
    for index in indices:
        block, after = sweep.replay.blocks[index], sweep.shelf(f"states-{index + 1}")
        with sweep.resident.block(block) as module:
            for number in range(len(sweep.batches)):
                hidden = states[index].read(number).to(sweep.resident.device, copy=True)
                after.write(number, hidden_of(sweep.calls[number][index].run(module, hidden)))
        states[index + 1] = after
        if index not in kept:
            states.pop(index).discard()
        advance(note=block)


def _tail_gradients(sweep: Sweep, hidden: Shelf) -> None:
    """Replace each sequence's last hidden state by the gradient of its loss by it."""
    device, model = sweep.resident.device, sweep.replay.model
    with sweep.resident.outside(sweep.replay.blocks), torch.enable_grad():
        for number, batch in enumerate(sweep.batches):
            states = hidden.read(number)
            gradient = torch.empty_like(states)
            for row in range(len(states)):
                leaf = states[row : row + 1].to(device, copy=True).requires_grad_()
                one = {name: tensor[row : row + 1] for name, tensor in batch.items()}
                own = on_device(one, device, sweep.resident.dtype)
                # Drawn for the sample itself: neither its neighbours nor the number of processes matter.
                generator = torch.Generator().manual_seed(sweep.seed ^ _crc(one))
                loss = loss_of(model, sweep.replay.tail(own, leaf, sweep.output), own, generator)
                gradient[row] = torch.autograd.grad(loss, leaf)[0][0].to("cpu")
            hidden.write(number, gradient)


def _through(
    sweep: Sweep, index: int, module: nn.Module, inputs: Shelf, upstream: Shelf
) -> dict[str, GradientStatistic]:
    """Gradients of a block's weights; ``upstream``, the gradients of its output, become those of its input."""
    device, block = sweep.resident.device, sweep.replay.blocks[index]
    sites = [site for site in sweep.sites[block] if sweep.kinds(site)]
    parameters = [module.get_parameter(site.parameter[len(block) + 1 :]) for site in sites]
    statistics = {
        f"{site.name}.{kind}": KINDS[kind](site.shape, device) for site in sites for kind in sweep.kinds(site)
    }
    with torch.enable_grad(), _requiring_gradients(parameters):
        for number in range(len(sweep.batches)):
            states, above = inputs.read(number), upstream.read(number)
            below = torch.empty_like(states)
            for row in range(len(states)):
                leaf = states[row : row + 1].to(device, copy=True).requires_grad_()
                output = hidden_of(_call_row(sweep.calls[number][index], row, len(states)).run(module, leaf))
                seed = above[row : row + 1].to(device, copy=True)
                found = torch.autograd.grad(output, [leaf, *parameters], seed, allow_unused=True)
                assert found[0] is not None
                below[row] = found[0][0].to("cpu")
                for site, parameter, own in zip(sites, parameters, found[1:], strict=True):
                    gradient = torch.zeros_like(parameter).detach() if own is None else own
                    gradient = gradient.T if site.kind == "conv1d" else gradient
                    for kind in sweep.kinds(site):
                        statistics[f"{site.name}.{kind}"].update(gradient)
            upstream.write(number, below)
    return statistics


@contextmanager
def _requiring_gradients(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    for parameter in parameters:
        parameter.requires_grad_()
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)


def loss_of(model: Any, output: Any, batch: Batch, generator: torch.Generator) -> Tensor:
    """A scalar whose gradients say what the model's output for one sample depends on.

    The model's own loss where the batch has labels. Else, of logits over its vocabulary, the cross-entropy with the
    next token, or with the token itself where the model does not generate; of other logits, that with labels drawn from
    its own prediction; and of features a random projection, whose squared gradients estimate the diagonal of JᵀJ.
    Padding counts for nothing.
    """
    if getattr(output, "loss", None) is not None:
        loss: Tensor = output.loss
        return loss
    side = "decoder_" if "decoder_input_ids" in batch else ""
    tokens, mask = batch.get(f"{side}input_ids"), batch.get(f"{side}attention_mask")
    logits = getattr(output, "logits", None)
    if logits is None:
        features = output[0] if isinstance(output, tuple) else next(iter(output.values()))
        direction = torch.randn(features.shape, generator=generator).to(features)
        if mask is not None and features.shape[:-1] == mask.shape:
            direction = direction * mask.unsqueeze(-1)
        return (features * direction).sum()
    if tokens is not None and logits.shape[:-1] == tokens.shape and model.get_output_embeddings() is not None:
        targets = tokens if mask is None else tokens.masked_fill(mask == 0, IGNORED)
        if model.can_generate():
            logits, targets = logits[:, :-1], targets[:, 1:]
    else:
        flat = logits.detach().flatten(0, -2).float()
        targets = torch.multinomial(flat.softmax(-1).cpu(), 1, generator=generator).to(logits.device)
        targets = targets.reshape(logits.shape[:-1])
        if mask is not None and targets.shape == mask.shape:
            targets = targets.masked_fill(mask == 0, IGNORED)
    return nn.functional.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORED)


def _crc(sample: Batch) -> int:
    value = 0
    for _, tensor in sorted(sample.items()):
        value = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy(), value)  # type: ignore[arg-type]
    return value


def _call_row(call: Call, row: int, rows: int) -> Call:
    """The call for one sample of a batch: tensors that have the samples in front are cut."""

    def cut(part: Any) -> Any:
        has_samples = isinstance(part, Tensor) and part.dim() > 1 and 1 < part.shape[0] == rows
        return part[row : row + 1] if has_samples else part

    args, kwargs = tree_map(cut, (call.args, call.kwargs))
    return Call(args, kwargs, call.hidden_name)
