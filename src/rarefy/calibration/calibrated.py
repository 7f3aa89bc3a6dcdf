"""Compression with data: sets a job up, runs it, and gives back where its solutions lie."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from rarefy.calibration.blocks import find_blocks
from rarefy.calibration.capture import INPUTS
from rarefy.calibration.driver import BATCH_TOKENS, Driver, Job
from rarefy.calibration.gradients import KINDS
from rarefy.calibration.journal import Journal, fingerprint
from rarefy.calibration.parallel import Ranks
from rarefy.calibration.plan import check_plan, fits_device, fits_memory, plan
from rarefy.calibration.samples import Samples
from rarefy.calibration.selection import Selection
from rarefy.calibration.weights import Weights
from rarefy.contracts import Recipe
from rarefy.core.devices import compute_dtype
from rarefy.core.errors import OptionError
from rarefy.core.logs import logger
from rarefy.core.progress import announce

log = logger(__name__)


@dataclass(frozen=True)
class Calibration:
    """The data of a job, the ranks that share its work, and the folder that keeps it across interruptions."""

    samples: Samples
    ranks: Ranks
    seed: int = 0
    work_dir: Path | None = None


def needed(recipe: Recipe) -> frozenset[str]:
    """The statistics that the methods of ``recipe`` want; none for a data-free recipe."""
    return frozenset(name for rule in recipe.rules for name in rule.recipe().needs)


@contextmanager
def calibrated(
    model: nn.Module,
    weights: Weights,
    selection: Selection,
    recipe: Recipe,
    calibration: Calibration,
    device: torch.device,
    work: Path | None,
    *,
    everywhere: bool,
) -> Iterator[tuple[Journal, list[str]]]:
    """Solve every chosen site; yields the journal that holds the solutions, and notes for the report.

    ``model`` is a runnable skeleton of ``weights``. Solutions lie in the job's work folder, else in ``work``, else in
    memory; of several ranks the first has them, and the others only if they are wanted ``everywhere``.
    Raises RecipeError, UnsupportedError, OptionError and SourceError; what was finished before stays.
    """
    ranks, samples = calibration.ranks, calibration.samples
    notes = [f"calibrated on {samples.describe()}", *samples.notes]
    if samples.count < ranks.size:
        raise OptionError(f"{samples.count} calibration samples cannot be shared by {ranks.size} processes; use more.")
    sites = [site for site, _ in selection.chosen]
    blocks = find_blocks(model, sites)
    methods = [rule.recipe() for rule in recipe.rules]
    needs = needed(recipe)
    dtype = compute_dtype(weights.read(sites[0].parameter).dtype, device)
    if dtype == torch.float16 and needs & KINDS.keys():
        dtype = torch.float32  # gradients of one sequence lie below what float16 holds
    own = samples.rebatch(BATCH_TOKENS[device.type], ranks.size).part(ranks.rank, ranks.size)
    streams = len({method.schedule().inputs for method in methods if method.needs & INPUTS.keys()})
    about = [recipe.model_dump(mode="json"), [[m.recipe_version, m.model_dump(mode="json")] for m in methods]]
    marks = fingerprint(weights.identity(), samples.identity(), about, device, dtype, ranks.size)
    marks["seed"] = calibration.seed
    with ExitStack() as stack:
        folder = (calibration.work_dir or work) if ranks.leads else None
        journal = Journal(folder, marks, ranks.leads or everywhere, lasting=calibration.work_dir is not None)
        stack.callback(journal.close)
        wanted = plan(model, blocks, sites, own, dtype, streams, bool(needs & KINDS.keys()))
        scratch = None
        if calibration.work_dir is not None:
            scratch = calibration.work_dir / f"rank-{ranks.rank}"
        elif not fits_memory(wanted, device, ranks.size):
            place = stack.enter_context(TemporaryDirectory(prefix="rarefy-", dir=None if work is None else work.parent))
            scratch = Path(place)
        hidden = device if scratch is None and fits_device(wanted, device) else torch.device("cpu")
        if ranks.leads:
            announce(wanted.describe(device, hidden, scratch is not None))
        if journal.finished < len(blocks) and (warning := check_plan(wanted, device, scratch, ranks.size)):
            log.warning("%s", warning)
        job = Job(
            model=model, weights=weights, selection=selection, recipe=recipe, samples=own, device=device, dtype=dtype,
            journal=journal, ranks=ranks, everywhere=everywhere, seed=calibration.seed, scratch=scratch, hidden=hidden,
        )  # fmt: skip
        Driver(job).run()
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
        yield journal, [*notes, *(note for entries in journal.progress.notes.values() for note in entries)]
