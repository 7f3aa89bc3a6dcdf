"""The streaming driver: one block at a time through capture, solve, swap, and on to the next block's inputs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.calibration.activations import FileShelf, FileStream, MemoryShelf, MemoryStream, Shelf, Stream
from rarefy.calibration.blocks import Resident, find_blocks, parameter_of
from rarefy.calibration.capture import INPUTS, Capture, EndOfBlock, Group
from rarefy.calibration.fold import Producer
from rarefy.calibration.gradients import KINDS, Sweep, reverse_sweep, steps
from rarefy.calibration.journal import Journal, Progress, Solved
from rarefy.calibration.parallel import Ranks
from rarefy.calibration.replay import Call, Replay, check_data, hidden_of, token_mask
from rarefy.calibration.samples import Batch, Samples, on_device
from rarefy.calibration.selection import Selection
from rarefy.calibration.solving import Solver, decoded
from rarefy.calibration.weights import Overlay, Weights
from rarefy.contracts import Layer, Recipe, WeightRecipe
from rarefy.core.errors import RecipeError, UnsupportedError
from rarefy.core.progress import Advance, progress
from rarefy.formats.terms import Term
from rarefy.layers.swap import Site

# Tokens that run through a block at once; the largest temporary is this many rows of the widest layer.
BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
# Sequences of the pass over the dense model that shows a recipe a few layers before it decides its options.
SAMPLE_SEQUENCES = 16
OUTSIDE = "outside"


@dataclass
class Job:
    """One calibrated compression: a skeleton, its weights, what to do with which layer, and on which data."""

    model: nn.Module
    weights: Weights
    selection: Selection
    recipe: Recipe
    samples: Samples
    device: torch.device
    dtype: torch.dtype
    journal: Journal
    ranks: Ranks
    everywhere: bool = False  # whether all ranks, or only the first, end up with the solutions
    seed: int = 0
    scratch: Path | None = None  # where activations are mapped; None keeps them in memory
    hidden: torch.device | str = "cpu"  # in whose memory


class Driver:
    """Solves every chosen site of a job into its journal."""

    def __init__(self, job: Job):
        self.job, self.journal, self.ranks = job, job.journal, job.ranks
        chosen = [site for site, _ in job.selection.chosen]
        self.blocks = find_blocks(job.model, chosen)
        self.sites = {name: [site for site in chosen if site.name.startswith(f"{name}.")] for name in self.blocks}
        self.inside = [site for name in self.blocks for site in self.sites[name]]
        inside = {site.name for site in self.inside}
        self.outside = [site for site in chosen if site.name not in inside]
        self.weights = Overlay(job.weights)
        rules = {site.name: rule for site, rule in job.selection.chosen}
        self.solver = Solver(rules, self.weights, job.device, job.ranks, job.seed)
        self.resident = Resident(job.model, self.weights, job.device, job.dtype)
        self.solver.held = self.resident.held
        self.replay = Replay(job.model, self.blocks)
        self.batches = job.samples.batches
        self.masks = [token_mask(job.model, self.blocks[0], batch) for batch in self.batches]
        self.shapes: list[torch.Size] = []  # of the hidden states, by batch
        self.streams: dict[str, Stream] = {}
        self.calls: list[list[Call]] = []
        self.output: object = None  # what a block returns, for its form
        self.prepared: dict[str, dict[str, Any]] = {}
        self.notes: dict[str, list[str]] = {}

    @torch.no_grad()
    def run(self) -> None:
        """Solve what the journal does not hold yet."""
        finished = self._recall()
        if finished >= len(self.blocks) + bool(self.outside):
            return
        self._enter(finished)
        self._sweep()
        if not finished:
            self._prepare()
        with self._progress(self.job.recipe.name, len(self.inside) + len(self.outside)) as advance:
            for name in self.blocks[:finished]:
                advance(len(self.sites[name]))
            for index in range(finished, len(self.blocks)):
                self._block(index, advance)
            if self.outside:
                self._outside(advance)

    def _recall(self) -> int:
        """Take over what an interrupted job decided and, where all ranks want it, solved; the number of its units."""
        progress = Progress.model_validate_json(self.ranks.tell(self.journal.progress.model_dump_json()))
        self.journal.progress = progress
        self.prepared, self.notes = dict(progress.prepared), dict(progress.notes)
        for position, key in enumerate(list(self.solver.recipes)):
            if decided := self.prepared.get(str(position)):
                self.solver.recipes[key] = type(self.solver.recipes[key]).model_validate(decided)
        for name, place in progress.producers.items():
            self.solver.scales.producers[name] = None if place is None else Producer(*place)
        for unit in progress.units if self.job.everywhere and self.ranks.size > 1 else ():
            solved, dense = self.journal.unit(unit) if self.ranks.leads else ({}, {})
            names = json.loads(self.ranks.tell(json.dumps(list(solved))))
            everyones = {name: self.solver.exchange(solved.get(name), 0) for name in names}
            dense, _ = self.ranks.spread(dense, "", 0)
            if not self.ranks.leads:
                self.journal.keep(unit, everyones, dense)
        return len(progress.units)

    # The model around the blocks

    def _enter(self, finished: int) -> None:
        """Run what comes before the blocks: their first inputs, and how each of them is called."""
        kinds = {self.solver.schedule(site).inputs for site in self.inside + self.outside if self._observed(site)}
        check_data(self.job.model, self.batches)
        with self.resident.outside(self.blocks), self.resident.block(self.blocks[0]) as block:
            self.shapes = [self.replay.first_call(self._on_device(batch))[0].shape for batch in self.batches]
            for kind in sorted(kinds):
                self.streams[kind] = self._stream(kind, finished)
            for number, batch in enumerate(map(self._on_device, self.batches)):
                hidden, call = self.replay.first_call(batch)
                for stream in self.streams.values() if not finished else ():
                    stream.write(number, hidden)
                # What a block returns beside the hidden state may go to the blocks after it, and differ by batch.
                if self.output is None or isinstance(self.output, tuple):
                    self.output = call.run(block, hidden)
                self.calls.append(self.replay.calls(batch, self.output))
        for stream in self.streams.values() if not finished else ():
            stream.commit()

    def _stream(self, kind: str, finished: int) -> Stream:
        if self.job.scratch is None:
            return MemoryStream(len(self.batches), self.job.dtype, self.job.hidden)
        # The first block's inputs are generation 1; what has been committed beyond the journal is done again.
        generation = finished + 1 if finished else 0
        return FileStream(self.job.scratch, f"inputs-{kind}", self.shapes, self.job.dtype, generation)

    def _shelf(self, name: str) -> Shelf:
        if self.job.scratch is None:
            return MemoryShelf(len(self.batches), self.job.dtype, self.job.hidden)
        return FileShelf(self.job.scratch / f"{name}.bin", self.shapes, self.job.dtype)

    def _sweep(self) -> None:
        """Gradients of the dense model's weights, for recipes that need them."""
        if any(self.solver.recipe(site).needs & KINDS.keys() for site in self.inside + self.outside):
            sweep = Sweep(
                self.replay, self.resident, self.batches, self.calls, self.output, self.sites,
                lambda site: self.solver.recipe(site).needs, self.ranks, self.job.seed, self._shelf,
            )  # fmt: skip
            with self._progress("gradients", steps(len(self.blocks))) as advance:
                self.solver.gradients = reverse_sweep(sweep, self.job.scratch, advance)

    def _outside(self, advance: Advance) -> None:
        """Layers before and after the blocks, such as a pooler, on what the blocks give."""
        solved: dict[str, Solved] = {}
        with self.resident.outside(self.blocks):
            for kind in ("compressed", "dense"):
                sites = [site for site in self.outside if self.solver.schedule(site).inputs == kind]
                capture = self._watch(self.job.model, sites, "")
                if any(map(self._observed, sites)):
                    with capture.watching(early=True):
                        for number, batch in enumerate(map(self._on_device, self.batches)):
                            capture.batch(self.masks[number])
                            hidden = self.streams[kind].read(number).to(self.job.device, copy=True)
                            with suppress(EndOfBlock):
                                self.replay.tail(batch, hidden, self.output)
                    self._merge(capture)
                solved.update(self.solver.solve(_groups(capture), advance, None))
        self._keep(OUTSIDE, solved)

    # One block

    def _block(self, index: int, advance: Advance) -> None:
        name, solved = self.blocks[index], dict[str, Solved]()
        with self.resident.block(name) as block:
            if self.job.device.type == "cuda" and index + 1 < len(self.blocks):
                self.resident.read_ahead(self.blocks[index + 1])
            captures: dict[str, Capture] = {}
            for kind in ("compressed", "dense"):
                own = [site for site in self.sites[name] if self.solver.schedule(site).inputs == kind]
                # Dense inputs of the next block come from the same pass that observes this one.
                write = kind == "dense" and kind in self.streams
                if own or write:
                    captures[kind] = self._observe(index, block, own, kind, write)
            for kind, capture in captures.items():
                self._fold(index, block, capture, kind)
            for kind, capture in captures.items():
                solved.update(self._solve(capture, advance, index, block, kind))
            if "compressed" in self.streams and (index + 1 < len(self.blocks) or self.outside):
                self._forward(index, block, "compressed", None, write=True)
        self._keep(name, solved)

    def _observe(self, index: int, block: nn.Module, sites: Sequence[Site], kind: str, write: bool = False) -> Capture:
        capture = self._watch(block, sites, self.blocks[index])
        observed = any(map(self._observed, sites))
        if observed or write:
            self._forward(index, block, kind, capture if observed else None, write)
        if observed:
            self._merge(capture)
        return capture

    def _watch(self, root: nn.Module, sites: Sequence[Site], prefix: str) -> Capture:
        return Capture(root, sites, lambda site: self.solver.recipe(site).needs, self.job.device, prefix=prefix)

    def _merge(self, capture: Capture) -> None:
        """Bring together what all ranks saw."""
        if self.ranks.size > 1:
            capture.adopt([json.loads(text) for text in self.ranks.everyones(json.dumps(capture.structure()))])
        for group in capture.groups:
            for statistic in group.inputs.values():
                self.ranks.add_(statistic.sums().values())
            group.finish()

    def _forward(self, index: int, block: nn.Module, kind: str, capture: Capture | None, write: bool) -> None:
        """All batches of one stream through a block; ``write`` makes the outputs the next block's inputs."""
        stream = self.streams[kind]
        with ExitStack() as stack:
            if capture is not None:
                stack.enter_context(capture.watching(early=not write))
            for number, mask in enumerate(self.masks):
                hidden = stream.read(number).to(self.job.device, copy=True)
                if capture is not None:
                    capture.batch(mask)
                try:
                    output = hidden_of(self.calls[number][index].run(block, hidden))
                except EndOfBlock:
                    continue
                if output.shape != hidden.shape:
                    raise UnsupportedError(
                        f"Block '{self.blocks[index]}' turns {list(hidden.shape)} into {list(output.shape)}; blocks "
                        "that change their input's shape cannot be calibrated, use a data-free recipe."
                    )
                if write:
                    stream.write(number, output)

    def _fold(self, index: int, block: nn.Module, capture: Capture, kind: str) -> None:
        """Let recipes move difficulty from inputs into weights, before any layer of the block is solved."""

        def probe() -> Tensor:
            hidden = self.streams[kind].read(0).to(self.job.device, copy=True)
            return hidden_of(self.calls[0][index].run(block, hidden))

        for group in capture.groups:
            recipe = self.solver.recipe(group.sites[0])
            if type(recipe).input_scale is WeightRecipe.input_scale:
                continue
            factor = recipe.input_scale([self.solver.layer(site, group) for site in group.sites])
            if factor is None:
                continue
            if any(self.solver.recipe(site).needs & KINDS.keys() for site in self.sites[self.blocks[index]]):
                raise RecipeError(
                    f"Layer '{group.sites[0].name}': its recipe scales inputs, but gradients of this block were taken "
                    "before; use input statistics only."
                )
            self.solver.scales.fold(block, self.blocks[index], group, factor, self.weights, probe)

    def _solve(
        self, capture: Capture, advance: Advance, index: int, block: nn.Module, kind: str
    ) -> dict[str, Solved]:
        """Solve what was captured in a block, and put the solutions into it."""
        groups = _groups(capture)

        def install(site: Site, terms: Sequence[Term]) -> None:
            self._install(block, self.blocks[index], site, terms)

        if not any(self.solver.schedule(site).true_sequential for site in capture.sites):
            return self.solver.solve(groups, advance, install)
        solved: dict[str, Solved] = {}
        again = [bool(group.inputs) for group in groups[1:]]
        for group in groups[1:]:
            group.inputs = {}
        solved.update(self.solver.solve(groups[:1], advance, install))
        for group, observe in zip(groups[1:], again, strict=True):
            # Layers see what the compressed ones before them make of the inputs.
            fresh = _groups(self._observe(index, block, group.sites, kind)) if observe else [group]
            solved.update(self.solver.solve(list(map(self.solver.scales.observed, fresh)), advance, install))
        return solved

    def _install(self, block: nn.Module, prefix: str, site: Site, terms: Sequence[Term]) -> None:
        """Put the compressed weight's values where the dense ones were, for the layers that come after."""
        weight = decoded([term.to(self.job.device) for term in terms])
        weight = weight.T if site.kind == "conv1d" else weight
        parameter = parameter_of(block, prefix, site)
        parameter.data = weight.to(parameter.dtype).contiguous()

    def _keep(self, unit: str, solved: dict[str, Solved]) -> None:
        parameters = {site.parameter for site, _ in self.job.selection.chosen}
        dense = {
            name: tensor.to(self.weights.base.read(name).dtype)
            for name, tensor in self.weights.changed.items()
            if name not in parameters
        }
        self.journal.keep(unit, solved, dense)
        for stream in self.streams.values():
            stream.commit()
        self.ranks.wait()
        self.journal.advance(unit, prepared=self.prepared, notes=self.notes, producers=self.solver.scales.producers)
        self.weights.changed.clear()
        self.solver.scales.clear()

    # Before the first block

    def _prepare(self) -> None:
        """Show each recipe that asks for it a few layers of the dense model, and note what it decided."""
        for position, (key, recipe) in enumerate(list(self.solver.recipes.items())):
            wanted = recipe.sample_layers
            if not wanted:
                continue
            sites = [site for site in self.inside if self.solver.recipe(site) is recipe and site.kind != "experts"]
            picked = [sites[int((number + 0.5) * len(sites) / wanted)] for number in range(wanted)] if sites else []
            decided = recipe.prepare(self._sample(picked))
            self.solver.recipes[key] = decided
            before, after = recipe.model_dump(mode="json"), decided.model_dump(mode="json")
            self.prepared[str(position)] = after
            self.notes[f"recipe {position}"] = [
                f"{name} = {value:.6g} was chosen on {len(picked)} layers"
                if isinstance(value, float)
                else f"{name} = {value} was chosen"
                for name, value in after.items()
                if value != before[name]
            ]

    def _sample(self, picked: Sequence[Site]) -> list[Layer]:
        """``picked`` layers with what a few sequences tell of them."""
        layers: list[Layer] = []
        names = {site.name for site in picked}
        wanted, hidden = -(-SAMPLE_SEQUENCES // self.ranks.size), list[Tensor]()
        with self.resident.outside(self.blocks):
            for batch in self.batches:
                if sum(map(len, hidden)) < wanted:
                    hidden.append(self.replay.first_call(self._on_device(batch))[0].to("cpu"))
        for index, name in enumerate(self.blocks):
            own = [site for site in self.sites[name] if site.name in names]
            with self.resident.block(name) as block:
                capture = self._watch(block, own, name)
                with capture.watching():
                    for number, part in enumerate(hidden):
                        capture.batch(self.masks[number])
                        output = self.calls[number][index].run(block, part.to(self.job.device, copy=True))
                        hidden[number] = hidden_of(output).to("cpu")
                self._merge(capture)
                layers += [self.solver.layer(site, group) for group in capture.groups for site in group.sites]
            names -= {site.name for site in own}
            if not names:
                break
        return layers

    # Small things

    def _observed(self, site: Site) -> bool:
        return bool(self.solver.recipe(site).needs & INPUTS.keys())

    def _on_device(self, batch: Batch) -> Batch:
        return on_device(batch, self.job.device, self.job.dtype)

    def _progress(self, label: str, steps: int) -> AbstractContextManager[Advance]:
        return progress(label, steps) if self.ranks.leads else nullcontext(_silent)


def _silent(steps: float = 1, note: str = "") -> None:
    """Ranks that do not lead say nothing."""


def _groups(capture: Capture) -> list[Group]:
    """What was captured, and what no input reached."""
    return capture.groups + [Group([site], {}) for site in capture.unseen()]
