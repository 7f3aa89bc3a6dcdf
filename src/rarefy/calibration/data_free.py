"""From a dense checkpoint to a compressed one, shard in, shard out; or a loaded model in place."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.calibration.calibrated import Calibration, calibrated
from rarefy.calibration.journal import Journal
from rarefy.calibration.output import copy_companions, write_card, write_config
from rarefy.calibration.report import LayerReport, Ledger
from rarefy.calibration.selection import Selection, may_be_absent, select, select_sites, tied_parameters
from rarefy.calibration.skeleton import read_config, runnable_skeleton, skeleton, skeleton_of
from rarefy.calibration.solve import WorkFolder, solve_site
from rarefy.calibration.weights import FolderWeights, ModelWeights
from rarefy.contracts import Recipe, Rule
from rarefy.core.errors import CheckpointError, RecipeError, SourceError, UnsupportedError
from rarefy.core.files import read_header
from rarefy.core.logs import logger
from rarefy.core.progress import progress
from rarefy.formats.terms import Term
from rarefy.layers.checkpoint import ShardWriter
from rarefy.layers.manifest import WEIGHTS_NAME, Manifest
from rarefy.layers.swap import Site, dense_weight, swap_

log = logger(__name__)

WORK = ".work"  # solved blocks, below the output until it is whole
UNTIED = "the tied output head was compressed apart from its embedding"


Solve = Callable[[Site, Rule, Tensor], tuple[list[Term], LayerReport]]


def refuse_data(recipe: Recipe) -> None:
    """Raise RecipeError when a method of ``recipe`` needs statistics of activations or gradients."""
    for rule in recipe.rules:
        needs = rule.recipe().needs
        if needs:
            raise RecipeError(
                f"Recipe '{rule.method}' needs {', '.join(sorted(needs))} from calibration data, which cannot be had "
                "here; choose a data-free recipe such as 'rtn'."
            )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a dense model folder that Transformers would load, in name order.

    Others may lie beside them: another precision, another framework's names, shards of an older save. Raises
    SourceError when there are none, or when an index is damaged or names a file that is not there.
    """
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise SourceError(f"'{index.name}' of '{folder}' is damaged; copy it again.") from None
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
                raise SourceError(
                    f"'{index.name}' of '{folder}' names '{name}', which is not a file beside it; copy it again."
                )
        if names:
            return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
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
    return _shapes(folder).keys() <= model.state_dict().keys()


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
    calibration: Calibration | None = None,
) -> tuple[Ledger, Manifest, dict[str, str]]:
    """Compress the dense checkpoint in ``source`` into the empty folder ``stage``.

    Returns the ledger, the manifest, and the skipped sites with reasons. Peak memory is one weight with its working
    copies plus one output shard, and with ``calibration`` (which recipes that need data must get) one block and its
    activations. Weights on disk may have any floating dtype; what is not compressed is copied bit for bit.
    Raises RecipeError, SourceError or CheckpointError.
    """
    config = read_config(source)
    selection, untie = _select_in(source, config, recipe)
    copies: dict[str, list[str]] = {}
    for target, owner in (untie or {}).items():
        copies.setdefault(owner, []).append(target)
    ledger = Ledger(recipe, notes=list(notes))
    writer = ShardWriter(stage, WEIGHTS_NAME, max_shard_bytes)
    dense_bytes = 0
    with ExitStack() as stack:
        if calibration is None:
            refuse_data(recipe)
            work = _work(stack, work_dir)
            solve: Solve = functools.partial(solve_site, device=device, work=work)
            changed: dict[str, Tensor] = {}
        else:
            context = _calibrated_folder(source, selection, recipe, calibration, device, stage / WORK)
            journal, said = stack.enter_context(context)
            ledger.notes += said
            solve, changed = (lambda site, *_: journal.take(site.name)), journal.dense()
        by_parameter = {site.parameter: (site, rule) for site, rule in selection.chosen}
        advance = stack.enter_context(progress("writing" if calibration else recipe.name, len(by_parameter)))
        for key, tensor in _read(weight_files(source)):
            dense_bytes += tensor.numel() * tensor.element_size()
            for parameter in (key, *copies.get(key, ())):
                if parameter not in by_parameter:
                    writer.add(parameter, changed.get(parameter, tensor if parameter == key else tensor.clone()))
                    continue
                site, rule = by_parameter[parameter]
                terms, layer = solve(site, rule, tensor.T.contiguous() if site.kind == "conv1d" else tensor)
                ledger.add(layer, rule, terms)
                for index, term in enumerate(terms):
                    for label, buffer in term.named_buffers():
                        writer.add(f"{site.name}.terms.{index}.{label}", buffer)
                advance(note=f"{site.name} error {layer.relative_error:.4f}")
    if untie is not None:
        config = untied(config)
        ledger.notes.append(UNTIED)
    manifest = writer.finish(ledger.manifest(writer.total_bytes, dense_bytes))
    shutil.rmtree(stage / WORK, ignore_errors=True)
    copy_companions(source, stage)
    write_config(stage, config, manifest)
    architecture = next(iter(config.get("architectures") or ()), "AutoModel")
    write_card(stage, name, str(architecture), manifest, source)
    return ledger, manifest, selection.skipped


def assist_folder(source: Path, recipe: Recipe, calibration: Calibration, device: torch.device) -> None:
    """The part of ``compress_folder`` of a rank that writes nothing."""
    selection, _ = _select_in(source, read_config(source), recipe)
    with _calibrated_folder(source, selection, recipe, calibration, device, None):
        pass


def _calibrated_folder(
    source: Path,
    selection: Selection,
    recipe: Recipe,
    calibration: Calibration,
    device: torch.device,
    work: Path | None,
) -> AbstractContextManager[tuple[Journal, list[str]]]:
    model = runnable_skeleton(source)
    weights = FolderWeights(weight_files(source), tied_parameters(model))
    return calibrated(model, weights, selection, recipe, calibration, device, work, everywhere=False)


def compress_model_(
    model: nn.Module,
    recipe: Recipe,
    *,
    device: torch.device | None = None,
    work_dir: Path | None = None,
    calibration: Calibration | None = None,
) -> tuple[Ledger, dict[str, str]]:
    """Compress a loaded model in place; returns the ledger and the skipped sites with reasons.

    All weights are solved before the first is replaced: a layer that cannot be compressed leaves the model as it was.
    """
    selection = select(model, recipe)
    tied = tied_parameters(model).keys() & {site.parameter for site, _ in selection.chosen}
    if tied:
        _refuse_untying(getattr(model, "config", None))
    ledger = Ledger(recipe)
    solved: list[tuple[Site, list[Term]]] = []
    changed: dict[str, Tensor] = {}
    for site, _ in selection.chosen:
        if dense_weight(model, site).device.type == "meta":
            raise UnsupportedError(f"Layer '{site.name}' has no weights in memory; load the model without offloading.")
    with ExitStack() as stack:
        if calibration is None:
            refuse_data(recipe)
            work = _work(stack, work_dir)
            advance = stack.enter_context(progress(recipe.name, len(selection.chosen)))
        else:
            place = device or next(model.parameters()).device
            twin, weights = skeleton_of(model), ModelWeights(model)
            context = calibrated(twin, weights, selection, recipe, calibration, place, None, everywhere=True)
            journal, said = stack.enter_context(context)
            ledger.notes += said
            changed = journal.dense()
        for site, rule in selection.chosen:
            weight = dense_weight(model, site)
            if calibration is None:
                terms, layer = solve_site(site, rule, weight, device or weight.device, work)
                advance(note=f"{site.name} error {layer.relative_error:.4f}")
            else:
                terms, layer = journal.take(site.name)
            solved.append((site, [term.to(weight.device) for term in terms]))
            ledger.add(layer, rule, terms)
    if tied:
        untie_(model, tied)
        ledger.notes.append(UNTIED)
    for site, terms in solved:
        swap_(model, site, terms)
    with torch.no_grad():
        for name, tensor in changed.items():
            model.get_parameter(name).copy_(tensor)
    return ledger, selection.skipped


def untie_(model: Any, chosen: Collection[str] = ()) -> None:
    """Stop a model from tying its output head to its embedding, now and when it is loaded again.

    Whatever else was tied gets storage of its own, but for the ``chosen`` parameters, which are about to be replaced.
    """
    config = getattr(model, "config", None)
    for part in (config, getattr(config, "text_config", None)):
        if part is not None and getattr(part, "tie_word_embeddings", False):
            part.tie_word_embeddings = False
    for name in tied_parameters(model).keys() - set(chosen):
        owner, _, label = name.rpartition(".")
        old = model.get_parameter(name)
        setattr(model.get_submodule(owner), label, nn.Parameter(old.detach().clone(), old.requires_grad))
    if hasattr(model, "all_tied_weights_keys"):
        model.all_tied_weights_keys = {}


def untied(config: dict[str, Any]) -> dict[str, Any]:
    """A copy of a raw configuration that ties no embeddings."""
    text = config.get("text_config")
    inner = {"text_config": {**text, "tie_word_embeddings": False}} if isinstance(text, dict) else {}
    return {**config, **inner, "tie_word_embeddings": False}


def _select_in(source: Path, config: dict[str, Any], recipe: Recipe) -> tuple[Selection, dict[str, str] | None]:
    """The selection and, if a chosen parameter must be untied, what untying takes out of its owner (name -> owner)."""
    try:
        model = skeleton(source)
    except UnsupportedError as failure:
        log.warning("%s Layers are chosen by the shapes and names of their tensors.", failure)
        return _select_by_shape(source, recipe), None
    selection = select(model, recipe)
    tied, on_disk = tied_parameters(model), _shapes(source)
    parameters = {site.parameter for site, _ in selection.chosen}
    _check_whole(source, model, on_disk, parameters - tied.keys())
    chosen = tied.keys() & parameters
    if not chosen:
        return selection, None
    _refuse_untying(model.config)
    still = tied_parameters(skeleton(source, untied(config)))
    if chosen & still.keys():
        raise RecipeError(
            f"'{min(chosen & still.keys())}' cannot be untied in a {type(model).__name__}; leave it dense."
        )
    return selection, {target: owner for target, owner in tied.items() if target not in still.keys() | on_disk.keys()}


def _refuse_untying(config: Any) -> None:
    """Raise RecipeError where a class computes something else when nothing is tied, as T5 and its kin do."""
    if getattr(config, "is_encoder_decoder", False):
        raise RecipeError(
            "The output head of this encoder-decoder model is tied to its embeddings, and untying them would change "
            "what its class computes; leave the head dense."
        )


def _select_by_shape(source: Path, recipe: Recipe) -> Selection:
    """Without a model class: two-dimensional ``*.weight`` tensors that are not embeddings, norms or heads."""
    found = []
    for path in weight_files(source):
        for name, info in read_header(path).tensors.items():
            owner, _, label = name.rpartition(".")
            if owner and label == "weight" and len(info.shape) == 2 and "embed" not in owner and "norm" not in owner:
                found.append(Site(owner, "linear", info.shape, name))
    return select_sites(found, recipe)


def _check_whole(
    source: Path, model: nn.Module, on_disk: Mapping[str, tuple[int, ...]], needed: Collection[str]
) -> None:
    """Raise CheckpointError when a tensor of the model, or one that is ``needed``, is absent or has another shape."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if missing := (wanted.keys() - may_be_absent(model) | set(needed)) - on_disk.keys():
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"'{source.name}' lacks the tensor '{min(missing)}'{more}; copy the whole model.")
    for name, shape in wanted.items():
        if on_disk.get(name, shape) != shape:
            raise CheckpointError(
                f"Tensor '{name}' of '{source.name}' has shape {list(on_disk[name])}, expected {list(shape)}; "
                "the checkpoint does not fit its config."
            )


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    return {name: info.shape for path in weight_files(folder) for name, info in read_header(path).tensors.items()}


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
