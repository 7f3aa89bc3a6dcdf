"""A linear layer whose weight is a sum of terms."""

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


class CompressedLinear(nn.Linear):
    """``y = sum of term(x) + bias`` for ``x [..., in_features]``; a drop-in for ``nn.Linear`` and GPT-2's ``Conv1D``.

    The terms' tensors are buffers ``terms.<i>.<name>`` that no cast changes; ``bias`` is an ordinary parameter.
    ``weight`` is a read-only view of the dense weight in ``dtype``, the dtype that casts of the model move.
    Gradients reach ``x`` and ``bias``. ``replaces`` is the class of the dense layer, to return to it. Raises
    FormatError when a term does not fit the layer's shape.
    """

    def __init__(
        self,
        terms: Sequence[Term],
        bias: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        replaces: Callable[..., nn.Module] = nn.Linear,
    ):
        nn.Module.__init__(self)
        if not terms:
            raise FormatError("A compressed layer needs at least one term.")
        self.out_features, self.in_features = terms[0].rows, terms[0].columns
        for term in terms:
            if term.shape != (self.out_features, self.in_features):
                raise FormatError(f"A term of shape {list(term.shape)} in a layer of {list(terms[0].shape)}.")
        self.terms = nn.ModuleList(terms)
        own = None if bias is None else nn.Parameter(bias, requires_grad=bias.is_floating_point())
        self.register_parameter("bias", own)
        self.dtype = dtype
        self.replaces = replaces
        self._is_hf_initialized = True  # keeps Transformers from drawing random numbers into the view

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y = self._product(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def decode(self) -> Tensor:
        """The dense weight, float32 ``[out_features, in_features]``."""
        weights = [term.decode() for term in self.terms]  # type: ignore[operator]
        return torch.stack(weights).sum(0) if len(weights) > 1 else weights[0]

    def byte_count(self) -> ByteCount:
        """Stored bytes of the weight, without the bias."""
        return total([term.byte_count() for term in self.terms])  # type: ignore[operator]

    @property
    def device(self) -> torch.device:
        for part in self.terms.modules():  # where layouts are; what they replaced has no place
            if isinstance(part, Term) and part.prepared is not None:
                return part.prepared.device
        return next((buffer.device for buffer in self.buffers()), torch.device("cpu"))

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dense weight, read-only; decoded when used in a computation."""
        if torch.compiler.is_compiling():
            return self.decode().to(self.dtype)
        return CompressedWeight(
            (self.out_features, self.in_features), self.dtype, self.device, self._product, self.decode
        )

    def reset_parameters(self) -> None:
        """A compressed layer has nothing to initialise."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise UnsupportedError("The weight of a compressed layer cannot be assigned; compress the model anew.")
        super().__setattr__(name, value)

    def prepare_(self) -> None:
        """Put the terms into the layouts of native kernels, as the first product does; see Term.prepare_."""
        for term in self.terms:
            term.prepare_()  # type: ignore[operator]

    def restore_(self) -> None:
        """Undo ``prepare_``: stored tensors are what and where they were."""
        for term in self.terms:
            term.restore_()  # type: ignore[operator]

    def _product(self, x: Tensor) -> Tensor:
        if takes_native(x):
            self.prepare_()
        return multiply(list(self.terms), x)  # type: ignore[arg-type]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CompressedLinear:
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.device)).dtype
        return super()._apply(fn, recurse)
