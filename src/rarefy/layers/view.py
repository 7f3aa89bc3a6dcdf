"""A compressed weight seen as a read-only dense tensor, decoded only when somebody computes with it.

Models and libraries read ``layer.weight``: its dtype and device (T5, PEFT), its values (DoRA, norms), or they pass it
to ``F.linear`` (experts). The view answers the first without work, decodes for the second, and runs the compressed
product for the third. Writing is refused: an adapter merged into it would be lost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from rarefy.core.errors import UnsupportedError

_SETTERS = {Tensor.__setitem__, *(getattr(Tensor, name).__set__ for name in ("data", "grad", "requires_grad"))}


class CompressedWeight(Tensor):
    """A tensor without storage; ``product(x)`` and ``decode()`` come from its owner."""

    _product: Callable[[Tensor], Tensor]
    _decode: Callable[[], Tensor]
    _is_hf_initialized: bool

    @staticmethod
    def __new__(
        cls,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        product: Callable[[Tensor], Tensor],
        decode: Callable[[], Tensor],
    ) -> CompressedWeight:
        view: CompressedWeight = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        view._product, view._decode = product, decode
        view._is_hf_initialized = True  # a parent's _init_weights may reach for it; there is nothing to initialise
        return view

    def __init__(self, *_: Any):
        super().__init__()

    def dense(self) -> Tensor:
        """The decoded weight as an ordinary tensor of this view's dtype."""
        return self._decode().to(self.dtype)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"CompressedWeight(shape={list(self.shape)}, dtype={self.dtype}, device='{self.device}')"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.linear:
            x, weight, bias = _linear_arguments(*args, **kwargs)
            if isinstance(weight, cls) and not isinstance(x, cls):
                y = weight._product(x)
                return y if bias is None else y + bias
        if func in _SETTERS and isinstance(args[0], cls):
            _refuse()
        with torch._C.DisableTorchFunctionSubclass():  # results are ordinary tensors, not views
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for position, argument in enumerate(func._schema.arguments):
            given = args[position] if position < len(args) else kwargs.get(argument.name)
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(given, cls):
                _refuse()
        if func is torch.ops.aten.detach.default:
            view = args[0]
            return cls(tuple(view.shape), view.dtype, view.device, view._product, view._decode)

        def dense(value: Any) -> Any:
            return value.dense() if isinstance(value, cls) else value

        return func(*tree_map(dense, args), **tree_map(dense, kwargs))


def _linear_arguments(
    input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    return input, weight, bias


def _refuse() -> None:
    raise UnsupportedError(
        "A compressed weight is read-only; merge an adapter with rarefy.merge_adapter(model), which compresses anew."
    )
