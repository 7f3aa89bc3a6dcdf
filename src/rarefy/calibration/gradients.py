"""The reverse sweep: gradients of a loss for every block's weights, with one block on the device at a time.

A forward pass over the dense model keeps every block's inputs; then the loss of what comes after the blocks gives the
gradient of the last hidden state, and each block, from the last to the first, turns the gradient of its output into
those of its weights and of its input. One sequence at a time, since statistics square each sequence's gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.calibration.blocks import Resident
from rarefy.calibration.parallel import Ranks
from rarefy.calibration.replay import Call, Replay, hidden_of
from rarefy.calibration.samples import Batch
from rarefy.core.errors import RecipeError
from rarefy.core.files import write_tensors
from rarefy.core.progress import progress
from rarefy.layers.swap import Site
from rarefy.statistics import Fisher, Gradient, Statistics
from rarefy.statistics.gradients import GradientStatistic

KINDS: dict[str, type[GradientStatistic]] = {"fisher": Fisher, "gradient": Gradient}


@dataclass
class Sweep:
    """What the sweep walks over: the surrounded blocks, how each is called, and the sites whose gradients matter."""

    replay: Replay
    resident: Resident
    batches: Sequence[Batch]
    calls: Sequence[Sequence[Call]]  # [batch][block]
    output: Any  # what a block returns, for its form
    sites: Mapping[str, Sequence[Site]]  # block -> sites
    needs: frozenset[str]
    ranks: Ranks
    seed: int
    causal: bool  # whether logits predict the next token


class GradientFiles:
    """Gradient statistics in files of a folder, one for each block."""

    def __init__(self, folder: Path | None, blocks: Sequence[str]):
        self._temporary = TemporaryDirectory(prefix="rarefy-") if folder is None else None
        self._folder = Path(self._temporary.name) if self._temporary is not None else folder
        self._blocks = blocks

    def path(self, block: str) -> Path:
        assert self._folder is not None
        return self._folder / f"gradients-{block}.safetensors"

    def add_to(self, statistics: Statistics, site: Site, device: torch.device) -> Statistics:
        """``statistics`` with those of the site's gradients; unchanged for a site outside the blocks."""
        from safetensors import safe_open

        block = next((name for name in self._blocks if site.name.startswith(f"{name}.")), None)
        if block is None:
            return statistics
        found: dict[str, Any] = {}
        with safe_open(self.path(block), framework="pt") as opened:
            names = set(opened.keys())
            for kind, cls in KINDS.items():
                if f"{site.name}.{kind}.sum" not in names:
                    continue
                statistic = cls(site.shape, device)
                for label in statistic.sums():
                    setattr(statistic, label, opened.get_tensor(f"{site.name}.{kind}.{label}").to(device))
                found[kind] = statistic
        return replace(statistics, **found)


def reverse_sweep(sweep: Sweep, folder: Path | None) -> GradientFiles:
    """Gradient statistics of all sites, in ``folder`` (each rank's own); not done again when it holds all blocks'.

    Raises RecipeError when no sequence gave a finite gradient.
    """
    blocks = sweep.replay.blocks
    files = GradientFiles(folder, blocks)
    if all(files.path(block).is_file() for block in blocks):
        return files
    inputs = _forward(sweep, blocks)
    upstream = _tail_gradients(sweep, inputs.pop())
    with progress("gradients", len(blocks)) as advance:
        for index in range(len(blocks) - 1, -1, -1):
            block = blocks[index]
            with sweep.resident.block(block) as module:
                statistics, upstream = _through(sweep, index, module, inputs.pop(), upstream)
            tensors = {}
            for name, statistic in statistics.items():
                sweep.ranks.add_(statistic.sums().values())
                if not int(statistic.sequences):
                    raise RecipeError(
                        f"Layer '{name.rpartition('.')[0]}' has no finite gradient on the data; repair it."
                    )
                tensors.update({f"{name}.{label}": t.cpu().contiguous() for label, t in statistic.sums().items()})
            write_tensors(files.path(block), tensors, {})
            advance(note=block)
    return files


def _forward(sweep: Sweep, blocks: Sequence[str]) -> list[list[Tensor]]:
    """The inputs of every block and, last, the output of the last one, by batch, on the host."""
    device = sweep.resident.device
    with sweep.resident.outside(blocks):
        kept = [[sweep.replay.first_call(_moved(batch, device))[0].cpu() for batch in sweep.batches]]
    for index, block in enumerate(blocks):
        with sweep.resident.block(block) as module:
            outputs = [
                hidden_of(sweep.calls[number][index].run(module, hidden.to(device))).cpu()
                for number, hidden in enumerate(kept[-1])
            ]
        kept.append(outputs)
    return kept


def _tail_gradients(sweep: Sweep, hidden: list[Tensor]) -> list[Tensor]:
    """Gradient of each sequence's loss by its last hidden state."""
    device = sweep.resident.device
    generator = torch.Generator().manual_seed(sweep.seed)
    gradients = []
    with sweep.resident.outside(sweep.replay.blocks), torch.enable_grad():
        for batch, states in zip(sweep.batches, hidden, strict=True):
            gradient = torch.empty_like(states)
            for row in range(len(states)):
                leaf = states[row : row + 1].to(device).requires_grad_()
                one = _moved({name: tensor[row : row + 1] for name, tensor in batch.items()}, device)
                loss = loss_of(sweep.replay.tail(one, leaf, _row(sweep.output, row)), one, generator, sweep.causal)
                gradient[row] = torch.autograd.grad(loss, leaf)[0][0].to("cpu")
            gradients.append(gradient)
    return gradients


def _through(
    sweep: Sweep, index: int, module: nn.Module, inputs: list[Tensor], upstream: list[Tensor]
) -> tuple[dict[str, GradientStatistic], list[Tensor]]:
    device, block = sweep.resident.device, sweep.replay.blocks[index]
    parameters = {}
    for site in sweep.sites[block]:
        parameter = module.get_parameter(site.parameter[len(block) + 1 :])
        parameter.requires_grad_()
        parameters[site.name] = (site, parameter)
    statistics: dict[str, GradientStatistic] = {
        f"{name}.{kind}": KINDS[kind](site.shape, device)
        for name, (site, _) in parameters.items()
        for kind in sorted(sweep.needs)
    }
    passed = []
    with torch.enable_grad():
        for number, (states, above) in enumerate(zip(inputs, upstream, strict=True)):
            below = torch.empty_like(states)
            for row in range(len(states)):
                leaf = states[row : row + 1].to(device).requires_grad_()
                output = hidden_of(_call_row(sweep.calls[number][index], row, len(states)).run(module, leaf))
                wanted = [leaf, *(parameter for _, parameter in parameters.values())]
                found = torch.autograd.grad(output, wanted, above[row : row + 1].to(device), allow_unused=True)
                below[row] = found[0][0].to("cpu")
                for (name, (site, parameter)), own in zip(parameters.items(), found[1:], strict=True):
                    gradient = torch.zeros_like(parameter).detach() if own is None else own
                    gradient = gradient.T if site.kind == "conv1d" else gradient
                    for kind in sweep.needs:
                        statistics[f"{name}.{kind}"].update(gradient)
            passed.append(below)
    return statistics, passed


def loss_of(output: Any, batch: Batch, generator: torch.Generator, causal: bool) -> Tensor:
    """A scalar whose gradients say what the model's output depends on.

    Next-token cross-entropy where the output is logits by position and the model reads left to right (masked-token
    models: of the tokens themselves), cross-entropy with a label drawn from the model's own prediction for one set of
    logits, and otherwise a random projection of the features, whose squared gradients estimate the diagonal of JᵀJ.
    """
    logits = getattr(output, "logits", None)
    if logits is None:
        features = output[0] if isinstance(output, tuple) else next(iter(output.values()))
        direction = torch.randn(features.shape, generator=generator).to(features)
        return (features * direction).sum()
    if logits.dim() == 3 and "input_ids" in batch:
        tokens = batch["input_ids"]
        if causal:
            logits, tokens = logits[:, :-1], tokens[:, 1:]
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())
    flat = logits.reshape(-1, logits.shape[-1]).float()
    drawn = torch.multinomial(flat.detach().softmax(-1).cpu(), 1, generator=generator).flatten()
    return nn.functional.cross_entropy(flat, drawn.to(flat.device))


def _moved(batch: Batch, device: torch.device) -> Batch:
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _call_row(call: Call, row: int, rows: int) -> Call:
    """The call for one sample of a batch: tensors that have the samples in front are cut."""
    from torch.utils._pytree import tree_map

    args, kwargs = tree_map(lambda part: _row_of(part, row, rows), (call.args, call.kwargs))
    return Call(args, kwargs, call.hidden_name)


def _row(output: Any, row: int) -> Any:
    return tuple(_row_of(part, row, None) for part in output) if isinstance(output, tuple) else output


def _row_of(part: Any, row: int, rows: int | None) -> Any:
    if isinstance(part, Tensor) and part.dim() > 1 and part.shape[0] > 1 and (rows is None or part.shape[0] == rows):
        return part[row : row + 1]
    return part
