"""``generate`` with Transformers' arguments and rarefy's decode runner."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from rarefy.core.errors import OptionError, UnsupportedError
from rarefy.decoding.runner import Runner

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
        logits = self.start(input_ids[0])
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

    def _check_request(self, model: Any, input_ids: Tensor, config: Any, extra: dict[str, Any]) -> None:
        if model is not self.model:
            raise OptionError("This runner was made for another model; call rarefy.runner with this one.")
        if (config.num_beams or 1) != 1 or (config.num_return_sequences or 1) != 1:
            raise UnsupportedError("The decode runner searches greedily or samples; use model.generate for beams.")
        if input_ids.shape[0] != 1:
            raise UnsupportedError(f"The decode runner takes one sequence, not {input_ids.shape[0]}; use the model.")
        mask, embeddings = extra.get("attention_mask"), extra.get("inputs_embeds")
        if embeddings is not None or input_ids.shape[1] == 0:
            raise UnsupportedError("The decode runner needs at least one token and no inputs_embeds.")
        if mask is not None and not bool(mask.all()):
            raise UnsupportedError("The decode runner reads every token, but attention_mask hides some; drop padding.")
        positions = extra.get("position_ids")
        if positions is not None and not torch.equal(positions[0], torch.arange(input_ids.shape[1])):
            raise UnsupportedError("The decode runner counts positions from 0; leave position_ids out.")
        past = extra.get("cache", extra.get("past_key_values"))
        if past is not None and past.get_seq_length() > 0:
            raise UnsupportedError("The decode runner keeps its own cache and cannot go on with another; leave it out.")
        asked = [name for name in _BEYOND if getattr(config, name, None)]
        if asked:
            raise UnsupportedError(f"The decode runner returns tokens only; leave {asked[0]} out.")
