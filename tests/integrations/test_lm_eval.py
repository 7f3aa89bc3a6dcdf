"""Tasks through lm-eval: its own numbers on dense models, differences from them, and runs that go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import rarefy
from rarefy.core.errors import OptionError, SourceError, UnsupportedError
from tests.caches import bad_cache, perfect_cache
from tests.zoo import dense_folder, tiny_tokenizer

lm_eval = pytest.importorskip("lm_eval")
PIQA = [
    {"goal": f"a {word} b", "sol1": f"c {word} d", "sol2": f"e f {word} g h", "label": n % 2}
    for n, word in enumerate("ijklmnopqr")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model ``dense``, a compressed one ``small``, and examples of tasks in ``data``."""
    root = tmp_path_factory.mktemp("tasks")
    dense_folder("llama", root / "dense", initializer_range=0.5)
    tiny_tokenizer().save_pretrained(root / "dense")
    rarefy.compress(root / "dense", options={"num_bits": 2, "group_size": 16}, out=root / "small", device="cpu")
    (root / "data").mkdir()
    (root / "data" / "piqa.jsonl").write_text("\n".join(map(json.dumps, PIQA)))
    texts = [{"text": f"a b {first} c {second}"} for first, second in zip("abcdefgh", "hgfedcba", strict=True)]
    (root / "data" / "lambada_test.jsonl").write_text("\n".join(map(json.dumps, texts)))
    return root


def plain_lm_eval(model: Any, tokenizer: Any, records: list[dict[str, Any]], limit: int | None) -> dict[str, float]:
    """piqa by lm-eval alone, with nothing of ours in between."""
    import datasets
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    def local(**_: Any) -> Any:
        return datasets.DatasetDict(validation=datasets.Dataset.from_list(records))

    override = {"task": "piqa", "custom_dataset": local, "training_split": None}
    own = Path(lm_eval.tasks.__file__).parent / "piqa"  # to read of all tasks takes seconds
    manager = TaskManager(include_path=str(own), include_defaults=False)
    tasks = list(manager.load([{"group": "g", "task": [override]}])["tasks"].values())
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    found = lm_eval.simple_evaluate(model=lm, tasks=tasks, task_manager=manager, limit=limit, bootstrap_iters=0)
    return {metric: found["results"]["piqa"][f"{metric},none"] for metric in ("acc", "acc_norm")}


def scores(evaluation: Any) -> dict[tuple[str, str], float]:
    return {(score.task, score.metric): score.value for score in evaluation.scores}


@pytest.mark.parametrize("name", ["dense", "small"])
def test_scores_equal_those_of_lm_eval(folder: Path, name: str) -> None:
    wanted = plain_lm_eval(rarefy.load(folder / name), tiny_tokenizer(), PIQA, None)
    found = rarefy.evaluate_tasks([folder / name], ["piqa"], task_data=folder / "data", device="cpu").candidates[0]
    assert scores(found) == {("piqa", metric): value for metric, value in wanted.items()}
    assert 0 < wanted["acc"] < 1 and found.scores[0].examples == 10 and found.data == "piqa.jsonl"


@pytest.mark.demo
def test_the_real_model_scores_what_lm_eval_says(tmp_path: Path) -> None:
    records = [
        {"goal": "To boil an egg,", "sol1": "put it into boiling water.", "sol2": "put it into a shoe.", "label": 0},
        {"goal": "To open a locked door,", "sol1": "sing to it.", "sol2": "turn the key in the lock.", "label": 1},
        {"goal": "To dry wet clothes,", "sol1": "hang them in the sun.", "sol2": "hang them in a river.", "label": 0},
        {"goal": "To sharpen a pencil,", "sol1": "use a pillow.", "sol2": "use a pencil sharpener.", "label": 1},
    ]
    (tmp_path / "piqa.jsonl").write_text("\n".join(map(json.dumps, records)))
    model = rarefy.load("demo", dtype="float32")
    wanted = plain_lm_eval(model, rarefy.load_tokenizer("demo"), records, 3)
    found = rarefy.evaluate_tasks(["demo"], ["piqa"], task_data=tmp_path, limit=3, dtype="float32", device="cpu")
    assert scores(found.candidates[0]) == {("piqa", metric): value for metric, value in wanted.items()}


def test_differences_from_the_reference_are_paired(folder: Path) -> None:
    given = {"task_data": folder / "data", "reference": folder / "dense", "device": "cpu"}
    found = rarefy.evaluate_tasks([folder / "dense", folder / "small"], ["piqa", "lambada_openai"], **given)
    assert found.reference is not None and all(score.difference is None for score in found.reference.scores)
    same, small = found.candidates
    for score in same.scores:
        assert score.difference is not None
        assert (score.difference.value, score.difference.low, score.difference.high) == (0, 0, 0)
    changed = {score.metric: score for score in small.scores if score.task == "lambada_openai"}
    dense = scores(found.reference)["lambada_openai", "perplexity"]
    gap = changed["perplexity"].difference
    assert gap is not None and gap.low < gap.value < gap.high and not changed["perplexity"].higher_is_better
    assert gap.value == pytest.approx(changed["perplexity"].value - dense)
    assert small.bits_per_weight is not None and small.bits_per_weight["total"] < 4


def test_a_bad_cache_is_told_from_a_perfect_one(folder: Path) -> None:
    given = {"task_data": folder / "data", "reference": folder / "dense", "chunk": 2, "device": "cpu"}
    for cache, differs in ((perfect_cache, False), (bad_cache, True)):
        found = rarefy.evaluate_tasks([folder / "dense"], ["lambada_openai"], cache=cache, **given).candidates[0]
        gap = next(score.difference for score in found.scores if score.metric == "perplexity")
        assert gap is not None and (abs(gap.value) > 1) == differs and found.chunk == 2


def test_caches_and_plans_are_scored_by_name(folder: Path, tmp_path: Path) -> None:
    texts = [{"text": " ".join([*"abcdefghijklmnopqrstuv", first])} for first in "abcdefgh"]
    (tmp_path / "lambada_test.jsonl").write_text("\n".join(map(json.dumps, texts)))
    given: dict[str, Any] = {"task_data": tmp_path, "device": "cpu", "chunk": 4}
    plan = "random:density=0.1,dense_below=0,block_q=4,block_k=4,max_density=1"
    found = rarefy.evaluate_tasks(
        [folder / "dense"], ["lambada_openai"], kv=["kivi:num_bits=2,group_size=8,residual=8", "identity"],
        attention=["dense", plan], **given,
    )  # fmt: skip
    assert found.reference is not None and [each.model.split(", ")[1][:6] for each in found.candidates] == [
        "dense", "dense", "random", "random",
    ]  # fmt: skip
    wanted = [score.value for score in found.reference.scores]
    coded, dense, *sparse = ([score.value for score in each.scores] for each in found.candidates)
    assert dense == pytest.approx(wanted, rel=1e-5) and coded != wanted
    assert all(each != pytest.approx(wanted, rel=1e-5) for each in sparse)
    with pytest.raises(OptionError, match="kv= needs chunk="):
        rarefy.evaluate_tasks([folder / "dense"], ["piqa"], kv=["kivi"], device="cpu")


def test_a_run_goes_on_where_it_stopped(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"task_data": folder / "data", "device": "cpu", "work_dir": tmp_path / "work"}
    first = rarefy.evaluate_tasks([folder / "dense"], ["piqa"], **given)
    monkeypatch.setattr("rarefy.integrations.lm_eval.RarefyLM", None)  # nothing may be run again
    assert rarefy.evaluate_tasks([folder / "dense"], ["piqa"], **given) == first
    with pytest.raises(TypeError):
        rarefy.evaluate_tasks([folder / "dense"], ["piqa"], limit=3, **given)


def test_lm_eval_knows_our_models_by_name(folder: Path) -> None:
    import rarefy.integrations.lm_eval  # noqa: F401

    arguments = {"pretrained": str(folder / "small"), "device": "cpu"}
    lm = lm_eval.api.registry.get_model("rarefy").create_from_arg_obj(arguments)
    assert lm.model.config.quantization_config is not None and lm.batch_size == 8


def test_programs_are_run_when_that_is_allowed(tmp_path: Path) -> None:
    """Whatever the model writes goes into a comment of one problem, and makes the other one no Python."""
    from rarefy.evaluation.tasks import sandbox

    try:
        sandbox.sandbox()
    except UnsupportedError as failure:
        pytest.skip(str(failure))
    dense_folder("llama", tmp_path / "dense", max_position_embeddings=600)
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    test = "def check(f):\n    assert f() == 1"
    prompts = ("def f():\n    return 1\n# a b", "def f():\n    return 1 1")
    problems = [{"prompt": prompt, "test": test, "entry_point": "f"} for prompt in prompts]
    (tmp_path / "humaneval_greedy.jsonl").write_text("\n".join(map(json.dumps, problems)))
    found = rarefy.evaluate_tasks(
        [tmp_path / "dense"], ["humaneval_greedy"], task_data=tmp_path, allow_code=True, device="cpu"
    )
    assert [(score.metric, score.value) for score in found.candidates[0].scores] == [("pass_at_1", 0.5)]


def test_tasks_that_cannot_be_run_are_named(folder: Path, tmp_path: Path) -> None:
    def run(*tasks: str, **options: Any) -> Any:
        return rarefy.evaluate_tasks([folder / "dense"], list(tasks), device="cpu", **options)

    with pytest.raises(OptionError, match="Task 'nonsense' is unknown"):
        run("nonsense")
    with pytest.raises(SourceError, match=r"'arc_easy' cannot be had from the hub .*'arc_easy\.jsonl' or"):
        run("arc_easy", task_data=tmp_path)
    with pytest.raises(SourceError, match=r"'mmlu_flat' reads the local file 'mmlu_flat\.jsonl'"):
        run("mmlu_flat")
    with pytest.raises(OptionError, match="runs what the model writes"):
        run("humaneval_greedy", task_data=tmp_path)
    with pytest.raises(OptionError, match="one task"):
        run()
