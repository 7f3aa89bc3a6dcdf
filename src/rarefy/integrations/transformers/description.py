"""A model folder described from its config and headers, without loading a tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rarefy.calibration.selection import tied_parameters
from rarefy.calibration.skeleton import read_config, skeleton
from rarefy.core.errors import CheckpointError
from rarefy.core.files import read_header
from rarefy.formats.terms import TermSpec
from rarefy.layers.manifest import read_manifest
from rarefy.layers.swap import sites


def describe(folder: Path) -> dict[str, Any]:
    """Architecture, compressible layers with shape, bytes and bits per weight, and what everything else weighs.

    Raises CheckpointError or SourceError when config or headers are damaged, UnsupportedError for unknown classes.
    """
    config = read_config(folder)
    quantization = config.get("quantization_config")
    compressed = isinstance(quantization, dict) and quantization.get("quant_method") == "rarefy"
    manifest = read_manifest(quantization) if compressed else None
    terms = manifest.terms() if manifest else {}
    sizes = {
        name: info.nbytes
        for path in sorted(folder.glob("*.safetensors"))
        for name, info in read_header(path).tensors.items()
    }
    layers: list[dict[str, Any]] = []
    model = skeleton(folder)
    tied = tied_parameters(model)
    for site in sites(model):
        prefix = f"{site.name}.terms."
        own = sum(size for name, size in sizes.items() if name.startswith(prefix)) or sizes.get(site.parameter, 0)
        if site.name in terms and not any(name.startswith(prefix) for name in sizes):
            raise CheckpointError(f"Layer '{site.name}' is compressed but has no tensors; copy the folder again.")
        if site.name in terms:
            stored_as = " + ".join(map(short, terms[site.name]))
        elif own:
            stored_as = "dense"
        else:
            stored_as = f"tied to {tied[site.parameter]}" if site.parameter in tied else "dense, under another name"
        layers.append(
            {
                "name": site.name,
                "shape": list(site.shape),
                "stored_as": stored_as,
                "bytes": own,
                "bits_per_weight": own * 8 / max(1, site.count),
            }
        )
    layer_bytes = sum(layer["bytes"] for layer in layers)
    return {
        "architecture": ", ".join(config.get("architectures") or ["unknown"]),
        "compressed": compressed,
        "recipe": manifest.recipe if manifest else None,
        "format_version": manifest.format_version if manifest else None,
        "layers": layers,
        "layer_bytes": layer_bytes,
        "other_bytes": sum(sizes.values()) - layer_bytes,
        "stored_bytes": sum(sizes.values()),
        "bits_per_weight": manifest.report.bits_per_weight if manifest and manifest.report else None,
    }


def short(term: TermSpec) -> str:
    """A term in a few words, such as ``integer 4 bit g128 integer-zero``."""
    data = term.model_dump(mode="json")
    grid, pattern = data.get("grid"), data.get("pattern")
    words = [data["type"] if grid is None else str(grid["type"])]
    if grid is not None:
        words += [f"{grid['num_bits']} bit"] if "num_bits" in grid else []
        words += [str(grid[key]) for key in ("format", "levels", "regions") if key in grid]
        words += [f"g{grid['group_size']}"] if grid.get("group_size") else ["per row"]
        words += [f"{grid['zero']}-zero"] if grid.get("zero", "none") != "none" else []
        words += ["bilevel"] if (grid.get("scales") or {}).get("type") == "bilevel" else []
    if pattern is not None and pattern["type"] != "full":
        words.append(f"{pattern['n']}:{pattern['m']}" if pattern["type"] == "n_m" else str(pattern["type"]))
    if data["input"]["type"] != "raw":
        words.append(f"on {data['input']['type']} input")
    return " ".join(words)
