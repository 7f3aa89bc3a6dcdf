"""The verbs. Each takes a model by name or in memory; sizes are bytes, times seconds, divergences nats per token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from rarefy.calibration.report import CompressionReport
from rarefy.contracts import Recipe
from rarefy.core.config import parse
from rarefy.core.devices import Device, check_dtype
from rarefy.core.errors import OptionError
from rarefy.evaluation.protocol import Protocol, bos_token
from rarefy.evaluation.results import Comparison, Evaluation
from rarefy.integrations.transformers import models as folders
from rarefy.integrations.transformers.generation import runner as runner
from rarefy.integrations.transformers.subjects import name_of
from rarefy.layers.checkpoint import parse_size
from rarefy.recipes import load_recipe
from rarefy.sources.models import open_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rarefy.evaluation.attention import AttentionMaps
    from rarefy.evaluation.caches import CacheComparison
    from rarefy.evaluation.forward import CacheFactory
    from rarefy.evaluation.long.results import LongComparison
    from rarefy.evaluation.tasks.results import TaskComparison
    from rarefy.integrations.transformers.kv_setup import KvSetup
    from rarefy.integrations.transformers.plan_setup import AttentionSetup
    from rarefy.training.report import TrainingReport


def compress(
    model: str | Path | PreTrainedModel,
    recipe: str | Path | Recipe = "rtn",
    *,
    options: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    data: Any = None,
    samples: int = 128,
    seq_len: int = 2048,
    tokenizer: Any = None,
    work_dir: str | Path | None = None,
    device: Device = "auto",
    seed: int = 0,
    max_shard_size: str | int = "2GB",
    overwrite: bool = False,
    revision: str | None = None,
) -> CompressionReport:
    """Compress ``model`` by ``recipe`` and say what it cost.

    ``model``: a folder, hub id, ``.gguf`` file or ``"demo"``, written to the folder ``out`` (needed then); or a loaded
    Transformers model, compressed in place and also written if ``out`` is given. ``options`` override the recipe's.
    ``data`` serves recipes that calibrate: a text file or ``"demo"`` (also taken when None), of which ``samples``
    windows of ``seq_len`` tokens are drawn; or token ids ``[samples, tokens]``; or a list of batches of model inputs.
    A data-free recipe says that it ignores it. ``tokenizer``: for a model in memory whose folder is unknown.
    ``work_dir`` keeps solved layers, so that the same call goes on after an interruption. Under ``torchrun`` every
    process calls this: they share the work of recipes that calibrate, the first one writes, and all return its report.

    Raises RecipeError, OptionError, SourceError, UnsupportedError, CheckpointError; nothing half-written stays behind.
    """
    from rarefy.integrations.transformers.compression import compress as run

    return run(
        model, recipe, options, out=None if out is None else Path(out), data=data, samples=samples, seq_len=seq_len,
        tokenizer=tokenizer, work=None if work_dir is None else Path(work_dir), device=device, seed=seed,
        max_shard_size=max_shard_size, overwrite=overwrite, revision=revision, save=save,
    )  # fmt: skip


def load(
    source: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device_map: Any = None,
    revision: str | None = None,
) -> PreTrainedModel:
    """The model that ``source`` names, dense or compressed, in evaluation mode, as the class its config names.

    ``dtype`` is that of dense tensors and activations; codes and scales keep theirs. Raises SourceError or
    CheckpointError, OptionError.
    """
    check_dtype(dtype)
    return folders.load_folder(open_model(source, revision).folder, dtype=dtype, device_map=device_map)


def load_tokenizer(source: str | Path, *, revision: str | None = None) -> Any:
    """The tokenizer of the model that ``source`` names. Raises SourceError when it has none."""
    return folders.load_tokenizer(open_model(source, revision).folder)


def save(
    model: PreTrainedModel,
    out: str | Path,
    *,
    tokenizer: Any = None,
    max_shard_size: str | int = "2GB",
    overwrite: bool = False,
) -> None:
    """Write a compressed model to the folder ``out``, with its tokenizer, configs, licence and model card.

    What travels along is copied from the folder the model was loaded from; ``tokenizer`` replaces that one's. Without
    rarefy such a folder fails to load loudly (``save_pretrained`` writes names that only warn). Raises OptionError.
    """
    base = name_of(model)
    folder = Path(base)
    folders.save_model(
        model, Path(out), source=folder if folder.is_dir() else None, base=folder.name if folder.is_dir() else base,
        tokenizer=tokenizer, max_shard_bytes=parse_size(max_shard_size), overwrite=overwrite,
    )  # fmt: skip


def evaluate(
    model: str | Path | PreTrainedModel,
    *,
    reference: str | Path | PreTrainedModel | None = None,
    data: str | Path = "demo",
    context: int = 512,
    windows: int | None = 12,
    executor: Literal["exact", "fast"] = "exact",
    dtype: str | torch.dtype = "auto",
    device: Device = "auto",
    tokenizer: Any = None,
    chunk: int | None = None,
    cache: CacheFactory | None = None,
) -> Evaluation:
    """Perplexity of ``model`` on ``windows`` windows of ``context`` tokens of ``data``, and its KL and top-1 agreement
    against ``reference``. As ``compare`` with one model.
    """
    return compare(
        [model], reference=reference, data=data, context=context, windows=windows, executor=executor, dtype=dtype,
        device=device, tokenizer=tokenizer, chunk=chunk, cache=cache,
    ).candidates[0]  # fmt: skip


def compare(
    models: Sequence[str | Path | PreTrainedModel],
    *,
    reference: str | Path | PreTrainedModel | None = None,
    data: str | Path = "demo",
    context: int = 512,
    windows: int | None = 12,
    executor: Literal["exact", "fast"] = "exact",
    dtype: str | torch.dtype = "auto",
    device: Device = "auto",
    tokenizer: Any = None,
    chunk: int | None = None,
    cache: CacheFactory | None = None,
    attention: Sequence[str] = (),
    kv: Sequence[str] = (),
) -> Comparison:
    """Evaluate several models on the same windows; the dense ``reference`` runs once for all of them.

    ``data``: ``"demo"`` or a text file. ``windows`` None takes the whole text. ``tokenizer``: needed only for models in
    memory whose folder is unknown. ``executor="fast"`` may quantize activations where a kernel does; where none does,
    the result says ``exact``. With ``chunk`` windows go through the models that many tokens at a time, each reading the
    KV cache of those before; ``cache`` makes the one of the candidates (from the model; needs ``chunk``).
    ``attention``: plans such as ``"xattention:mass=0.9"``, and ``kv``: caches such as ``"kivi:num_bits=4"`` (needs
    ``chunk``), each measured with every model (a single one is then its own reference). Raises SourceError,
    OptionError, UnsupportedError, CheckpointError.
    """
    from rarefy.evaluation.runner import evaluate as run
    from rarefy.integrations.transformers.variants import open_variants
    from rarefy.sources.texts import open_text
    from rarefy.sources.windows import tokenize
    from rarefy.sources.windows import windows as cut

    requested = {"context": context, "windows": windows, "chunk": chunk, "executor": executor}
    protocol = parse(Protocol, requested, "Evaluation", OptionError)
    subjects = open_variants(
        models, reference, attention=attention, kv=kv, cache=cache, reads_cache=chunk is not None, dtype=dtype,
        device=device, tokenizer=tokenizer,
    )  # fmt: skip
    text = open_text(data, "evaluation")
    bos = bos_token(subjects.tokenizer, None)
    tokens = cut(tokenize(subjects.tokenizer, text.text), context, windows, bos)
    protocol = protocol.model_copy(update={"bos": bos is not None, "text": text.name, "form": text.form})
    return run(subjects.candidates, tokens, protocol, reference=subjects.reference, free_bytes=subjects.free_bytes)


def evaluate_tasks(
    models: Sequence[str | Path | PreTrainedModel],
    tasks: Sequence[str],
    *,
    reference: str | Path | PreTrainedModel | None = None,
    limit: int | None = None,
    few_shot: int | None = None,
    task_data: str | Path | None = None,
    chunk: int | None = None,
    cache: CacheFactory | None = None,
    attention: Sequence[str] = (),
    kv: Sequence[str] = (),
    batch: int | None = None,
    allow_code: bool = False,
    work_dir: str | Path | None = None,
    dtype: str | torch.dtype = "auto",
    device: Device = "auto",
    tokenizer: Any = None,
) -> TaskComparison:
    """Scores of several models on question-answering ``tasks`` through lm-eval (extra ``eval``), with paired bootstrap
    intervals of their differences from ``reference``.

    ``tasks``: names of lm-eval or of ``rarefy.evaluation.tasks``, or YAML files. ``limit``: the first examples of each.
    ``task_data``: a folder with local files of examples, which the hub serves otherwise. ``chunk``, ``cache``,
    ``attention`` and ``kv`` as in `compare`. ``work_dir`` keeps finished tasks, so that the same call goes on after an
    interruption. Raises OptionError, SourceError, UnsupportedError, CheckpointError.
    """
    from rarefy.integrations.lm_eval import evaluate_tasks as run
    from rarefy.integrations.transformers.variants import open_variants

    subjects = open_variants(
        models, reference, attention=attention, kv=kv, cache=cache, reads_cache=chunk is not None, dtype=dtype,
        device=device, tokenizer=tokenizer,
    )  # fmt: skip
    return run(
        subjects.candidates, tasks, subjects.tokenizer, reference=subjects.reference, limit=limit, few_shot=few_shot,
        task_data=None if task_data is None else Path(task_data), chunk=chunk, batch=batch, allow_code=allow_code,
        work_dir=None if work_dir is None else Path(work_dir),
    )  # fmt: skip


def compare_caches(
    model: str | Path | PreTrainedModel, caches: Sequence[str], *,
    regime: Literal["chunked", "decode", "distorted"] = "chunked", chunk: int = 64, prefill: int = 0, **options: Any,
) -> CacheComparison:  # fmt: skip
    """Measure ``model`` with several coded KV caches against itself with the dense one, on the windows of `compare`.

    ``caches``: ids with options, such as ``"kivi:num_bits=2,group_size=32"``; options of `kv_cache` (``params``,
    ``samples``, ``seq_len``) may be among them. ``regime``: see ``rarefy.evaluation.caches.CacheProtocol``. Other
    ``options``: ``data``, ``context``, ``windows``, ``dtype``, ``device`` and ``tokenizer`` as in `compare`, and
    ``batch_size``, the number of windows that go through at once.
    """
    from rarefy.integrations.transformers.kv_evaluation import compare_caches as run

    return run(model, caches, regime=regime, chunk=chunk, prefill=prefill, **options)


def kv_cache(
    model: PreTrainedModel, recipe: str | None = "kivi", *, params: str | Path | None = None, data: Any = "demo",
    samples: int = 16, seq_len: int = 2048, tokenizer: Any = None, seed: int = 0, **options: Any,
) -> KvSetup | None:  # fmt: skip
    """Keep the KV cache of ``model`` in code from now on, in ``generate`` and in passes that are given no cache.

    ``recipe``: an id such as ``"kivi"``, with its ``options``; None goes back to dense caches. A recipe with parameters
    is fitted on ``samples`` windows of ``seq_len`` tokens of ``data`` (as in `compress`), or read from the file
    ``params``. The result makes empty caches when called with the model, and ``save`` writes its parameters. Raises
    RecipeError, OptionError, CheckpointError (parameters of another model), UnsupportedError.
    """
    from rarefy.integrations.transformers.kv_calibration import open_kv
    from rarefy.integrations.transformers.kv_setup import install_, uninstall_

    if recipe is None:
        uninstall_(model)
        return None
    given = {"data": data, "samples": samples, "seq_len": seq_len, "tokenizer": tokenizer, "seed": seed}
    return install_(model, open_kv(model, recipe, params=params, options=options, **given))


def set_attention(
    model: PreTrainedModel, recipe: str | None = "xattention", *, params: str | Path | None = None, data: Any = "demo",
    samples: int = 8, seq_len: int = 2048, tokenizer: Any = None, seed: int = 0, **options: Any,
) -> AttentionSetup | None:  # fmt: skip
    """Let ``model`` attend sparsely from now on, by the plan that ``recipe`` makes with ``options`` for every layer.

    ``recipe``: an id such as ``"xattention"``; ``"dense"`` or None goes back. A recipe with parameters reads them from
    the file ``params``, or is calibrated on ``samples`` windows of ``seq_len`` tokens of ``data`` (as in `compress`);
    one that is trained has them from `train`. What its plans do is counted in the result's ``report``: density, time by
    part, and every pass that stayed dense with the reason. ``save`` writes recipe and parameters. Raises RecipeError,
    OptionError, CheckpointError (parameters of another model), UnsupportedError.
    """
    from rarefy.integrations.transformers.plan_fitting import find_attention
    from rarefy.integrations.transformers.plan_setup import install_, uninstall_

    if recipe is None or recipe == "dense":
        uninstall_(model)
        return None
    given = {"data": data, "samples": samples, "seq_len": seq_len, "tokenizer": tokenizer, "seed": seed}
    return install_(model, find_attention(model, recipe, params=params, options=options, **given))


def train(
    model: str | Path | PreTrainedModel,
    recipe: str = "seer_attention",
    *,
    options: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    data: Any = "demo",
    steps: int = 500,
    batch: int = 1,
    seq_len: int = 2048,
    samples: int | None = None,
    rate: float = 1e-3,
    tokenizer: Any = None,
    work_dir: str | Path | None = None,
    device: Device = "auto",
    seed: int = 0,
    overwrite: bool = False,
    revision: str | None = None,
) -> TrainingReport:
    """Train what ``recipe`` adds to ``model``, which stays as it is and is its own teacher, and let it use that.

    ``model``: a folder, hub id, ``.gguf`` file or ``"demo"``, written with what was trained to the folder ``out``
    (needed then); or a loaded Transformers model, which attends by the recipe from then on and is written if ``out`` is
    given. ``data``: a text file, ``"demo"`` or token ids ``[samples, tokens]``; ``steps`` of ``batch`` sequences of
    ``seq_len`` tokens, learning rate at most ``rate``. ``samples``: sequences that are drawn, over which steps go again
    and again, while the model runs once for each (None: as many as all steps take). ``work_dir`` keeps the state, so
    that the same call goes on after an interruption and ends in the same bytes (same device, threads and torch). Raises
    RecipeError, OptionError, SourceError, UnsupportedError, CheckpointError.
    """
    from rarefy.integrations.transformers.plan_fitting import train as run

    return run(
        model, recipe, options or {}, out=None if out is None else Path(out), data=data, steps=steps, batch=batch,
        seq_len=seq_len, samples=samples, rate=rate, tokenizer=tokenizer,
        work=None if work_dir is None else Path(work_dir), device=device, seed=seed, overwrite=overwrite,
        revision=revision, save=save,
    )  # fmt: skip


def attention_maps(
    model: str | Path | PreTrainedModel,
    plan: str | None = None,
    *,
    text: str | Path = "demo",
    tokens: int = 2048,
    layers: Sequence[int] | None = None,
    device: Device = "auto",
    tokenizer: Any = None,
) -> AttentionMaps:
    """What ``plan`` would look at in the first ``tokens`` tokens of ``text``, beside what ``model`` really looks at.

    ``plan``: an id with options, such as ``"xattention:threshold=0.9"``; None takes that of the checkpoint. ``layers``:
    numbers of those to look at; None takes all. Every layer is given what dense attention computes before it, and short
    texts are not left dense. Raises OptionError, SourceError, RecipeError, UnsupportedError.
    """
    from rarefy.integrations.transformers.attention_maps import attention_maps as run

    return run(model, plan, text=text, tokens=tokens, layers=layers, device=device, tokenizer=tokenizer)


def evaluate_long(
    models: Sequence[str | Path | PreTrainedModel],
    *,
    reference: str | Path | PreTrainedModel | None = None,
    data: str | Path = "demo",
    length: int = 2048,
    sessions: int = 2,
    documents: int = 4,
    chunk: int = 256,
    seed: int = 0,
    tasks: Sequence[str] | None = None,
    session_files: Sequence[str | Path] = (),
    cache: CacheFactory | None = None,
    kv: Sequence[str] = (),
    attention: Sequence[str] = (),
    work_dir: str | Path | None = None,
    dtype: str | torch.dtype = "auto",
    device: Device = "auto",
    tokenizer: Any = None,
) -> LongComparison:
    """What several models still make of contexts of ``length`` tokens, against the ``reference``.

    ``sessions`` of each task of ``rarefy.evaluation.long`` (``tasks`` None: all) are drawn by ``seed`` over the text
    ``data``, each asked in one conversation and question by question; ``documents`` windows give the likelihood by
    position. ``session_files``: sessions in the form of SCBench, kvpress or RULER, asked besides. ``chunk`` tokens go
    through a model at a time; ``cache`` makes the KV cache of the candidates, or ``kv`` names several as in
    `compare_caches`, and ``attention`` plans as in `compare`, each with every model; a single model is then its own
    reference. ``work_dir`` keeps finished sessions, so that the same call goes on after an interruption. Raises
    SourceError, OptionError, UnsupportedError, CheckpointError.
    """
    from rarefy.integrations.transformers.long_evaluation import evaluate_long as run

    wanted: dict[str, Any] = {
        "length": length, "sessions": sessions, "documents": documents, "chunk": chunk, "seed": seed,
    }  # fmt: skip
    wanted |= {} if tasks is None else {"tasks": tuple(tasks)}
    return run(
        models, reference, data, wanted, session_files=session_files, cache=cache, kv=kv, attention=attention,
        work_dir=work_dir, dtype=dtype, device=device, tokenizer=tokenizer,
    )  # fmt: skip


def merge_adapter(model: Any, recipe: str | Path | Recipe | None = None) -> PreTrainedModel:
    """Merge the active LoRA adapters of a PEFT model into its compressed base by compressing the sums anew.

    ``recipe``: how to compress; None repeats each layer's own rule. Returns the base model without adapters, ready for
    ``save``; the error that compressing anew adds is logged per layer. Raises OptionError when there is no adapter, and
    UnsupportedError for adapters that are not additive.
    """
    from rarefy.integrations.peft import merge_adapter as merge

    return merge(model, None if recipe is None else load_recipe(recipe))
