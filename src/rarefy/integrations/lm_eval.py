"""lm-eval: its tasks on any model of ours, from the hub or from local files, and ``rarefy`` as a model type in it.

``import rarefy.integrations.lm_eval`` makes ``lm_eval.simple_evaluate(model="rarefy", model_args="pretrained=...")``
understand every way to name a model: compressed folders, hub ids, .gguf files, ``demo``.
"""

from __future__ import annotations

import functools
import gc
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rarefy.core.errors import OptionError, SourceError, UnsupportedError, first_line
from rarefy.core.progress import Advance, progress
from rarefy.evaluation.bootstrap import Statistic, paired_interval
from rarefy.evaluation.candidates import Candidate
from rarefy.evaluation.forward import CacheFactory, cache_argument, forward, new_cache
from rarefy.evaluation.journal import Journal
from rarefy.evaluation.results import Sizes
from rarefy.evaluation.tasks.files import file_names, find_records
from rarefy.evaluation.tasks.own import OWN, RUNS_CODE
from rarefy.evaluation.tasks.results import TaskComparison, TaskEvaluation, TaskScore
from rarefy.evaluation.tasks.sandbox import sandbox
from rarefy.integrations.transformers import models as folders
from rarefy.sources.models import open_model

try:
    import datasets
    from lm_eval import evaluate
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
except ImportError as failure:
    raise UnsupportedError(
        f"Tasks run through lm-eval, which cannot be imported here ({failure}); run: pip install lm-eval"
    ) from None

# Sequences of a forward pass: enough to keep two cores busy with short questions, or a GPU.
CPU_BATCH = 8
GPU_BATCH = 64
# Draws the examples in the prompt; lm-eval's own default.
SEED = 1234
# Values of metrics by example; what an example's value is (a number, a pair) is up to the metric.
Values = dict[tuple[str, str], list[Any]]


@register_model("rarefy")
class RarefyLM(HFLM):
    """lm-eval's Transformers model, for models of ours.

    ``pretrained``: a loaded model, or a name that ``rarefy.load`` takes. With ``chunk`` likelihoods are computed in
    passes of that many tokens through what ``cache`` makes (None: the dense cache), and generation uses it too, so that
    a coded cache shows in the score; lm-eval itself scores in one pass, which reads no cache.
    """

    def __init__(
        self,
        pretrained: Any,
        tokenizer: Any = None,
        cache: CacheFactory | None = None,
        chunk: int | None = None,
        batch_size: int | str | None = None,
        device: str | None = None,
        **options: Any,
    ):
        if isinstance(pretrained, str):
            folder = open_model(pretrained).folder
            place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
            model: Any = folders.load_folder(folder, dtype=options.pop("dtype", "auto"))
            pretrained = model.to(place)
            tokenizer = tokenizer or folders.load_tokenizer(folder)
        self._cache, self._chunk = cache, None if chunk is None else int(chunk)
        self._advance: Advance | None = None
        size = batch_size or (CPU_BATCH if pretrained.device.type == "cpu" else GPU_BATCH)
        with _quiet():
            super().__init__(pretrained=pretrained, tokenizer=tokenizer, batch_size=size, **options)

    def _model_call(self, inps: torch.Tensor, attn_mask: Any = None, labels: Any = None) -> torch.Tensor:
        if attn_mask is not None or labels is not None:
            return super()._model_call(inps, attn_mask, labels)
        logits = forward(self.model, inps, cache=self._cache, chunk=self._chunk)
        if self._advance is not None:
            self._advance(inps.shape[0])
        return logits

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: Any, **options: Any) -> torch.Tensor:
        if self._cache is not None:
            options[cache_argument(self.model.generate)] = new_cache(self.model, self._cache)
        with torch.inference_mode():
            tokens = super()._model_generate(context, max_length, stop, **options)
        if self._advance is not None:
            self._advance(context.shape[0])
        return tokens

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        with self._progress(requests):
            return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        with self._progress(requests, None):
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        with self._progress(requests):
            return super().generate_until(requests, disable_tqdm=True)

    @contextmanager
    def _progress(self, requests: list[Any], total: float | None = 0) -> Iterator[None]:
        with progress(requests[0].task_name or "tasks", len(requests) if total == 0 else total) as self._advance:
            yield
        self._advance = None


class _Job(NamedTuple):
    """How every model is run."""

    tokenizer: Any
    limit: int | None
    few_shot: int | None
    chunk: int | None
    batch: int | None
    data: str


def evaluate_tasks(
    candidates: Sequence[Candidate],
    tasks: Sequence[str],
    tokenizer: Any,
    *,
    reference: Candidate | None = None,
    limit: int | None = None,
    few_shot: int | None = None,
    task_data: Path | None = None,
    chunk: int | None = None,
    batch: int | None = None,
    allow_code: bool = False,
    work_dir: Path | None = None,
) -> TaskComparison:
    """Scores of ``tasks`` (names of lm-eval, of our own, or YAML files) for every model on the same examples.

    Examples come from files in ``task_data`` (see `find_records`), those that have none there from the hub; ``limit``
    takes the first of each task. With a ``reference`` each score has the difference from it. Models are loaded one
    after another. ``work_dir`` keeps finished tasks of models that live in folders. Raises OptionError, SourceError
    (data that cannot be had), UnsupportedError.
    """
    everyone = [*candidates] if reference is None else [reference, *candidates]
    if not everyone or not tasks:
        raise OptionError("Name at least one model and one task to evaluate.")
    if any(task in RUNS_CODE for task in tasks):
        if not allow_code:
            raise OptionError(f"Task '{min(RUNS_CODE & {*tasks})}' runs what the model writes; allow it: --allow-code.")
        sandbox()
    loaded, groups, origin = _load_tasks(tasks, task_data)
    job = _Job(tokenizer, limit, few_shot, chunk, batch, origin)
    journal = Journal(work_dir)
    measured = [_measure(candidate, loaded, job, journal) for candidate in everyone]
    results = []
    for candidate, (values, dtype, seconds) in zip(everyone, measured, strict=True):
        against = measured[0][0] if reference is not None and candidate is not reference else None
        scores = [score for task in loaded for score in _scores(loaded[task], task, [task], values, against)]
        for name, members in groups.items():
            scores += _scores(loaded[members[0]], name, members, values, against)
        sizes = candidate.sizes or Sizes()
        results.append(
            TaskEvaluation(
                model=candidate.name, scores=tuple(scores), limit=limit, few_shot=few_shot, data=origin, dtype=dtype,
                chunk=chunk, bits_per_weight=sizes.bits_per_weight, stored_bytes=sizes.stored_bytes,
                dense_bytes=sizes.dense_bytes, seconds=seconds,
            )
        )  # fmt: skip
    dense = results.pop(0) if reference is not None else None
    return TaskComparison(candidates=results, reference=dense)


def _load_tasks(names: Sequence[str], folder: Path | None) -> tuple[dict[str, Any], dict[str, list[str]], str]:
    """lm-eval's task objects by name, the members of the groups among ``names``, and where the examples are from."""
    manager = _manager()
    loaded: dict[str, Any] = {}
    groups: dict[str, list[str]] = {}
    origins = []
    for name in names:
        found = None if folder is None else find_records(folder, name)
        spec: Any = dict(OWN[name]) if name in OWN else name
        if found is not None:
            local: dict[str, Any] = {"custom_dataset": _Dataset(found[0]), "test_split": "test"}
            local |= dict.fromkeys(("training_split", "validation_split", "fewshot_split"))
            # A group is lm-eval's way to change a task that it defines.
            spec = {**spec, **local} if name in OWN else {"group": "local", "task": [{"task": name, **local}]}
        elif name in OWN:
            where = "--task-data has none of them" if folder else "name their folder with --task-data"
            raise SourceError(f"Task '{name}' reads the local file {file_names(name)}; {where}.")
        with _quiet():
            try:
                part = manager.load([spec])
            except KeyError:
                raise OptionError(f"Task '{name}' is unknown to lm-eval and not a YAML file; check its name.") from None
            except OSError as failure:
                reason = first_line(failure)
                raise SourceError(
                    f"The examples of task '{name}' cannot be had from the hub ({reason}); put {file_names(name)} into "
                    "a folder and name it with --task-data."
                ) from None
        loaded |= part["tasks"]
        if found is None and len(part["tasks"]) > 1:
            groups[name] = list(part["tasks"])
        origins.append(found[1].name if found else "hub" if not name.endswith(".yaml") else Path(name).name)
    return loaded, groups, ", ".join(dict.fromkeys(origins))


@functools.cache
def _manager() -> TaskManager:
    """lm-eval's index of tasks; reading its thousands of files takes seconds."""
    return TaskManager()


class _Dataset:
    """Local records where lm-eval expects something that fetches a data set."""

    def __init__(self, records: list[dict[str, Any]]):
        self._records = records

    def __call__(self, **_: Any) -> Any:
        return datasets.DatasetDict(test=datasets.Dataset.from_list(self._records))

    def __deepcopy__(self, memo: Any) -> _Dataset:  # lm-eval copies configurations
        return self


def _measure(candidate: Candidate, tasks: dict[str, Any], job: _Job, journal: Journal) -> tuple[Values, str, float]:
    """Every metric of every example of ``tasks``, by task and metric; the dtype; and the seconds it took."""
    values: Values = {}
    dtype, seconds = "", 0.0
    lm: RarefyLM | None = None
    for name, task in tasks.items():
        key = {
            "task": name, "version": str(task.VERSION), "limit": job.limit, "few_shot": job.few_shot,
            "chunk": job.chunk, "data": job.data, "model": candidate.identity,
        }  # fmt: skip
        kept = journal.take(key) if candidate.identity else None
        if kept is None:
            begin = time.perf_counter()
            if lm is None:
                lm = RarefyLM(
                    candidate.open(), job.tokenizer, cache=candidate.cache, chunk=job.chunk, batch_size=job.batch
                )
            kept = _run(lm, task, job)
            kept |= {"dtype": str(lm.model.dtype).removeprefix("torch."), "seconds": time.perf_counter() - begin}
            if candidate.identity:
                journal.keep(key, kept)
        for metric, items in kept["values"]:
            values[name, metric] = items
        dtype, seconds = kept["dtype"], seconds + kept["seconds"]
    if lm is not None:
        candidate.share_read(lm.model)  # warns where a plan stayed dense
        lm._model = None
        del lm
        gc.collect()  # models hold reference cycles, and the next one needs their memory
    return values, dtype, seconds


def _run(lm: RarefyLM, task: Any, job: _Job) -> dict[str, Any]:
    """The values of one task by ``metric,filter``. Not through ``simple_evaluate``, which looks at the whole machine
    (compilers, package lists) after every task; what it does to a task beforehand is done here."""
    shots = task.get_config("num_fewshot")
    if shots != 0 and job.few_shot is not None:  # a task that insists on none keeps none
        shots = job.few_shot
    task.set_config(key="num_fewshot", value=shots or 0)
    task.set_fewshot_seed(seed=SEED)
    with _quiet():
        outcome = evaluate(
            lm=lm, task_dict={"tasks": {task.task_name: task}}, limit=job.limit, bootstrap_iters=0, log_samples=True,
            confirm_run_unsafe_code=True,
        )  # fmt: skip
    assert outcome is not None
    values: dict[str, list[Any]] = {}
    for sample in next(iter(outcome["samples"].values())):
        for metric in sample["metrics"]:
            values.setdefault(f"{metric},{sample['filter']}", []).append(sample[metric])
    return {"values": list(values.items())}


def _scores(
    task: Any, name: str, members: Sequence[str], values: Values, against: Values | None
) -> Iterator[TaskScore]:
    """The scores of one task, or of a group: that of all the examples of its members, as if they were one task."""
    for (owner, key), items in values.items():
        if owner != members[0]:
            continue
        metric, _, answer = key.rpartition(",")
        aggregate = task.aggregation().get(metric)
        if aggregate is None:
            continue
        items = [item for member in members for item in values.get((member, key), ())]
        difference = None
        if against is not None:
            theirs = [item for member in members for item in against.get((member, key), ())]
            plain = all(isinstance(item, int | float) for item in items) and aggregate.__name__ == "mean"
            statistic: Statistic | None = None if plain else aggregate
            difference = paired_interval(items, theirs, statistic)
        yield TaskScore(
            task=name, version=str(task.VERSION), metric=metric, filter=answer, value=float(aggregate(items)),
            examples=len(items), higher_is_better=bool(task.higher_is_better().get(metric, True)),
            difference=difference,
        )  # fmt: skip


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval's advice to its own users out of the way; ours has its own words."""
    names = ("lm_eval", "datasets")
    before = {name: logging.getLogger(name).level for name in names}
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
