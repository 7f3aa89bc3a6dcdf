"""What a calibrated job has finished: one file per block, and how far it came, safe against every interruption."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rarefy.calibration.report import LayerReport
from rarefy.calibration.solve import lock_folder
from rarefy.calibration.stored import build_terms, describe_terms, term_tensors
from rarefy.core.errors import CheckpointError, FormatError, OptionError
from rarefy.core.files import read_header, write_tensors, write_text
from rarefy.core.version import __version__
from rarefy.formats.terms import Term
from rarefy.layers.checkpoint import digest_of
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


class Journal:
    """Solutions by block, in memory or, with a ``folder``, in files that are whole or absent.

    A folder belongs to one job, known by its ``marks``, and to one process at a time. Of several ranks one keeps the
    journal; with ``keeps`` false this one only counts along.
    """

    def __init__(self, folder: Path | None, marks: Mapping[str, Any], keeps: bool = True):
        self.folder, self.keeps = (folder if keeps else None), keeps
        folder = self.folder
        self._held: dict[str, tuple[dict[str, Solved], dict[str, Tensor]]] = {}
        self._where: dict[str, str] = {}
        self._lock = None if folder is None else lock_folder(folder)
        self.finished = 0
        self.notes: dict[str, list[str]] = {}
        self.prepared: dict[str, dict[str, Any]] = {}
        if folder is not None:
            self._resume(folder, json.loads(json.dumps(marks)))

    def close(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def _resume(self, folder: Path, marks: dict[str, Any]) -> None:
        self._marks = marks
        path = folder / STATE
        try:
            state = json.loads(path.read_text("utf-8"))
            known, self.finished, self.notes = state["marks"], int(state["finished"]), state["notes"]
            self.prepared = dict(state["prepared"])
        except FileNotFoundError:
            return
        except (ValueError, KeyError, TypeError):
            raise OptionError(f"'{STATE}' in --work-dir '{folder}' is damaged; delete the folder.") from None
        changed = [name for name in marks if known.get(name) != marks[name]]
        if changed:
            raise OptionError(
                f"--work-dir '{folder}' holds a job with another {changed[0]}; name another folder, or delete this one."
            )
        for unit in state["units"]:
            for name in json.loads(self._header(unit)["layers"]):
                self._where[name] = unit

    def keep(self, unit: str, solved: Mapping[str, Solved], dense: Mapping[str, Tensor]) -> None:
        """Make the solutions of one block durable, with the dense tensors that changed with them."""
        if not self.keeps:
            return
        if self.folder is None:
            self._held[unit] = dict(solved), dict(dense)
        else:
            tensors = {f"dense.{name}": tensor.cpu().contiguous() for name, tensor in dense.items()}
            layers = {}
            for name, (terms, report) in solved.items():
                tensors.update(term_tensors(terms, f"{name}.terms."))
                layers[name] = [describe_terms(terms), report.model_dump(mode="json")]
            hashes = {name: digest_of(tensor) for name, tensor in tensors.items()}
            about = {"layers": json.dumps(layers), "hashes": json.dumps(hashes)}
            write_tensors(self._path(unit), tensors, about)
        self._where.update(dict.fromkeys(solved, unit))

    def advance(self) -> None:
        """One more unit is finished; from now on it will not be done again."""
        self.finished += 1
        if self.folder is not None:
            units = sorted(set(self._where.values()))
            state = {"marks": self._marks, "finished": self.finished, "units": units}
            state.update(notes=self.notes, prepared=self.prepared)
            write_text(self.folder / STATE, json.dumps(state, indent=1) + "\n")

    def take(self, site: str) -> Solved:
        """The terms of a solved site, on the CPU, and the record of the work."""
        unit = self._where[site]
        if self.folder is None:
            return self._held[unit][0][site]
        description, report = json.loads(self._header(unit)["layers"])[site]
        tensors = self._read(unit, f"{site}.terms.")
        return build_terms(description, tensors, f"{site}.terms."), LayerReport.model_validate(report)

    def dense(self) -> dict[str, Tensor]:
        """Dense tensors that took another value, by name."""
        found: dict[str, Tensor] = {}
        for unit in sorted(set(self._where.values())):
            if self.folder is None:
                found.update(self._held[unit][1])
            else:
                found.update({name.removeprefix("dense."): t for name, t in self._read(unit, "dense.").items()})
        return found

    def sites(self, unit: str) -> Sequence[str]:
        """The sites that a finished unit solved."""
        return [name for name, where in self._where.items() if where == unit]

    def _path(self, unit: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{unit}.safetensors"

    def _header(self, unit: str) -> dict[str, str]:
        try:
            return read_header(self._path(unit)).metadata
        except CheckpointError as failure:
            raise OptionError(f"A block in --work-dir is damaged ({failure}); delete the folder.") from None

    def _read(self, unit: str, prefix: str) -> dict[str, Tensor]:
        from safetensors import SafetensorError, safe_open

        hashes = json.loads(self._header(unit)["hashes"])
        try:
            with safe_open(self._path(unit), framework="pt") as opened:
                tensors = {name: opened.get_tensor(name) for name in opened.keys() if name.startswith(prefix)}  # noqa: SIM118
        except (SafetensorError, OSError, FormatError) as failure:
            raise OptionError(f"'{unit}' in --work-dir cannot be read ({failure}); delete the folder.") from None
        for name, tensor in tensors.items():
            if digest_of(tensor) != hashes[name]:
                raise OptionError(f"'{name}' in --work-dir is damaged; delete the folder.")
        return tensors
