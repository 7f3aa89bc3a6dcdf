"""``generate`` with Transformers' arguments and rarefy's decode runner."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from rarefy.core.errors import OptionError, UnsupportedError
from rarefy.decoding.runner import Runner
from rarefy.decoding.sampling import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EVERY = 16  # tokens that a GPU writes before anybody looks at them
# What ``generate`` can ask for that needs more than the logits of one sequence.
_BEYOND = ("return_dict_in_generate", "output_scores", "output_logits", "output_attentions", "output_hidden_states")


class GenerateRunner(Runner):
    """A runner with ``generate``, for greedy search and sampling of one sequence.

    It may also be given to the model's own, ``model.generate(..., custom_generate=runner)``, but for a ``streamer``:
    Transformers does not pass that on.
    """

    def generate(self, *arguments: Any, streamer: Any = None, **options: Any) -> Tensor:
        """As ``model.generate``: the given tokens and what follows, int64 [1, T].

        Raises OptionError, UnsupportedError for what the runner cannot do.
        """
        loop = functools.partial(self, stream_to=streamer)
        return self.model.generate(*arguments, streamer=streamer, custom_generate=loop, **options)

    @torch.inference_mode()
    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        stream_to: Any = None,
        **model_kwargs: Any,
    ) -> Tensor:
        """The loop that ``generate`` calls once it has prepared everything."""
        self._check_request(model, input_ids, generation_config, model_kwargs)
        stop = stop_of(stopping_criteria) if self.writes else None
        sampling = sampling_of(logits_processor) if stop is not None and generation_config.do_sample else None
        chosen = sampling is not None or not (generation_config.do_sample or logits_processor)
        if input_ids.shape[0] > 1:
            if stop is None or not chosen:
                raise UnsupportedError(
                    f"The decode runner takes one sequence, not {input_ids.shape[0]}, or on a GPU several that are "
                    "searched greedily or drawn by temperature, top-k and top-p alone; use the model."
                )
            mask = model_kwargs.get("attention_mask")
            return self._write_batch(input_ids, mask, *stop, generation_config._pad_token_tensor, sampling)
        logits = self.start(input_ids[0])
        if stop is not None and chosen:
            return self._write_until(input_ids, *stop, sampling, stream_to)
        while True:
            scores = logits_processor(input_ids, logits.float())
            if generation_config.do_sample:
                token = torch.multinomial(scores.softmax(-1), 1)[0]
            else:
                token = scores.argmax(-1)
            input_ids = torch.cat([input_ids, token[None]], 1)
            if stream_to is not None:
                stream_to.put(token)
            if bool(stopping_criteria(input_ids, scores).all()):
                break
            logits = self.extend(token)
        if stream_to is not None:
            stream_to.end()
        return input_ids

    def _write_until(
        self, ids: Tensor, length: int, ends: Sequence[int], sampling: Sampling | None, stream_to: Any
    ) -> Tensor:
        """``ids`` and what follows, to ``length`` tokens or the first of ``ends``; looked at every `EVERY` tokens."""
        tokens = ids[0].tolist()
        known = len(tokens)
        self.crop(known - 1)
        while len(tokens) < length and not (len(tokens) > known and tokens[-1] in ends):
            written = self.write(tokens[-1], min(EVERY, length - len(tokens)), sampling)
            last = next((number for number, token in enumerate(written) if token in ends), len(written) - 1)
            for token in written[: last + 1]:
                tokens.append(token)
                if stream_to is not None:
                    stream_to.put(torch.tensor([token]))
        self.crop(len(tokens) - 1)
        if stream_to is not None:
            stream_to.end()
        return ids.new_tensor(tokens)[None]

    def _write_batch(
        self, ids: Tensor, mask: Tensor | None, length: int, ends: Sequence[int], fill: Tensor | None,
        sampling: Sampling | None,
    ) -> Tensor:  # fmt: skip
        """As `_write_until` for several sequences, hidden on the left where ``mask`` is 0, filled on the right."""
        shown = torch.ones_like(ids).bool() if mask is None else mask.bool()
        batch = self.batch([row[kept] for row, kept in zip(ids, shown, strict=True)])
        stops = torch.tensor(list(ends), dtype=torch.int64, device=ids.device)
        over = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        while ids.shape[1] < length and not bool(over.all()):
            written = batch.write(min(EVERY, length - ids.shape[1]), sampling)
            ends_here = torch.isin(written, stops).int()
            ended = ends_here.cumsum(1)
            after = (ended > ends_here) | over[:, None]  # what follows an end
            if fill is not None:
                written = torch.where(after, fill.to(written), written)
            over |= ended[:, -1] > 0
            if bool(over.all()):  # nothing but filling is left from some column on
                written = written[:, : int((~after).sum(1).max())]
            ids = torch.cat([ids, written], 1)
        return ids

    def _check_request(self, model: Any, input_ids: Tensor, config: Any, extra: dict[str, Any]) -> None:
        if model is not self.model:
            raise OptionError("This runner was made for another model; call rarefy.runner with this one.")
        if (config.num_beams or 1) != 1 or (config.num_return_sequences or 1) != 1:
            raise UnsupportedError("The decode runner searches greedily or samples; use model.generate for beams.")
        several = input_ids.shape[0] > 1
        if several and not self.writes:
            raise UnsupportedError(f"The decode runner takes one sequence, not {input_ids.shape[0]}; use the model.")
        mask, embeddings = extra.get("attention_mask"), extra.get("inputs_embeds")
        if embeddings is not None or input_ids.shape[1] == 0:
            raise UnsupportedError("The decode runner needs at least one token and no inputs_embeds; use the model.")
        shown = torch.ones_like(input_ids) if mask is None else mask.long()
        padded_left = bool((shown.diff(dim=1) >= 0).all() and shown[:, -1].all())
        if not padded_left or not (several or bool(shown.all())):
            raise UnsupportedError("The decode runner reads every token, but attention_mask hides some; drop padding.")
        positions = extra.get("position_ids")
        if positions is not None and bool(((positions - shown.cumsum(1) + 1) * shown).any()):
            raise UnsupportedError("The decode runner counts positions from 0; leave position_ids out.")
        past = extra.get("cache", extra.get("past_key_values"))
        if past is not None and past.get_seq_length() > 0:
            raise UnsupportedError("The decode runner keeps its own cache and cannot go on with another; leave it out.")
        asked = [name for name in _BEYOND if getattr(config, name, None)]
        if asked:
            raise UnsupportedError(f"The decode runner returns tokens only; leave {asked[0]} out.")


def sampling_of(processors: Any) -> Sampling | None:
    """The draw that a list of logits processors asks for; None if one of them is more than a draw's.

    Its seed comes from Torch's generator of the CPU.
    """
    names = ["TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper"]
    found = {type(each).__name__: each for each in processors}
    if list(found) != [name for name in names if name in found] or len(found) != len(processors):
        return None
    temperature, top_k, top_p = (found.get(name) for name in names)
    if top_p is not None and top_p.min_tokens_to_keep != 1:
        return None
    return Sampling(
        1.0 if temperature is None else float(temperature.temperature),
        0 if top_k is None else int(top_k.top_k),
        1.0 if top_p is None else float(top_p.top_p),
        int(torch.randint(2**62, ())),
    )


def stop_of(criteria: Any) -> tuple[int, list[int]] | None:
    """At which length and after which tokens a list of stopping criteria ends; None if one of them is about more."""
    length, ends = None, []
    for each in criteria:
        kind = type(each).__name__
        if kind == "MaxLengthCriteria":
            length = each.max_length if length is None else min(length, each.max_length)
        elif kind == "EosTokenCriteria":
            ends += each.eos_token_id.flatten().tolist()
        else:
            return None
    return None if length is None else (length, ends)


def runner(
    model: PreTrainedModel, *, executor: Literal["exact", "fast"] = "exact", cache_dtype: torch.dtype | None = None
) -> GenerateRunner:
    """The decode runner of a loaded ``model``: ``runner(model).generate(**inputs, max_new_tokens=20)``.

    ``generate`` takes what ``model.generate`` does, greedy or sampled. The CPU serves one sequence. On a GPU a step is
    one CUDA graph, which several may take together; tokens are chosen there too, drawn with its own generator, unless
    something is asked for that needs each token's logits. ``executor="fast"`` may quantize activations to 8 bits on the
    CPU. ``cache_dtype``: of the keys and values it keeps, by default the model's; ``torch.float8_e4m3fn`` takes half
    the bytes on a GPU. Kept between calls: a prompt that begins like the last sequence is read from where it differs.
    Raises UnsupportedError that names what it does not know, OptionError for a cache that cannot be.
    """
    try:
        return GenerateRunner(model, mode=executor, cache_dtype=cache_dtype)
    except UnsupportedError as failure:
        raise UnsupportedError(f"{failure} Use model.generate.") from None
