"""Stacked expert weights as terms, in the place of the three-dimensional parameter that a model indexes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.core.errors import FormatError, UnsupportedError
from rarefy.formats.bytes import ByteCount, total
from rarefy.formats.terms import Term
from rarefy.layers.product import multiply, takes_native
from rarefy.layers.view import CompressedWeight


class NotDenseError(UnsupportedError, AttributeError):
    """Something asked compressed experts for what only one dense tensor has."""

    def __init__(self, what: str):
        super().__init__(
            f"Compressed experts cannot be used by '{what}', which wants one dense tensor; "
            "call model.set_experts_implementation('eager')."
        )


class CompressedStack(nn.Module):
    """``stack[e]`` is expert ``e``'s weight ``[rows, columns]``, a read-only view that ``F.linear`` multiplies.

    It stands where a parameter ``[experts, rows, columns]`` stood, so a model's own per-expert loop, with its own
    activation, biases and routing, runs unchanged. Implementations that want one dense tensor are refused by name.
    """

    def __init__(self, terms: Sequence[Term], dtype: torch.dtype = torch.float32):
        super().__init__()
        if not terms or any(term.shape != terms[0].shape or len(term.shape) != 3 for term in terms):
            raise FormatError("Expert terms need one common shape [experts, rows, columns].")
        self.shape = torch.Size(terms[0].shape)
        self.terms = nn.ModuleList(terms)
        self.dtype = dtype
        self._is_hf_initialized = True

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int | Tensor) -> Tensor:
        try:
            expert = int(index)
        except (TypeError, ValueError, RuntimeError):  # several experts at once, or a part of one
            raise NotDenseError("indexing") from None
        if not 0 <= expert < len(self):
            raise IndexError(f"expert {expert} of {len(self)}")

        def members() -> list[Term]:
            return [term.select(expert) for term in self.terms]  # type: ignore[operator]

        def product(x: Tensor) -> Tensor:
            if takes_native(x):
                self.prepare_()
            return multiply(members(), x)

        def decode() -> Tensor:
            return torch.stack([member.decode() for member in members()]).sum(0)

        return CompressedWeight(tuple(self.shape[1:]), self.dtype, self.device, product, decode)

    def decode(self) -> Tensor:
        """All dense weights, float32 ``[experts, rows, columns]``."""
        return torch.stack([term.decode() for term in self.terms]).sum(0)  # type: ignore[operator]

    def byte_count(self) -> ByteCount:
        """Stored bytes of all experts."""
        return total([term.byte_count() for term in self.terms])  # type: ignore[operator]

    def prepare_(self) -> None:
        """Put every expert into the layout of native kernels, as the first product does; see Term.prepare_."""
        for term in self.terms:
            term.prepare_()  # type: ignore[operator]

    @property
    def device(self) -> torch.device:
        if any(isinstance(part, Term) and part.is_prepared for part in self.terms.modules()):
            return torch.device("cpu")  # where layouts are; what they replaced has no place
        return next((buffer.device for buffer in self.buffers()), torch.device("cpu"))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotDenseError(str(getattr(func, "__name__", func)))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if hasattr(Tensor, name):
                raise NotDenseError(name) from None
            raise

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CompressedStack:
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.device)).dtype
        return super()._apply(fn, recurse)
