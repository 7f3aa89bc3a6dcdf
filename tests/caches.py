"""Two KV caches that every ruler has to tell apart: one keeps everything, one forgets where things are."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer


class RandomKeys(DynamicLayer):
    """A layer whose keys turn into noise of their own size as soon as the pass that brought them is over."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._dice = torch.Generator().manual_seed(0)

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
        before = self.get_seq_length()
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        noise = torch.randn(key_states.shape, generator=self._dice).to(key_states)
        self.keys = torch.cat([keys[:, :, :before], noise * key_states.std()], 2)
        return torch.cat([self.keys[:, :, :before], key_states], 2), values

    def __deepcopy__(self, memo: Any) -> RandomKeys:
        twin = RandomKeys()
        memo[id(self)] = twin
        for name, value in self.__dict__.items():
            if isinstance(value, torch.Tensor):
                value = value.clone()
            elif isinstance(value, torch.Generator):
                value = value.clone_state()
            twin.__dict__[name] = value
        return twin


def bad_cache(model: Any) -> Cache:
    return Cache(layers=[RandomKeys() for _ in range(model.config.num_hidden_layers)])


def perfect_cache(model: Any) -> Cache:
    return DynamicCache(config=model.config)
