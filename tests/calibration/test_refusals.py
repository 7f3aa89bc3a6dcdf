"""What cannot be calibrated is refused in one sentence; what is scarce is used and said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import rarefy
from rarefy.calibration.samples import Samples, as_samples, sample_windows
from rarefy.contracts import Recipe, Rule
from rarefy.core.errors import OptionError, RecipeError, UnsupportedError
from rarefy.layers.swap import compressed
from tests.calibration.oracle import assert_inputs, input_moments, wide
from tests.calibration.recipes import SEEN
from tests.zoo import RELATIVES, VOCABULARY, Family, dense_folder, family_of, tiny_tokenizer

transformers.logging.set_verbosity_error()


def compress(model: Any, data: Any, method: str = "inputs_for_tests", **settings: Any) -> Any:
    SEEN.clear()
    ignore, targets = settings.pop("ignore", ()), settings.pop("targets", ("Linear",))
    recipe = Recipe(name=method, rules=(Rule(method=method, ignore=ignore, targets=targets),))
    return rarefy.compress(model, recipe, data=data, **({"device": "cpu"} | settings))


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(2))


# Models


def test_an_encoder_and_a_decoder_at_once() -> None:
    with pytest.raises(UnsupportedError, match=r"several stacks .*\(encoder\.block, decoder\.block\).*'ignore'"):
        compress(family_of("t5").build(), tokens(2, 8))


def test_a_decoder_alone() -> None:
    """Of an encoder-decoder, on data that has both sides; not where its encoder's padding would count."""
    family = family_of("t5")
    data = [{"input_ids": tokens(2, 9), "decoder_input_ids": tokens(2, 6)}]
    model = family.build()
    dense = {name: parameter.clone() for name, parameter in model.named_parameters()}
    compress(model, data, ignore=("re:encoder", "lm_head"))
    assert len(list(compressed(model))) == 22 and all(name.startswith("decoder.") for name, _ in compressed(model))
    assert SEEN["decoder.block.0.layer.0.SelfAttention.q"].statistics.tokens == 12
    assert SEEN["decoder.block.0.layer.1.EncDecAttention.k"].statistics.tokens == 18
    kept = "encoder.block.0.layer.0.SelfAttention.q.weight"
    assert torch.equal(model.get_parameter(kept), dense[kept])
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, 5:] = 0
    with pytest.raises(UnsupportedError, match="without padding"):
        compress(family.build(), [{**data[0], "attention_mask": mask}], ignore=("re:encoder", "lm_head"))
    with pytest.raises(OptionError, match=r"cannot run on the calibration data with input_ids"):
        compress(family.build(), tokens(2, 8), ignore=("re:encoder", "lm_head"))


def test_blocks_that_are_run_more_than_once() -> None:
    values = {**RELATIVES["bert_features"].values, "embedding_size": 24, "num_hidden_groups": 1}
    albert = Family("AlbertForMaskedLM", "AlbertConfig", values).build()
    with pytest.raises(UnsupportedError, match=r"AlbertForMaskedLM runs '.*' out of order or more than once"):
        compress(albert, tokens(2, 8))


def test_blocks_that_change_the_shape_of_their_input() -> None:
    values = {"image_size": 16, "patch_size": 2, "embed_dim": 12, "depths": [1, 1], "num_heads": [2, 2]}
    values["window_size"] = 2
    swin = Family("SwinForImageClassification", "SwinConfig", values).build()
    with pytest.raises(UnsupportedError, match=r"Block 'swin\.encoder\.layers\.0' turns \[2, 64, 12\] into"):
        compress(swin, [{"pixel_values": torch.randn(2, 3, 16, 16)}])


def test_layers_that_lie_in_no_block() -> None:
    with pytest.raises(UnsupportedError, match="data-free recipe"):
        compress(family_of("bert_labels").build(), tokens(2, 8), targets=("bert.pooler.dense",))


def test_an_output_head_that_is_named() -> None:
    """It lies behind the blocks and sees what the compressed ones give it."""
    model = family_of("llama").build()
    compress(model, tokens(3, 8), targets=("Linear", "re:lm_head"))
    assert_inputs({"lm_head": SEEN["lm_head"]}, input_moments(wide(model), [{"input_ids": tokens(3, 8)}]), 1)
    assert int(SEEN["lm_head"].statistics.tokens) == 24


def test_values_that_are_no_numbers() -> None:
    model = family_of("llama").build()
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] = float("nan")
    with pytest.raises(RecipeError, match=r"'model\.layers\.1\.self_attn\.q_proj': its inputs are NaN or infinite"):
        compress(model, tokens(2, 8))
    assert not list(compressed(model))
    model = family_of("llama").build()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3] = float("inf")
    with pytest.raises(RecipeError, match=r"'model\.layers\.1\.mlp\.(up|down)_proj'"):
        compress(model, tokens(2, 8))


def test_dead_channels() -> None:
    model = family_of("llama").build()
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[5:9] = 0
    compress(model, tokens(2, 8))
    gram = SEEN["model.layers.1.self_attn.q_proj"].statistics.gram.sum
    assert (gram.diagonal()[5:9] == 0).all() and (gram.diagonal()[9:] > 0).all()


# Data


def test_text_shorter_than_a_sequence(tmp_path: Path) -> None:
    dense_folder("llama", tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    (tmp_path / "short.txt").write_text("a b c d e f g")
    report = compress(tmp_path / "dense", tmp_path / "short.txt", out=tmp_path / "small", seq_len=32, samples=4)
    assert "the calibration text has 7 tokens, fewer than one sequence of 32" in report.notes
    assert int(SEEN["model.layers.0.mlp.up_proj"].statistics.tokens) in (7, 8)
    (tmp_path / "some.txt").write_text("a b c d e f g h " * 12)
    report = compress(tmp_path / "dense", tmp_path / "some.txt", out=tmp_path / "other", seq_len=32, samples=9)
    assert any("3 sequences of 32 tokens, not 9" in note for note in report.notes)
    (tmp_path / "one.txt").write_text("a")
    with pytest.raises(OptionError, match=r"text '.*one.*' has 1 tokens; give a longer one \(--data\)"):
        compress(tmp_path / "dense", tmp_path / "one.txt", out=tmp_path / "third")
    report = compress(tmp_path / "dense", tmp_path / "some.txt", out=tmp_path / "fourth", seq_len=500)
    assert any("sequences have 64 tokens, the model's longest, not 500" in note for note in report.notes)


@pytest.mark.parametrize("data", [[], [{}], [{"input_ids": [1]}], torch.zeros(2, 3), 7, [torch.zeros(2)]])
def test_data_of_no_known_form(data: Any) -> None:
    with pytest.raises(OptionError, match="Calibration data is a text file's name"):
        compress(family_of("llama").build(), data)


def test_data_that_the_model_does_not_read() -> None:
    with pytest.raises(OptionError, match=r"ViTForImageClassification reads 'pixel_values', but .* has input_ids"):
        compress(family_of("vit").build(), tokens(2, 8))
    with pytest.raises(OptionError, match=r"token 96, but the vocabulary of the model has 96"):
        compress(family_of("llama").build(), torch.tensor([[3, 96, 4]]))


def test_batches_are_cut_for_every_process() -> None:
    samples = as_samples([{"input_ids": tokens(4, 8)}, {"input_ids": tokens(1, 8)}])
    for parts in (1, 2, 3, 4, 5):
        cut = samples.rebatch(1000, parts)
        assert sum(cut.part(index, parts).count for index in range(parts)) == 5
        assert all(cut.part(index, parts).count for index in range(parts))
    assert [len(batch["input_ids"]) for batch in samples.rebatch(16).batches] == [2, 2, 1]
    assert samples.identity() != as_samples([{"input_ids": tokens(5, 8)}]).identity()


def test_windows_are_drawn_without_overlap() -> None:
    text = torch.arange(100)
    drawn = sample_windows(text, 7, 10, bos=500, seed=3, name="x")
    ids = drawn.batches[0]["input_ids"]
    assert ids.shape == (7, 10) and (ids[:, 0] == 500).all()
    assert len(ids[:, 1:].unique()) == 63 and not drawn.notes
    assert torch.equal(ids, sample_windows(text, 7, 10, 500, 3, "x").batches[0]["input_ids"])
    assert not torch.equal(ids, sample_windows(text, 7, 10, 500, 4, "x").batches[0]["input_ids"])
    assert isinstance(drawn, Samples) and drawn.describe() == "x, 7 x 10 tokens"
    with pytest.raises(OptionError, match="--seq-len 1"):
        sample_windows(text, 7, 1, None, 0, "x")


def test_batches_of_different_masks_keep_their_own() -> None:
    """Each batch is called with its own mask, also when a later one looks like an earlier one."""
    family = family_of("llama")
    data = []
    for length in (5, 9, 5, 12):
        mask = torch.ones(2, 12, dtype=torch.int64)
        mask[0, length:] = 0
        data.append({"input_ids": tokens(2, 12), "attention_mask": mask})
    model = family.build()
    expected = input_moments(wide(model), data)
    compress(family.build(), data, "inputs_for_tests")
    assert_inputs({name: layer for name, layer in SEEN.items() if ".0." in name}, expected, 1e-5)
    assert int(SEEN["model.layers.1.mlp.up_proj"].statistics.tokens) == 5 + 9 + 5 + 12 + 4 * 12
