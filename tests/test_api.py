"""The verbs, end to end, with models that fit in a page."""

from __future__ import annotations

import itertools
import json
import math
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import rarefy
from rarefy.contracts import Recipe, Rule
from rarefy.core.errors import OptionError, RecipeError, SourceError, UnsupportedError
from rarefy.integrations.transformers.models import is_compressed
from rarefy.layers.swap import compressed
from tests.zoo import FAMILIES, dense_folder, logits, same_bytes, tensors, tiny_tokenizer

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
INT8 = {"num_bits": 8, "group_size": 16}
TEXT = {"context": 16, "windows": 4, "device": "cpu"}


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer, trained enough on one text for its bits to matter."""
    folder = tmp_path_factory.mktemp("api") / "dense"
    model = dense_folder("llama", folder)
    tokenizer = tiny_tokenizer()
    tokens = torch.tensor([tokenizer(words())["input_ids"][:256]]).view(-1, 32)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(30):
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(dense: Path) -> Path:
    path = dense.parent / "words.txt"
    path.write_text(words())
    return path


@pytest.fixture(scope="module")
def small(dense: Path) -> dict[int, Path]:
    """Bits -> compressed folder."""
    made = {bits: dense.parent / f"int{bits}" for bits in (8, 2)}
    for bits, out in made.items():
        rarefy.compress(dense, "rtn", options={"num_bits": bits, "group_size": 16}, out=out, device="cpu")
    return made


def words() -> str:
    """A text with structure that a small model can learn in part: a word starts with what ended the one before."""
    dice, letters = random.Random(0), "abcdefgh"
    marks = [dice.choice(letters) for _ in range(401)]
    return " ".join(first + second for first, second in itertools.pairwise(marks))


def test_everything_public_is_there() -> None:
    assert set(rarefy.__all__) == {
        "attention_maps", "compare", "compare_caches", "compress", "evaluate", "evaluate_long", "evaluate_tasks",
        "kv_cache", "load", "load_tokenizer", "merge_adapter", "runner", "save", "set_attention", "train",
    }  # fmt: skip
    for name in rarefy.__all__:
        assert getattr(rarefy, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'quantize'"):
        rarefy.quantize  # noqa: B018


@pytest.mark.compat
def test_compress_load_save(dense: Path, small: dict[int, Path], tmp_path: Path) -> None:
    model = rarefy.load(small[8])
    assert isinstance(model, transformers.LlamaForCausalLM) and not model.training
    assert is_compressed(small[8]) and not is_compressed(dense)
    assert type(rarefy.load(dense)) is type(model) and not list(compressed(rarefy.load(dense)))
    rarefy.save(model, tmp_path / "again")
    assert same_bytes(tensors(tmp_path / "again"), tensors(small[8]))
    assert rarefy.load_tokenizer(tmp_path / "again")("ab cd")["input_ids"] == tiny_tokenizer()("ab cd")["input_ids"]
    with pytest.raises(OptionError, match="not empty"):
        rarefy.save(model, tmp_path / "again")
    rarefy.save(model, tmp_path / "again", overwrite=True, max_shard_size="20KB")
    assert torch.equal(logits(rarefy.load(tmp_path / "again"), "llama"), logits(model, "llama"))
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1


def test_saving_over_the_folder_it_came_from(small: dict[int, Path], tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(small[8], tmp_path / "model"))
    model = rarefy.load(folder)
    expected = logits(model, "llama")
    rarefy.save(model, folder, overwrite=True)
    assert (folder / "tokenizer.json").is_file()
    assert torch.equal(logits(rarefy.load(folder), "llama"), expected)


def test_report(dense: Path, tmp_path: Path) -> None:
    report = rarefy.compress(dense, "rtn", options=INT8, out=tmp_path / "small", device="cpu")
    assert report.model == "dense" and report.recipe == "rtn" and report.out == str(tmp_path / "small")
    assert 8 < report.bits_per_weight["total"] < 13  # rows end in whole words of 32 codes
    assert report.stored_bytes < report.dense_bytes and report.peak_bytes > 0 and report.seconds > 0
    assert len(report.layers) == 14 and report.fallbacks == () and report.skipped == {"lm_head": "output head"}
    assert json.loads(report.model_dump_json())["layers"][0]["relative_error"] < 0.01
    assert any("dense reference" in note for note in report.notes)


def test_recipes_as_objects_and_files(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(
        "rules:\n- {method: rtn, targets: ['re:.*mlp'], options: {num_bits: 4, group_size: 16}}\n- method: rtn\n"
        "  options: {num_bits: 8, group_size: 16}\n"
    )
    rules = (
        Rule(method="rtn", targets=("re:.*mlp",), options={"num_bits": 4, "group_size": 16}),
        Rule(method="rtn", options={"num_bits": 8, "group_size": 16}),
    )
    one = rarefy.compress(dense, tmp_path / "own.yaml", out=tmp_path / "one", device="cpu")
    two = rarefy.compress(dense, Recipe(name="own", rules=rules), out=tmp_path / "two", device="cpu")
    assert one.recipe == two.recipe == "own"
    assert (tmp_path / "one" / "config.json").read_bytes() == (tmp_path / "two" / "config.json").read_bytes()
    assert same_bytes(tensors(tmp_path / "one"), tensors(tmp_path / "two"))
    bits = {layer.name: round(layer.bits_per_weight) for layer in one.layers}
    assert bits["model.layers.0.mlp.up_proj"] < 8 < bits["model.layers.0.self_attn.q_proj"]


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ("rtm", None, "did you mean 'rtn'"), ("rtn", {"bits": 4}, "'bits' is not an option"),
        ("rtn", {"num_bits": 0}, "num_bits"), ("rtn", {"num_bits": "four"}, "num_bits"),
        ("missing.yaml", None, "does not exist"), ("rtn", {"format": "fp5"}, "format"),
    ],
)  # fmt: skip
def test_wrong_recipes(recipe: str, options: Any, message: str, dense: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        rarefy.compress(dense, recipe, options=options, out=tmp_path / "small")
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_shard_size": "big"}, "is not a size"), ({"max_shard_size": "0GB"}, "is not a size"),
        ({"device": "abacus"}, "abacus"), ({"max_shard_size": -5}, "is not a size"),
    ],
)  # fmt: skip
def test_wrong_settings(settings: dict[str, Any], message: str, dense: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=message):
        rarefy.compress(dense, "rtn", out=tmp_path / "small", **settings)


def test_wrong_sources(tmp_path: Path) -> None:
    for name in ("no/such/model/here", str(tmp_path)):
        with pytest.raises(SourceError):
            rarefy.load(name)
        with pytest.raises(SourceError):
            rarefy.compress(name, "rtn", out=tmp_path / "small")


def test_evaluate_against_the_dense_model(dense: Path, small: dict[int, Path], text: Path) -> None:
    near = rarefy.evaluate(small[8], reference=dense, data=text, **TEXT)
    far = rarefy.evaluate(small[2], reference=dense, data=text, **TEXT)
    assert near.kl is not None and far.kl is not None and near.top1_agreement is not None
    assert 0 <= near.kl < 0.01 < far.kl and near.top1_agreement > 0.9
    assert near.perplexity == pytest.approx(math.exp(near.nll)) and near.tokens == 4 * 15
    assert near.bits_per_weight is not None and 8 < near.bits_per_weight["total"] < 13
    assert near.stored_bytes is not None and near.dense_bytes is not None and near.stored_bytes < near.dense_bytes
    in_files = sum(tensor.numel() * tensor.element_size() for tensor in tensors(small[8]).values())
    assert near.stored_bytes == in_files


def test_perplexity_equals_an_independent_computation(dense: Path, small: dict[int, Path], text: Path) -> None:
    result = rarefy.evaluate(small[8], data=text, dtype="float32", **TEXT)
    tokens = torch.tensor(tiny_tokenizer()(text.read_text())["input_ids"][: 4 * 16]).view(4, 16)
    with torch.no_grad():
        losses = [float(rarefy.load(small[8])(row[None], labels=row[None]).loss) for row in tokens]
    assert result.perplexity == pytest.approx(math.exp(sum(losses) / 4), rel=1e-4)
    assert result.kl is None and result.top1_agreement is None


def test_compare_takes_folders_and_models(dense: Path, small: dict[int, Path], text: Path) -> None:
    model = rarefy.load(small[8])
    found = rarefy.compare([small[8], small[2], model, dense], reference=dense, data=text, **TEXT)
    assert found.candidates[0].kl == pytest.approx(found.candidates[2].kl)
    assert found.candidates[3].kl == pytest.approx(0, abs=1e-6) and found.candidates[3].top1_agreement == 1.0
    assert found.reference is not None and found.candidates[3].perplexity == pytest.approx(found.reference.perplexity)
    assert found.candidates[1].perplexity > found.candidates[0].perplexity
    dense_bytes = sum(
        tensor.numel() * tensor.element_size() for tensor in load_file(dense / "model.safetensors").values()
    )
    assert found.candidates[3].stored_bytes == dense_bytes


def test_evaluating_what_cannot_be(dense: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="at least one model"):
        rarefy.compare([], data=text, **TEXT)
    bare = FAMILIES["llama"].build()
    with pytest.raises(OptionError, match="pass tokenizer="):
        rarefy.evaluate(bare, data=text, **TEXT)
    assert rarefy.evaluate(bare, data=text, tokenizer=tiny_tokenizer(), **TEXT).perplexity > 20


@pytest.mark.compat
def test_merge_adapter(small: dict[int, Path], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    model = peft.get_peft_model(rarefy.load(small[8]), config).eval()
    wanted = logits(model, "llama")
    merged = rarefy.merge_adapter(model, "rtn")
    assert float((logits(merged, "llama") - wanted).norm() / wanted.norm()) > 0
    rarefy.save(merged, tmp_path / "merged")
    assert torch.equal(logits(rarefy.load(tmp_path / "merged"), "llama"), logits(merged, "llama"))


def test_what_is_no_model_or_dtype_is_one_sentence(dense: Path) -> None:
    with pytest.raises(OptionError, match="A Linear is no model of Transformers"):
        rarefy.compress(torch.nn.Linear(3, 3), "rtn")  # type: ignore[arg-type]
    for wrong in ("foo", "int8"):
        with pytest.raises(OptionError, match=f"dtype '{wrong}' is unknown; use auto, float32"):
            rarefy.load(dense, dtype=wrong)


def test_a_model_that_no_runner_knows_names_the_way_there_is() -> None:
    with pytest.raises(UnsupportedError, match=r"model class GPT2LMHeadModel\. Use model\.generate\."):
        rarefy.runner(FAMILIES["gpt2"].build())
