"""One weight through its recipe: checked, solved, measured, and found again when the job was interrupted."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

import torch
from torch import Tensor

from rarefy.calibration.kept import Kept, keep_tensors
from rarefy.calibration.report import LayerReport
from rarefy.calibration.stored import build_terms, describe_terms, term_tensors
from rarefy.contracts import Layer, Rule, Solution
from rarefy.core.errors import FormatError, RecipeError
from rarefy.core.files import lock_folder
from rarefy.core.version import __version__
from rarefy.formats.bytes import total
from rarefy.formats.terms import Term
from rarefy.layers.checkpoint import digest_of
from rarefy.layers.manifest import FORMAT_VERSION
from rarefy.layers.swap import Site
from rarefy.solvers.rtn import relative_error


def solve_site(
    site: Site, rule: Rule, weight: Tensor, device: torch.device, work: WorkFolder | None
) -> tuple[list[Term], LayerReport]:
    """Terms for ``weight`` (any floating dtype), solved on ``device``, on the CPU, and the record of the work.

    Raises RecipeError naming the layer when it cannot be represented.
    """
    start = time.monotonic()
    key = "" if work is None else work.key(site, rule, weight, device)
    solution = None if work is None else work.find(key, site, device)
    dense = weight.to(device=device, dtype=torch.float32).contiguous()
    if solution is None:
        try:
            solution = rule.recipe().solve(Layer(site.name, dense))
        except FormatError as failure:
            raise RecipeError(f"Layer '{site.name}': {failure}") from None
        if work is not None:
            work.keep(key, solution)
    error = relative_error(dense, solution.terms)
    terms = [term.to("cpu") for term in solution.terms]
    count = total([term.byte_count() for term in terms])
    layer = LayerReport(
        name=site.name, method=rule.method, shape=site.shape, bits_per_weight=count.total * 8 / max(1, site.count),
        relative_error=error, seconds=time.monotonic() - start, notes=tuple(solution.notes),
    )  # fmt: skip
    return terms, layer


class WorkFolder:
    """Solved weights of an interrupted job, each under a key of its bytes, its rule, and what solved it.

    One process at a time: a second one on the same folder is refused. Files are whole or absent.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._lock = lock_folder(folder)

    def close(self) -> None:
        self._lock.release()

    def key(self, site: Site, rule: Rule, weight: Tensor, device: torch.device) -> str:
        recipe = rule.recipe()
        makers = [__version__, FORMAT_VERSION, torch.__version__, device.type]  # any of them may round differently
        method = [rule.method, recipe.recipe_version, recipe.model_dump(mode="json")]
        what = [makers, method, site.name, list(site.shape), digest_of(weight)]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]

    def keep(self, key: str, solution: Solution) -> None:
        about = {"terms": describe_terms(solution.terms), "notes": solution.notes}
        keep_tensors(self.folder / f"{key}.safetensors", term_tensors(solution.terms), about)

    def find(self, key: str, site: Site, device: torch.device) -> Solution | None:
        path = self.folder / f"{key}.safetensors"
        if not path.is_file():
            return None
        kept = Kept(path, f"delete it, and '{site.name}' is solved again")
        terms = build_terms(kept.about["terms"], kept.read(lambda _: True))
        return Solution([term.to(device) for term in terms], kept.about["notes"])
