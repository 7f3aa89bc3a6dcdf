"""The streaming driver: one block at a time through capture, solve, swap, and on to the next block's inputs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from rarefy.calibration.activations import FileStream, MemoryStream, Stream
from rarefy.calibration.blocks import Resident, find_blocks
from rarefy.calibration.capture import INPUTS, Capture, EndOfBlock, Group
from rarefy.calibration.gradients import KINDS, Sweep, reverse_sweep
from rarefy.calibration.journal import Journal, Solved
from rarefy.calibration.parallel import Ranks
from rarefy.calibration.replay import Call, Replay, hidden_of
from rarefy.calibration.samples import Samples
from rarefy.calibration.selection import Selection
from rarefy.calibration.solving import Solver
from rarefy.calibration.weights import Overlay, Weights
from rarefy.contracts import Layer, Recipe
from rarefy.core.errors import UnsupportedError
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
    seed: int = 0
    scratch: Path | None = None  # where activations are mapped; None keeps them in memory


class Driver:
    """Solves every chosen site of a job into its journal."""

    def __init__(self, job: Job):
        self.job, self.journal, self.ranks = job, job.journal, job.ranks
        chosen = [site for site, _ in job.selection.chosen]
        self.blocks = find_blocks(job.model, chosen)
        self.sites = {name: [site for site in chosen if site.name.startswith(f"{name}.")] for name in self.blocks}
        inside = {site.name for sites in self.sites.values() for site in sites}
        self.outside = [site for site in chosen if site.name not in inside]
        self.weights = Overlay(job.weights)
        rules = {site.name: rule for site, rule in job.selection.chosen}
        self.solver = Solver(rules, self.weights, job.device, job.ranks, job.seed)
        self.resident = Resident(job.model, self.weights, job.device, job.dtype)
        self.replay = Replay(job.model, self.blocks)
        self.batches = job.samples.batches
        self.streams: dict[str, Stream] = {}
        self.calls: list[list[Call]] = []
        self.output: object = None

    @torch.no_grad()
    def run(self) -> None:
        """Solve what the journal does not hold yet."""
        state = json.dumps([self.journal.finished, self.journal.prepared])
        self.journal.finished, self.journal.prepared = json.loads(self.ranks.spread({}, state, 0)[1])
        if self.journal.finished >= len(self.blocks) + bool(self.outside):
            return
        self._enter()
        if self.journal.finished == 0:
            self._prepare()
        else:
            self._recall()
        self._sweep()
        with progress(self.job.recipe.name, len(self._all()) + len(self.outside)) as advance:
            for name in self.blocks[: self.journal.finished]:
                advance(len(self.sites[name]))
            for index in range(self.journal.finished, len(self.blocks)):
                self._block(index, advance)
            if self.outside:
                self._outside(advance)

    # The model around the blocks

    def _enter(self) -> None:
        """Run what comes before the blocks: their first inputs, and how each of them is called."""
        kinds = {self.solver.schedule(site).inputs for site in self._all() + self.outside if self._observed(site)}
        if not kinds and not self._gradients():
            return
        batches = [self._on_device(batch) for batch in self.batches]
        with self.resident.outside(self.blocks):
            shapes = [self.replay.first_call(batch)[0].shape for batch in batches]
            for kind in sorted(kinds):
                self.streams[kind] = self._stream(kind, shapes)
            for number, batch in enumerate(batches):
                hidden, call = self.replay.first_call(batch)
                if self.journal.finished == 0:
                    for stream in self.streams.values():
                        stream.write(number, hidden)
                if self.output is None or isinstance(self.output, tuple):
                    with self.resident.block(self.blocks[0]) as block:
                        self.output = call.run(block, hidden)
                self.calls.append(self.replay.calls(batch, self.output))
        if self.journal.finished == 0:
            for stream in self.streams.values():
                stream.commit()

    def _stream(self, kind: str, shapes: Sequence[Sequence[int]]) -> Stream:
        if self.job.scratch is None:
            return MemoryStream(len(self.batches))
        # The first block's inputs are generation 1; what has been committed beyond the journal is done again.
        generation = self.journal.finished + 1 if self.journal.finished else 0
        return FileStream(self.job.scratch, f"inputs-{kind}", shapes, self.job.dtype, generation)

    def _sweep(self) -> None:
        needs = self._gradients()
        if needs:
            causal = bool(getattr(self.job.model, "can_generate", lambda: False)())
            sweep = Sweep(
                self.replay, self.resident, self.batches, self.calls, self.output, self.sites, needs, self.ranks,
                self.job.seed, causal,
            )  # fmt: skip
            self.solver.gradients = reverse_sweep(sweep, self.job.scratch)

    def _outside(self, advance: Advance) -> None:
        """Layers before and after the blocks, such as a pooler, on what the compressed blocks give."""
        with self.resident.outside(self.blocks):
            capture = self._watch(self.job.model, self.outside, "")
            if any(map(self._observed, self.outside)):
                stream = self._main_stream()
                with capture.watching():
                    for number, batch in enumerate(self.batches):
                        capture.batch(batch.get("attention_mask"))
                        hidden = stream.read(number).to(self.job.device)
                        self.replay.tail(self._on_device(batch), hidden, self.output)
                self._merge(capture)
            solved = self._solve(capture, advance, None)
        self._keep(OUTSIDE, solved)

    # One block

    def _block(self, index: int, advance: Advance) -> None:
        name, solved = self.blocks[index], dict[str, Solved]()
        with self.resident.block(name) as block:
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
                solved.update(self._solve(capture, advance, (index, block, kind)))
            if "compressed" in self.streams and (index + 1 < len(self.blocks) or self.outside):
                self._forward(index, block, "compressed", None, write=True)
        self._keep(name, solved)

    def _observe(self, index: int, block: nn.Module, sites: Sequence[Site], kind: str, write: bool = False) -> Capture:
        capture = self._watch(block, sites, self.blocks[index])
        observed = any(map(self._observed, sites))
        if observed or write:
            self._forward(index, block, kind, capture if observed else None, write)
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
            group.check()

    def _forward(self, index: int, block: nn.Module, kind: str, capture: Capture | None, write: bool) -> None:
        """All batches of one stream through a block; ``write`` makes the outputs the next block's inputs."""
        stream = self.streams[kind]
        with ExitStack() as stack:
            if capture is not None:
                stack.enter_context(capture.watching(early=not write))
            for number, batch in enumerate(self.batches):
                hidden = stream.read(number).to(self.job.device)
                if capture is not None:
                    capture.batch(batch.get("attention_mask"))
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
            return hidden_of(self.calls[0][index].run(block, self.streams[kind].read(0).to(self.job.device)))

        for group in capture.groups:
            recipe = self.solver.recipe(group.sites[0])
            factor = recipe.input_scale([self.solver.layer(site, group) for site in group.sites])
            if factor is not None:
                self.solver.scales.fold(block, self.blocks[index], group, factor, self.weights, probe)

    def _solve(self, capture: Capture, advance: Advance, place: tuple[int, nn.Module, str] | None) -> dict[str, Solved]:
        """Solve what was captured; ``place`` is the block that takes the solutions, and the stream it reads."""
        unseen = capture.unseen()
        groups = capture.groups + [Group([site], {}) for site in unseen]
        missing = frozenset(site.name for site in unseen if self._observed(site))
        if place is None:
            return self.solver.solve(groups, missing, advance, None)
        index, block, kind = place

        def install(site: Site, terms: Sequence[Term]) -> None:
            self._install(block, self.blocks[index], site, terms)

        if not any(self.solver.schedule(site).true_sequential for site in capture.sites):
            return self.solver.solve(groups, missing, advance, install)
        solved: dict[str, Solved] = {}
        for position, group in enumerate(groups):
            if position and group.inputs:
                seen = self._observe(index, block, group.sites, kind).groups
                group.inputs = seen[0].inputs if seen else {}
            solved.update(self.solver.solve([group], missing, advance, install))
        return solved

    def _install(self, block: nn.Module, prefix: str, site: Site, terms: Sequence[Term]) -> None:
        """Put the compressed weight's values where the dense ones were, for the layers that come after."""
        weight = torch.stack([term.to(self.job.device).decode() for term in terms]).sum(0)
        for term in terms:
            term.to("cpu")
        weight = weight.T if site.kind == "conv1d" else weight
        owner, _, label = site.parameter[len(prefix) + 1 :].rpartition(".")
        parameter = block.get_submodule(owner)._parameters[label]
        assert parameter is not None
        parameter.data = weight.to(parameter.dtype).contiguous()

    def _keep(self, unit: str, solved: dict[str, Solved]) -> None:
        parameters = {site.parameter for site, _ in self.job.selection.chosen}
        dense = {name: tensor for name, tensor in self.weights.changed.items() if name not in parameters}
        self.journal.keep(unit, solved, dense)
        for stream in self.streams.values():
            stream.commit()
        self.ranks.wait()
        self.journal.advance()
        self.weights.changed.clear()
        self.solver.scales.clear()

    # Before the first block

    def _prepare(self) -> None:
        """Show each recipe that asks for it a few layers of the dense model, and note what it decided."""
        for key, recipe in list(self.solver.recipes.items()):
            wanted = recipe.sample_layers
            if not wanted:
                continue
            sites = [site for site in self._all() if self.solver.recipe(site) is recipe and site.kind != "experts"]
            picked = [sites[int((number + 0.5) * len(sites) / wanted)] for number in range(wanted)] if sites else []
            decided = recipe.prepare(self._sample(picked))
            self.solver.recipes[key] = decided
            before, after = recipe.model_dump(mode="json"), decided.model_dump(mode="json")
            position = str(list(self.solver.recipes).index(key))
            self.journal.prepared[position] = after
            self.journal.notes[f"recipe {position}"] = [
                f"{name} = {value:.6g} was chosen on {len(picked)} layers"
                if isinstance(value, float)
                else f"{name} = {value} was chosen"
                for name, value in after.items()
                if value != before[name]
            ]

    def _recall(self) -> None:
        """The options that recipes decided before the job was interrupted."""
        for position, key in enumerate(list(self.solver.recipes)):
            if decided := self.journal.prepared.get(str(position)):
                self.solver.recipes[key] = type(self.solver.recipes[key]).model_validate(decided)

    def _sample(self, picked: Sequence[Site]) -> list[Layer]:
        layers: list[Layer] = []
        names = {site.name for site in picked}
        count = max(1, -(-SAMPLE_SEQUENCES // self.ranks.size))
        hidden: list[tuple[int, Tensor]] = []
        source = self._main_stream()
        for number in range(len(self.batches)):
            if sum(len(part) for _, part in hidden) < count:
                hidden.append((number, source.read(number).clone()))
        for index, name in enumerate(self.blocks):
            own = [site for site in self.sites[name] if site.name in names]
            with self.resident.block(name) as block:
                capture = self._watch(block, own, name)
                with capture.watching():
                    for position, (number, part) in enumerate(hidden):
                        capture.batch(self.batches[number].get("attention_mask"))
                        output = hidden_of(self.calls[number][index].run(block, part.to(self.job.device)))
                        hidden[position] = (number, output.to("cpu"))
                self._merge(capture)
                layers += [self.solver.layer(site, group) for group in capture.groups for site in group.sites]
            names -= {site.name for site in own}
            if not names:
                break
        return layers

    # Small things

    def _observed(self, site: Site) -> bool:
        return bool(self.solver.recipe(site).needs & INPUTS.keys())

    def _gradients(self) -> frozenset[str]:
        """Gradient statistics that a recipe of a layer inside the blocks needs."""
        return frozenset(name for site in self._all() for name in self.solver.recipe(site).needs & KINDS.keys())

    def _all(self) -> list[Site]:
        return [site for name in self.blocks for site in self.sites[name]]

    def _main_stream(self) -> Stream:
        return self.streams.get("compressed") or self.streams["dense"]

    def _on_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: tensor.to(self.job.device, self.job.dtype if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in batch.items()
        }
