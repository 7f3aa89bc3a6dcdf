"""Compression without data: shard in, shard out, one weight in memory at a time; or a loaded model in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor, nn

from rarefy.calibration.output import copy_companions, licence_of, write_card, write_config
from rarefy.calibration.report import Ledger
from rarefy.calibration.selection import Selection, select
from rarefy.calibration.skeleton import read_config, skeleton
from rarefy.calibration.solve import WorkFolder, solve_site
from rarefy.contracts import Recipe, Rule
from rarefy.core.errors import CheckpointError, RecipeError, SourceError, UnsupportedError
from rarefy.core.files import read_header
from rarefy.core.logs import logger
from rarefy.core.progress import progress
from rarefy.layers.checkpoint import ShardWriter
from rarefy.layers.manifest import WEIGHTS_NAME, Manifest
from rarefy.layers.swap import Site, dense_weight, swap_

log = logger(__name__)


def refuse_data(recipe: Recipe) -> None:
    """Raise RecipeError when a method of ``recipe`` needs statistics of activations or gradients."""
    for rule in recipe.rules:
        needs = rule.recipe().needs
        if needs:
            raise RecipeError(
                f"Recipe '{rule.method}' needs {', '.join(sorted(needs))} from calibration data, which this version does not "
                "collect; choose a data-free recipe such as 'rtn'."
            )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a dense model folder, in name order. Raises SourceError when there are none."""
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
    if not files:
        raise SourceError(f"'{folder}' holds no .safetensors weights; convert them first.")
    return files


def can_stream(folder: Path) -> bool:
    """Whether the checkpoint's tensor names are the model's own, so that no model need be loaded to compress it.

    A model class that Transformers does not know yet is streamed by the shapes of its tensors.
    """
    try:
        model = skeleton(folder)
    except UnsupportedError:
        return True
    return _tensors(folder) <= set(model.state_dict())


def compress_folder(
    source: Path,
    name: str,
    recipe: Recipe,
    stage: Path,
    *,
    max_shard_bytes: int,
    device: torch.device,
    work_dir: Path | None,
    notes: list[str],
) -> tuple[Ledger, Manifest, dict[str, str]]:
    """Compress the dense checkpoint in ``source`` into the empty folder ``stage``; returns ledger, manifest and skipped sites.

    Peak memory is one weight with its working copies plus one output shard. Weights on disk may have any floating
    dtype; what is not compressed is copied bit for bit. Raises RecipeError, SourceError or CheckpointError.
    """
    refuse_data(recipe)
    config = read_config(source)
    selection, untie = _select_in(source, config, recipe)
    by_parameter = {site.parameter: (site, rule) for site, rule in selection.chosen}
    _check_parameters(source, by_parameter, untie)
    ledger = Ledger(recipe, notes=list(notes))
    writer = ShardWriter(stage, WEIGHTS_NAME, max_shard_bytes)
    dense_bytes = 0
    with ExitStack() as stack:
        work = _work(stack, work_dir)
        advance = stack.enter_context(progress(f"{recipe.name}", len(by_parameter)))
        for key, tensor in _read(weight_files(source)):
            dense_bytes += tensor.numel() * tensor.element_size()
            chosen = by_parameter.get(key)
            if chosen is None or key in untie.values():
                writer.add(key, tensor)
            for site, rule in [chosen] if chosen else [by_parameter[t] for t, owner in untie.items() if owner == key]:
                oriented = tensor.T.contiguous() if site.kind == "conv1d" else tensor
                terms, layer = solve_site(site, rule, oriented, device, work)
                ledger.add(layer, rule, terms)
                for index, term in enumerate(terms):
                    for label, buffer in term.named_buffers():
                        writer.add(f"{site.name}.terms.{index}.{label}", buffer)
                advance(note=f"{site.name} error {layer.relative_error:.4f}")
    if untie:
        config = untied(config)
        ledger.notes.append("the tied output head was compressed apart from its embedding")
    manifest = writer.finish(ledger.manifest(writer.total_bytes, dense_bytes))
    copy_companions(source, stage)
    write_config(stage, config, manifest)
    write_card(stage, name, manifest, [], licence_of(source))
    return ledger, manifest, selection.skipped


def compress_model_(
    model: nn.Module, recipe: Recipe, *, device: torch.device | None = None, work_dir: Path | None = None
) -> tuple[Ledger, dict[str, str]]:
    """Compress a loaded model in place, layer by layer; returns the ledger and the skipped sites with reasons."""
    refuse_data(recipe)
    selection = select(model, recipe)
    tied = {target for target, _ in tied_parameters(model).items()}
    ledger = Ledger(recipe)
    with ExitStack() as stack:
        work = _work(stack, work_dir)
        advance = stack.enter_context(progress(recipe.name, len(selection.chosen)))
        for site, rule in selection.chosen:
            weight = dense_weight(model, site)
            if weight.device.type == "meta":
                raise UnsupportedError(f"Layer '{site.name}' has no weights in memory; load the model without offloading.")
            home = weight.device
            terms, layer = solve_site(site, rule, weight, device or home, work)
            if site.parameter in tied:
                untie_(model)
                ledger.notes.append("the tied output head was compressed apart from its embedding")
            swap_(model, site, [term.to(home) for term in terms])
            ledger.add(layer, rule, terms)
            advance(note=f"{site.name} error {layer.relative_error:.4f}")
    return ledger, selection.skipped


def tied_parameters(model: nn.Module) -> dict[str, str]:
    """Tied parameter name -> name of the parameter it shares its storage with."""
    owners: dict[int, str] = {}
    tied: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = owners.setdefault(id(parameter), name)
        if first != name and first not in tied:
            tied.setdefault(name, first)
    return tied


def untie_(model: nn.Module) -> None:
    """Stop a model from tying its output head to its embedding, now and when it is loaded again."""
    config = getattr(model, "config", None)
    for part in (config, getattr(config, "text_config", None)):
        if part is not None and getattr(part, "tie_word_embeddings", False):
            part.tie_word_embeddings = False
    if hasattr(model, "all_tied_weights_keys"):
        model.all_tied_weights_keys = {}


def untied(config: dict[str, object]) -> dict[str, object]:
    """A copy of a raw configuration that ties no embeddings."""
    text = config.get("text_config")
    inner = {"text_config": {**text, "tie_word_embeddings": False}} if isinstance(text, dict) else {}
    return {**config, **inner, "tie_word_embeddings": False}


def _select_in(source: Path, config: dict[str, object], recipe: Recipe) -> tuple[Selection, dict[str, str]]:
    """The selection, and chosen parameters that are only tied views of one on disk (their owner by name)."""
    try:
        model = skeleton(source)
    except UnsupportedError as failure:
        log.warning("%s Layers are chosen by the shapes and names of their tensors.", failure)
        return _select_by_shape(source, recipe), {}
    selection = select(model, recipe)
    tied = tied_parameters(model)
    on_disk = _tensors(source)
    chosen = {site.parameter for site, _ in selection.chosen}
    return selection, {target: owner for target, owner in tied.items() if target in chosen and target not in on_disk}


def _select_by_shape(source: Path, recipe: Recipe) -> Selection:
    """Without a model class: two-dimensional ``*.weight`` tensors that are not embeddings, norms or heads."""
    shell = nn.Module()
    for path in weight_files(source):
        for name, info in read_header(path).tensors.items():
            owner, _, label = name.rpartition(".")
            if label != "weight" or len(info.shape) != 2 or "embed" in owner or "norm" in owner:
                continue
            parent = shell
            *route, last = owner.split(".")
            for part in route:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            with torch.device("meta"):
                parent.add_module(last, nn.Linear(info.shape[1], info.shape[0], bias=False))
    return select(shell, recipe)


def _check_parameters(source: Path, wanted: dict[str, tuple[Site, Rule]], untie: dict[str, str]) -> None:
    """Raise CheckpointError when a chosen weight is not in the files or has another shape than the model says."""
    shapes = {name: info.shape for path in weight_files(source) for name, info in read_header(path).tensors.items()}
    for parameter, (site, _) in wanted.items():
        shape = shapes.get(untie.get(parameter, parameter))
        expected = site.shape[::-1] if site.kind == "conv1d" else site.shape
        if shape != expected:
            found = "is missing" if shape is None else f"has shape {list(shape)}, expected {list(expected)}"
            raise CheckpointError(f"Tensor '{parameter}' of '{source.name}' {found}; the checkpoint does not fit its config.")


def _tensors(folder: Path) -> set[str]:
    return {name for path in weight_files(folder) for name in read_header(path).tensors}


def _read(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    from safetensors import safe_open

    for path in files:
        with safe_open(path, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                yield name, opened.get_tensor(name)


def _work(stack: ExitStack, work_dir: Path | None) -> WorkFolder | None:
    if work_dir is None:
        return None
    work = WorkFolder(work_dir)
    closing: Callable[[], None] = work.close
    stack.callback(closing)
    return work
