"""A model run block by block: what surrounds the blocks runs once, its arguments are kept, the blocks run alone.

No tracing: stand-ins take the blocks' places. They note how the model calls each block (masks, position embeddings)
and hand the hidden state through, so that one pass without any block's weights finds the calls of all blocks. A call
whose arguments depend on another block's output beyond the hidden state and what the first block adds beside it
cannot be found so; a block that changes its input's shape is refused.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from rarefy.calibration.samples import Batch
from rarefy.core.errors import OptionError, UnsupportedError, first_line


class _Stop(Exception):
    """Ends a model's forward once the blocks' calls are known."""


@dataclass(frozen=True)
class Call:
    """How a model calls a block: everything but the hidden state, which is the first argument or a named one."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden_name: str | None

    def run(self, block: nn.Module, hidden: Tensor) -> Any:
        """The block's whole output on ``hidden``; tensors among the arguments follow it to its device."""
        args, kwargs = tree_map(lambda part: _to(part, hidden.device), (self.args, self.kwargs))
        if self.hidden_name is None:
            return block(hidden, *args, **kwargs)
        return block(*args, **{**kwargs, self.hidden_name: hidden})


class _StandIn(nn.Module):
    """Takes a block's place; the model may still read the block's attributes (Gemma: its kind of attention)."""

    def __init__(self, block: nn.Module, enter: Callable[[Tensor, Call], Any]):
        super().__init__()
        object.__setattr__(self, "_block", block)
        self._enter = enter

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if args:
            hidden, call = args[0], Call(args[1:], kwargs, None)
        else:
            name = next((name for name in ("hidden_states", "hidden_state", "x") if name in kwargs), None)
            if name is None:
                raise UnsupportedError(
                    f"The model calls '{type(self._block).__name__}' without a hidden state that can be recognised; "
                    "use a data-free recipe."
                )
            hidden, call = kwargs[name], Call((), {k: v for k, v in kwargs.items() if k != name}, name)
        return self._enter(hidden, call)


Enter = Callable[[int, Tensor, Call], Any]


class Replay:
    """Runs the parts of ``model`` around its ``blocks`` (names, in order)."""

    def __init__(self, model: nn.Module, blocks: Sequence[str]):
        self.model, self.blocks = model, list(blocks)
        self._pool = _Pool()

    def first_call(self, batch: Batch) -> tuple[Tensor, Call]:
        """The first block's hidden state and call. Raises OptionError when the model cannot run on ``batch``."""
        found: list[tuple[Tensor, Call]] = []

        def enter(index: int, hidden: Tensor, call: Call) -> Any:
            found.append((hidden, call))
            raise _Stop

        with self._stand_ins(enter):
            self._run(batch)
        if not found:
            raise UnsupportedError(
                f"{type(self.model).__name__} ran without entering '{self.blocks[0]}'; give data that reach it, or use "
                "a data-free recipe."
            )
        return found[0]

    def calls(self, batch: Batch, output: Any) -> list[Call]:
        """The calls of all blocks for ``batch``; ``output`` is what the first block returns for it.

        Raises UnsupportedError when the model does not run each block once, in order.
        """
        found: list[Call] = []

        def enter(index: int, hidden: Tensor, call: Call) -> Any:
            if index != len(found):
                raise UnsupportedError(
                    f"{type(self.model).__name__} runs '{self.blocks[index]}' out of order or more than once; use a "
                    "data-free recipe."
                )
            args, kwargs = self._pool.keep((call.args, call.kwargs))
            found.append(Call(args, kwargs, call.hidden_name))
            return with_hidden(output, hidden)

        with self._stand_ins(enter), _stop_when(lambda: len(found) == len(self.blocks)):
            self._run(batch)
        if len(found) != len(self.blocks):
            raise UnsupportedError(
                f"{type(self.model).__name__} ran {len(found)} of {len(self.blocks)} blocks; use a data-free recipe."
            )
        return found

    def tail(self, batch: Batch, hidden: Tensor, output: Any) -> Any:
        """The model's output for ``batch`` when its last block gives ``hidden``."""

        def enter(index: int, incoming: Tensor, call: Call) -> Any:
            return with_hidden(output, hidden if index == len(self.blocks) - 1 else incoming)

        with self._stand_ins(enter):
            return self._run(batch)

    def _run(self, batch: Batch) -> Any:
        takes_cache = getattr(getattr(self.model, "config", None), "use_cache", None) is not None
        try:
            return self.model(**batch, **({"use_cache": False} if takes_cache else {}))
        except _Stop:
            return None
        except (TypeError, ValueError, IndexError) as failure:  # how models say that inputs are missing or unknown
            reason = first_line(failure)
            raise OptionError(
                f"{type(self.model).__name__} cannot run on the calibration data with {', '.join(batch)} ({reason}); "
                "give batches of the inputs that it reads."
            ) from failure

    @contextmanager
    def _stand_ins(self, enter: Enter) -> Iterator[None]:
        places = [name.rpartition(".") for name in self.blocks]
        real = [self.model.get_submodule(name) for name in self.blocks]
        try:
            for index, ((parent, _, label), block) in enumerate(zip(places, real, strict=True)):
                stand_in = _StandIn(block, functools.partial(enter, index))
                self.model.get_submodule(parent)._modules[label] = stand_in
            yield
        finally:
            for (parent, _, label), block in zip(places, real, strict=True):
                self.model.get_submodule(parent)._modules[label] = block


@contextmanager
def _stop_when(done: Callable[[], bool]) -> Iterator[None]:
    """End the model's forward at the first module that it calls, other than a stand-in, once ``done``."""

    def before(module: nn.Module, args: Any) -> None:
        if done() and not isinstance(module, _StandIn):
            raise _Stop

    handle = nn.modules.module.register_module_forward_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()


def hidden_of(output: Any) -> Tensor:
    """The hidden state in what a block returned: itself, or the first of a tuple. Raises UnsupportedError."""
    first = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(first, Tensor):
        raise UnsupportedError(
            f"A block returned {type(first).__name__} where a hidden state was expected; use a data-free recipe."
        )
    return first


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """``output`` of a block with another hidden state."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def token_mask(model: nn.Module, block: str, batch: Batch) -> Tensor | None:
    """The padding mask ``[samples, tokens]`` of what the blocks read, if there is one."""
    mask = batch.get("attention_mask")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and "decoder" in block.split("."):
        if mask is not None and not bool(mask.all()):
            raise UnsupportedError(
                "Padding of an encoder's tokens cannot be told apart where its decoder reads them; calibrate a decoder "
                "on sequences without padding."
            )
        mask = batch.get("decoder_attention_mask")
    return mask if mask is not None and mask.dim() == 2 else None


def check_data(model: nn.Module, batches: Sequence[Batch]) -> None:
    """Raise OptionError for what would fail deep inside the model, or on a GPU without a reason."""
    main = getattr(model, "main_input_name", None)
    if main is not None and not any(name in batch for batch in batches for name in (main, "inputs_embeds")):
        raise OptionError(
            f"{type(model).__name__} reads '{main}', but the calibration data has {', '.join(batches[0])}; give "
            "batches of the inputs that it reads."
        )
    config = getattr(model, "config", None)
    size = getattr(getattr(config, "text_config", None) or config, "vocab_size", None)
    for batch in batches if size is not None else ():
        largest = int(batch["input_ids"].max()) if "input_ids" in batch and batch["input_ids"].numel() else 0
        if largest >= size:  # type: ignore[operator]
            raise OptionError(
                f"The calibration data has token {largest}, but the vocabulary of the model has {size}; use its own "
                "tokenizer."
            )


class _Pool:
    """Keeps one of equal tensors: masks and position embeddings are the same for all batches and most blocks."""

    RECENT = 16

    def __init__(self) -> None:
        self._kept: deque[Tensor] = deque(maxlen=self.RECENT)

    def keep(self, tree: Any) -> Any:
        return tree_map(lambda part: self._one(part) if isinstance(part, Tensor) else part, tree)

    def _one(self, tensor: Tensor) -> Tensor:
        if any(known is tensor for known in self._kept):
            return tensor
        for known in self._kept:
            if known.shape == tensor.shape and known.dtype == tensor.dtype and torch.equal(known, tensor):
                return known
        self._kept.append(tensor)
        return tensor


def _to(part: Any, device: torch.device) -> Any:
    return part.to(device) if isinstance(part, Tensor) and part.device != device else part
