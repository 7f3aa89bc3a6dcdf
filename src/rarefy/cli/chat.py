"""``rarefy chat``: talk to a model, token by token."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any

import typer

from rarefy.cli.common import Device, Json, Revision, command, print_json, say, starting


@command
def chat(
    model: Annotated[str, typer.Argument(help="Folder, hub id, .gguf file, or 'demo'.")],
    prompt: Annotated[str | None, typer.Option(help="Answer this and stop; without it, a conversation.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 256,
    attention: Annotated[str | None, typer.Option(help="Attend sparsely, as ID or ID:key=value,key=value.")] = None,
    device: Device = "auto",
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Chat with a model through its chat template; answers stream as they are made (greedy)."""
    from rarefy.core.errors import OptionError

    if as_json and prompt is None:
        raise OptionError("--json needs --prompt: a conversation has no single result.")
    if prompt is not None and not prompt.strip():
        raise OptionError("--prompt is empty; write what to answer.")
    with starting():
        tokenizer, loaded, runner = open_chat(model, revision, device, attention)
    if not tokenizer.chat_template:
        say("note: this model has no chat template; it continues your text.")
    if prompt is not None:
        reply, count, seconds = answer(
            loaded, tokenizer, [{"role": "user", "content": prompt}], max_new_tokens, as_json, runner
        )
        if as_json:
            print_json({"prompt": prompt, "reply": reply, "tokens": count, "seconds": seconds})
        else:
            say(f"({count} tokens, {count / max(seconds, 1e-9):.1f} tokens/s)")
        return
    say("Type a message; an empty line or Ctrl-D ends.")
    messages: list[dict[str, str]] = []
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if not text.strip():
            return
        messages.append({"role": "user", "content": text})
        reply, _, _ = answer(loaded, tokenizer, messages, max_new_tokens, False, runner)
        messages.append({"role": "assistant", "content": reply})


def open_chat(model: str, revision: str | None, device: str, attention: str | None) -> tuple[Any, Any, Any]:
    """Tokenizer, model with its attention plan, and its decode runner, or None for that."""
    from rarefy import api
    from rarefy.core.devices import device_of, fast_dtype
    from rarefy.core.errors import UnsupportedError

    tokenizer = api.load_tokenizer(model, revision=revision)
    loaded: Any = api.load(model, revision=revision)
    place = device_of(device)
    if place.type == "cuda" and loaded.dtype.itemsize > 2:  # for which kernels of codes have no activations
        loaded = loaded.to(fast_dtype(place))
    loaded = loaded.to(place)
    if not loaded.can_generate():
        raise UnsupportedError(f"'{model}' is a {type(loaded).__name__}, which does not generate text; name another.")
    if attention is not None:
        from rarefy.integrations.transformers.plan_evaluation import set_plan

        set_plan(loaded, attention)
    return tokenizer, loaded, runner_of(loaded) if attention is None else None


def runner_of(model: Any) -> Any:
    """The decode runner of ``model``; None, having said why, when Transformers has to do it."""
    from rarefy import api
    from rarefy.core.errors import UnsupportedError

    try:
        return api.runner(model, executor="fast")
    except UnsupportedError as reason:
        say(f"note: {reason} Transformers generates instead.")
        return None


def answer(
    model: Any,
    tokenizer: Any,
    messages: list[dict[str, str]],
    max_new_tokens: int,
    quiet: bool,
    runner: Any = None,
) -> tuple[str, int, float]:
    """Generate one reply, streamed to stdout unless ``quiet``: its text, number of tokens, and seconds.

    ``runner``: a decode runner of ``model``; None leaves the loop to Transformers.
    """
    import torch
    from transformers import TextStreamer

    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    else:
        inputs = tokenizer("\n".join(message["content"] for message in messages), return_tensors="pt")
    inputs = {
        name: tensor.to(model.device) for name, tensor in inputs.items() if name in ("input_ids", "attention_mask")
    }
    length = inputs["input_ids"].shape[1]
    room = _room(model, length)
    if room < max_new_tokens:
        say(f"note: the answer ends after {room} tokens, where the model's positions do.")
        max_new_tokens = room
    streamer = None if quiet else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    start = time.monotonic()
    with torch.inference_mode():
        out = (runner or model).generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )  # fmt: skip
    fresh = out[0, 1 if model.config.is_encoder_decoder else length :]
    return tokenizer.decode(fresh, skip_special_tokens=True), len(fresh), time.monotonic() - start


def _room(model: Any, length: int) -> int:
    """How many tokens may follow ``length`` ones. Raises OptionError when the model has no position left for any."""
    from rarefy.core.errors import OptionError

    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None or model.config.is_encoder_decoder:
        return sys.maxsize
    if length >= limit:
        raise OptionError(f"The conversation has {length} tokens, and the model {limit} positions; start a new one.")
    return int(limit) - length
