"""What a calibrated job has finished: one file per block, and how far it came, safe against every interruption."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pydantic
import torch
from torch import Tensor

from rarefy.calibration.kept import Kept, keep_copies
from rarefy.calibration.report import LayerReport
from rarefy.calibration.stored import build_terms, describe_terms, term_tensors
from rarefy.core.config import StrictModel
from rarefy.core.devices import copy_to_cpu
from rarefy.core.errors import OptionError
from rarefy.core.files import lock_folder, write_text
from rarefy.core.version import __version__
from rarefy.formats.terms import Term
from rarefy.layers.manifest import FORMAT_VERSION

STATE = "job.json"
Solved = tuple[list[Term], LayerReport]


def fingerprint(
    model: str, data: str, recipe: Any, device: torch.device, dtype: torch.dtype, ranks: int
) -> dict[str, Any]:
    """Everything that decides a job's bytes, by name, so that a difference can be named."""
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    return {
        "rarefy or torch": [__version__, FORMAT_VERSION, torch.__version__], "model": model, "calibration data": data,
        "recipe": recipe,
        "device": device.type, "dtype": str(dtype), "number of threads or processes": (threads, ranks),
    }  # fmt: skip


class Progress(StrictModel):
    """How far a job came, and what it decided on the way that later blocks depend on.

    ``units``: finished blocks; ``prepared``: options by position of the recipe; ``producers``: where input scales went;
    ``notes``: for the report.
    """

    units: tuple[str, ...] = ()
    prepared: dict[str, dict[str, Any]] = {}
    producers: dict[str, tuple[str, int, float] | None] = {}
    notes: dict[str, list[str]] = {}


class Journal:
    """Solutions by block, in memory or, with a ``folder``, in files that are whole or absent.

    A folder belongs to one job, known by its ``marks``, and to one process at a time. Of several ranks one keeps the
    journal; with ``keeps`` false this one only counts along. A folder that goes when the job ends is not ``lasting``.
    """

    def __init__(self, folder: Path | None, marks: Mapping[str, Any], keeps: bool = True, lasting: bool = True):
        self.folder, self.keeps, self.lasting = (folder if keeps else None), keeps, lasting
        self._held: dict[str, tuple[dict[str, Solved], dict[str, Tensor]]] = {}
        self._files: dict[str, Kept] = {}
        self._read: tuple[str, dict[str, Tensor]] = "", {}  # a unit's tensors, since sites are taken one after another
        self._unit_of: dict[str, str] = {}
        self._marks = json.loads(json.dumps(marks))
        self.progress = Progress()
        # What need not last is written while the next block is computed.
        self._writer = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None
        self._lock = None if self.folder is None else lock_folder(self.folder)
        try:
            if self.folder is not None:
                self._resume(self.folder)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._writer.shutdown()
        if self._lock is not None:
            self._lock.release()

    @property
    def finished(self) -> int:
        """Number of finished units."""
        return len(self.progress.units)

    def _resume(self, folder: Path) -> None:
        try:
            text = (folder / STATE).read_text("utf-8")
        except FileNotFoundError:
            # Files of this job may come before its first block is finished: it takes the folder now.
            self._save(folder)
            return
        try:
            state = json.loads(text)
            known, self.progress = dict(state["marks"]), Progress.model_validate(state["progress"])
        except (ValueError, KeyError, TypeError, pydantic.ValidationError):
            raise OptionError(f"'{STATE}' in --work-dir '{folder}' is damaged; delete the folder.") from None
        changed = [name for name in self._marks if known.get(name) != self._marks[name]]
        if changed:
            raise OptionError(
                f"--work-dir '{folder}' holds a job with another {changed[0]}; name another folder, or delete this one."
            )
        for unit in self.progress.units:
            self._unit_of.update(dict.fromkeys(self._file(unit).about, unit))

    def keep(self, unit: str, solved: Mapping[str, Solved], dense: Mapping[str, Tensor]) -> None:
        """Make the solutions of one block durable, with the dense tensors that changed with them.

        Where the journal is not ``lasting`` that may be later; what fails then is raised by whoever needs it next.
        """
        if not self.keeps:
            return
        if self.folder is None:
            for terms, _ in solved.values():
                for term in terms:
                    term.to("cpu")
            self._held[unit] = dict(solved), dict(dense)
        else:
            tensors = {f"dense.{name}": tensor for name, tensor in dense.items()}
            about = {}
            for name, (terms, report) in solved.items():
                tensors.update(term_tensors(terms, f"{name}.terms."))
                about[name] = [describe_terms(terms), report.model_dump(mode="json")]
            self._settle()
            copies = copy_to_cpu(tensors)
            self._writing = self._writer.submit(keep_copies, self._path(unit), copies, about, self.lasting)
            if self.lasting:
                self._settle()
        self._unit_of.update(dict.fromkeys(solved, unit))

    def advance(self, unit: str, **decided: Any) -> None:
        """``unit`` is finished; from now on it will not be done again. ``decided``: other fields of ``progress``."""
        self.progress = self.progress.model_copy(update={"units": (*self.progress.units, unit), **decided})
        if self.folder is not None:
            self._save(self.folder)

    def take(self, site: str) -> Solved:
        """The terms of a solved site, on the CPU, and the record of the work."""
        unit = self._unit_of[site]
        if self.folder is None:
            return self._held[unit][0][site]
        file, lead = self._file(unit), f"{site}.terms."
        description, report = file.about[site]
        if self._read[0] != unit:
            self._read = unit, file.read(lambda name: not name.startswith("dense."))
        tensors = {name: tensor for name, tensor in self._read[1].items() if name.startswith(lead)}
        return build_terms(description, tensors, lead), LayerReport.model_validate(report)

    def dense(self) -> dict[str, Tensor]:
        """Dense tensors that took another value, by name."""
        units = self.progress.units if self.keeps else ()
        return {name: tensor for unit in units for name, tensor in self._dense(unit).items()}

    def unit(self, unit: str) -> tuple[dict[str, Solved], dict[str, Tensor]]:
        """All that ``keep`` was given for a finished unit."""
        sites = [name for name, where in self._unit_of.items() if where == unit]
        return {name: self.take(name) for name in sites}, self._dense(unit)

    def _dense(self, unit: str) -> dict[str, Tensor]:
        if self.folder is None:
            return self._held[unit][1]
        changed = self._file(unit).read(lambda name: name.startswith("dense."))
        return {name.removeprefix("dense."): tensor for name, tensor in changed.items()}

    def _settle(self) -> None:
        """Wait for what is being written. Raises OSError."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _save(self, folder: Path) -> None:
        if not self.lasting:
            return  # nobody will ask
        state = {"marks": self._marks, "progress": self.progress.model_dump(mode="json")}
        write_text(folder / STATE, json.dumps(state, indent=1) + "\n")

    def _path(self, unit: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{unit}.safetensors"

    def _file(self, unit: str) -> Kept:
        self._settle()
        if unit not in self._files:
            self._files[unit] = Kept(self._path(unit))
        return self._files[unit]
