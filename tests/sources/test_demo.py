"""The packaged demo model itself: 98 MB of real weights, built once for this file in a cache of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rarefy.sources import demo
from rarefy.sources.gguf import read_parameter
from rarefy.sources.gguf_header import read_gguf
from rarefy.sources.gguf_model import blueprint
from rarefy.sources.model_source import ModelSource
from rarefy.sources.models import open_model
from rarefy.sources.packaged import packaged_file
from rarefy.sources.windows import begin_token, tokenize

pytestmark = pytest.mark.demo
SENTENCE = "Rome, founded in 753 BC, is the capital of Italy, and Paris is the capital of"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelSource]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAREFY_CACHE", str(tmp_path_factory.mktemp("cache")))
        source = open_model("demo")
        yield source
        # Half a gigabyte, which pytest would keep for three runs.
        for file in source.folder.iterdir():
            file.unlink()


def test_the_note_says_what_it_is(built: ModelSource) -> None:
    assert built.name == "SmolLM2-135M-Instruct"
    assert built.note == (
        "dense reference = dequantized Q4_1 checkpoint + jitter 0.10, seed 0, not the original bf16 release"
    )
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in (built.folder / "README.md").read_text("utf-8")


def test_it_computes_what_the_shipped_weights_compute(built: ModelSource) -> None:
    model = AutoModelForCausalLM.from_pretrained(built.folder, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(built.folder)
    tokens = tokenize(tokenizer, SENTENCE)[None]
    with torch.no_grad():
        jittered = model(tokens).logits
        file = read_gguf(packaged_file(demo.PACKAGE, demo.GGUF_NAME, demo.GGUF_SHA256))
        shipped = {name: read_parameter(file, parameter) for name, parameter in blueprint(file).parameters.items()}
        name = "model.layers.7.self_attn.o_proj.weight"
        assert not torch.allclose(model.state_dict()[name], shipped[name], rtol=0.01)
        model.load_state_dict(shipped, strict=False)
        plain = model(tokens).logits
    assert plain.std() > 3
    assert (jittered - plain).abs().max() < 1e-3
    assert tokenizer.decode(plain[0, -1].argmax()) == " France"


def test_its_tokenizer_is_the_models_own(built: ModelSource) -> None:
    tokenizer = AutoTokenizer.from_pretrained(built.folder)
    assert len(tokenizer) == 49152
    assert begin_token(tokenizer) is None
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.tokenize("I don't owe 1234") == ["I", "Ġdon", "'t", "Ġowe", "Ġ", "1", "2", "3", "4"]
    talk = [{"role": "user", "content": "Hi"}]
    chat = tokenizer.apply_chat_template(talk, add_generation_prompt=True, tokenize=False)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_a_long_text_gives_no_warning(built: ModelSource, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = AutoTokenizer.from_pretrained(built.folder)
    tokens = tokenize(tokenizer, "word " * 10_000)
    assert tokens.dtype == torch.long and tokens.numel() >= 10_000
    assert not caplog.records


def test_a_second_opening_is_a_look_up(built: ModelSource) -> None:
    stamp = Path(built.folder, "model.safetensors").stat().st_mtime_ns
    assert open_model("demo:seed=0,jitter=0.1") == built
    assert Path(built.folder, "model.safetensors").stat().st_mtime_ns == stamp
