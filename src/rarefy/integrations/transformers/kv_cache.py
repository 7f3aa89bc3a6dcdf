"""A KV cache in code as a ``Cache`` of Transformers, and how it learns what ``update`` does not tell it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from rarefy.core.errors import OptionError, UnsupportedError
from rarefy.formats.bytes import ByteCount, total
from rarefy.kv.plan import HeadShape, LayerCodecs
from rarefy.kv.rotary import Rotary
from rarefy.kv.store import Arrival, LayerStore
from rarefy.kv.view import Handle

ROTARY = "rarefy_rotary"  # attribute of attention modules: the modules that may hold their frequencies
CACHE_ARGUMENTS = ("cache", "past_key_values")  # of attention modules: from 5.24 on, and before


class CodedLayer(DynamicLayer):
    """One layer of a cache whose keys and values are in code. ``plan`` says how, once their shape is known."""

    is_compileable = False
    is_croppable = True

    def __init__(self, plan: Callable[[HeadShape], LayerCodecs], layer: int, layers: int, exact_arrival: bool):
        super().__init__()
        self._plan, self._place, self._exact_arrival = plan, (layer, layers), exact_arrival
        self._arrival: Arrival | None = None
        self._store: LayerStore | None = None

    @property
    def store(self) -> LayerStore:
        """What is kept. Raises OptionError before the first tokens."""
        if self._store is None:
            raise OptionError(f"Layer {self._place[0]} of this cache is still empty; run the model on some tokens.")
        return self._store

    @property
    def wants_positions(self) -> bool:
        """Whether keys are kept without RoPE, or whether that is not known yet."""
        return self._store is None or self._store.codecs.pre_rope

    def announce(self, arrival: Arrival) -> None:
        """What is known of the tokens of the coming `update`."""
        self._arrival = arrival

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        layer, layers = self._place
        shape = HeadShape(
            key_states.shape[1], key_states.shape[3], value_states.shape[3], key_states.dtype, layer, layers
        )
        self._store = LayerStore(self._plan(shape), f"layer {layer}", self._exact_arrival)
        self.device = key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        arrival, self._arrival = self._arrival, None
        seen = self.store.append(key_states, value_states, arrival)
        return Handle(seen, key_states), Handle(seen, value_states)

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return 0 if self._store is None else self._store.length

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        # Transformers up to 5.2 passes the positions of the queries instead of their number.
        count = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.get_seq_length() + count, 0

    def reset(self) -> None:
        self._store = self._arrival = None
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens: as many as a negative number says, or all beyond as many as a positive one says (the
        meaning in Transformers 5.0)."""
        count = self.get_seq_length()
        if self._store is not None:
            self._store.crop(-tokens_to_remove if tokens_to_remove <= 0 else max(0, count - tokens_to_remove))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda tensor: tensor[indices.to(tensor.device)])

    def offload(self) -> None:
        self._map(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self._store is not None:
            device = self.device
            self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def fork(self) -> CodedLayer:
        """Another layer of the same tokens that goes its own way."""
        twin = CodedLayer(self._plan, *self._place, self._exact_arrival)
        if self._store is not None:
            twin._store, twin.device, twin.is_initialized = self._store.copy(), self.device, True
            twin._store.plans = {}
        return twin

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        if self._store is not None:
            self._store.map_(function)


class CodedCache(Cache):
    """A cache with a `CodedLayer` for every layer that keeps all tokens. Sliding-window, linear and other layers are
    Transformers' own, since they keep few tokens or none."""

    def __init__(
        self,
        config: Any,
        plan: Callable[[HeadShape], LayerCodecs],
        exact_arrival: bool = True,
        about: dict[str, Any] | None = None,
    ):
        text = config.get_text_config(decoder=True)
        own = DynamicCache(config=config).layers or [DynamicLayer() for _ in range(text.num_hidden_layers)]
        places = [index for index, layer in enumerate(own) if type(layer) is DynamicLayer]
        if not places:
            names = sorted({type(layer).__name__ for layer in own})
            raise UnsupportedError(
                f"No layer of this {type(config).__name__} keeps all tokens ({', '.join(names)}), so a coded cache has "
                "nothing to code; leave it out."
            )
        for number, index in enumerate(places):
            own[index] = CodedLayer(plan, number, len(places), exact_arrival)
        super().__init__(layers=own)
        self._about = about or {}

    @property
    def coded_layers(self) -> list[CodedLayer]:
        return [layer for layer in self.layers if isinstance(layer, CodedLayer)]

    def setup_of(self) -> dict[str, Any]:
        """The recipe that this cache follows, its options and what it was fitted to, as JSON."""
        return self._about

    @property
    def is_compileable(self) -> bool:
        return False

    def fork(self) -> CodedCache:
        """Another cache of the same tokens that goes its own way; blocks in code are shared and never change."""
        from copy import deepcopy

        twin = CodedCache.__new__(CodedCache)
        twin.__dict__.update(self.__dict__)
        twin.layers = [layer.fork() if isinstance(layer, CodedLayer) else deepcopy(layer) for layer in self.layers]
        return twin

    def nbytes(self) -> ByteCount:
        """Bytes of all coded layers by what they say; tables of the codecs are not among them (`shared_bytes`)."""
        return total([layer.store.nbytes() for layer in self.coded_layers if layer.is_initialized])

    def shared_bytes(self) -> int:
        """Bytes of the tables that codecs of all layers share between tokens, each tensor once."""
        tensors = {
            tensor.data_ptr(): tensor.numel() * tensor.element_size()
            for layer in self.coded_layers
            if layer.is_initialized
            for codec in (layer.store.codecs.keys, layer.store.codecs.values)
            for tensor in codec.shared().values()
        }
        return sum(tensors.values())

    def bits(self, exact: int | None = None) -> dict[str, float]:
        """Stored bits per number of keys and values by part, with their ``total``; tables that tokens share are not
        among them. ``exact``: bits that a number counts which is kept in the model's own dtype, if not its own, such as
        16 where a model runs in float32 in place of a 16-bit one."""
        parts, numbers = [], 0
        for layer in self.coded_layers:
            if layer.is_initialized:
                store, count = layer.store, layer.store.nbytes()
                assert store.keys is not None
                width = 8 * store.keys.tail.element_size()
                parts.append(count if exact is None else replace(count, exact=count.exact * exact // width))
                numbers += store.numbers()
        return total(parts).bits_per_weight(numbers)


def announce_tokens(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of attention modules: tell a coded layer of the positions and padding of the tokens to come."""
    cache = next((kwargs[name] for name in CACHE_ARGUMENTS if isinstance(kwargs.get(name), CodedCache)), None)
    layer = cache.layers[module.layer_idx] if cache is not None else None  # type: ignore[index]
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(layer, CodedLayer) or not isinstance(hidden, Tensor):
        return
    arrival = Arrival(valid=_valid(kwargs.get("attention_mask"), hidden.shape[0], hidden.shape[1]))
    embeddings = kwargs.get("position_embeddings")
    if layer.wants_positions and isinstance(embeddings, tuple) and len(embeddings) == 2:
        cos, sin = embeddings
        positions = kwargs.get("position_ids")
        if positions is None:
            start = layer.get_seq_length()
            positions = torch.arange(start, start + hidden.shape[1], device=hidden.device)[None]
        arrival.positions, arrival.cos, arrival.sin = positions, cos, sin
        if layer.get_seq_length() == 0:
            arrival.rotary = rotary_of(getattr(module, ROTARY, ()), positions, cos)
    layer.announce(arrival)


def _valid(mask: Any, rows: int, count: int) -> Tensor | None:
    """Which of the newest ``count`` tokens are no padding: those that see themselves."""
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        return None
    newest = mask[:, 0, :, mask.shape[3] - count :].diagonal(dim1=1, dim2=2)
    return (newest if newest.dtype == torch.bool else newest == 0).expand(rows, count)


def rotary_of(modules: Any, positions: Tensor, cos: Tensor) -> Rotary | None:
    """The frequencies that give ``cos`` at ``positions``; None where no known ones do."""
    for module in modules:
        for name, frequencies in module.named_buffers(recurse=False):
            if "inv_freq" not in name or "original" in name:
                continue
            scaling = name.replace("inv_freq", "attention_scaling")
            found = Rotary(frequencies.float(), float(getattr(module, scaling, 1.0)))
            fits = 2 * frequencies.shape[0] == cos.shape[-1]
            if fits and torch.allclose(found.angles(positions)[0].to(cos.dtype).float(), cos.float(), atol=1e-3):
                return found
    return None
