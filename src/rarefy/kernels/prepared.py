"""Terms in the execution layouts of native kernels, and the two ops over sums of them; one kernel set for each device.

* ``rarefy::linear_prepared(x, <stored>, fast)``: ``x @ weight.T`` for ``x [..., columns]``, result ``[..., rows]`` of
  that dtype; differentiable in ``x``;
* ``rarefy::decode_prepared(<stored>)``: the weight, float32 ``[rows, columns]``.

``<stored>`` is tensors, numbers, factors, rows and columns. Terms follow each other: per term the tensors, whole
numbers and factors that the kernels of its device know by position.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from rarefy.core.errors import UnsupportedError

Arguments = tuple[Any, ...]


class NotCovered(UnsupportedError):
    """No native kernel reads this representation; it runs in torch."""


@dataclass
class Prepared(ABC):
    """One term for the kernels of one device: tensors by slot, whole numbers by name, and the way back."""

    SLOTS: ClassVar[tuple[str, ...]]
    NUMBERS: ClassVar[tuple[str, ...]]

    tensors: dict[str, Tensor]
    numbers: dict[str, int]
    undo: Callable[[Any], Arguments]
    plain: Arguments  # the op's arguments without tensors, None in their places
    zero: float = 0.0
    multiplier: float = 1.0
    kept: dict[str, Tensor] = field(default_factory=dict)  # canonical tensors that no layout replaced

    @property
    def rows(self) -> int:
        return self.numbers["rows"]

    @property
    def columns(self) -> int:
        return self.numbers["columns"]

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors.values())).device

    @property
    def multiplies_bytes(self) -> bool:
        """Whether ``fast`` execution quantizes activations for this term; others it computes exactly."""
        return False

    def slots(self) -> list[Tensor]:
        """All tensors in the order of SLOTS, empty where there is none."""
        return [self.tensors[name] if name in self.tensors else _nothing(self.device) for name in self.SLOTS]

    def listed(self) -> list[int]:
        """All numbers in the order of NUMBERS."""
        return [self.numbers[name] for name in self.NUMBERS]

    def factors(self) -> list[float]:
        """The code that means zero, and what multiplies the whole weight."""
        return [self.zero, self.multiplier]

    def bytes(self) -> int:
        """Bytes of the execution layout."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def canonical(self) -> Arguments:
        """The op's arguments as they were."""
        return self.undo(self)

    def verify(self, arguments: Arguments) -> None:
        """Raise NotCovered unless ``canonical()`` gives back ``arguments``, bit for bit."""
        for name, before, after in zip(range(len(arguments)), arguments, self.canonical(), strict=True):
            same = torch.equal(before, after) if isinstance(before, Tensor) else before == after
            if not same:
                raise NotCovered(f"argument {name} has bits that no code uses")


_empty: dict[torch.device, Tensor] = {}


def _nothing(device: torch.device) -> Tensor:
    if device not in _empty:
        _empty[device] = torch.empty(0, dtype=torch.uint8, device=device)
    return _empty[device]


def plain(arguments: Sequence[Any]) -> Arguments:
    """``arguments`` with None in the places of tensors."""
    return tuple(None if isinstance(value, Tensor) else value for value in arguments)


def filled(arguments: Arguments, given: dict[int, Tensor | None]) -> Arguments:
    """``plain`` arguments with tensors in their places."""
    return tuple(given.get(index, value) for index, value in enumerate(arguments))


def padded(values: Tensor, dim: int, multiple: int) -> Tensor:
    """``values`` with zeros behind, so that ``dim`` is a multiple."""
    missing = -values.shape[dim] % multiple
    if not missing:
        return values
    shape = list(values.shape)
    shape[dim] = missing
    return torch.cat([values, values.new_zeros(shape)], dim)


def linear(x: Tensor, terms: Sequence[Prepared], fast: bool = False) -> Tensor:
    """``x @ weight.T`` for the sum of ``terms``, all on the device of ``x [..., columns]``.

    ``fast`` lets kernels quantize activations to 8 bits for each token and block of columns. Raises FormatError naming
    a tensor whose size contradicts its description.
    """
    return torch.ops.rarefy.linear_prepared(x, *flat(terms), fast)  # type: ignore[no-any-return]


def decode(terms: Sequence[Prepared]) -> Tensor:
    """The dense sum of ``terms``, float32 ``[rows, columns]``, bit for bit what the reference decodes of each."""
    return torch.ops.rarefy.decode_prepared(*flat(terms))  # type: ignore[no-any-return]


def flat(terms: Sequence[Prepared]) -> tuple[list[Tensor], list[int], list[float], int, int]:
    """``terms`` as the ops take them."""
    tensors = [tensor for term in terms for tensor in term.slots()]
    numbers = [number for term in terms for number in term.listed()]
    factors = [factor for term in terms for factor in term.factors()]
    return tensors, numbers, factors, terms[0].rows, terms[0].columns


library = torch.library.Library("rarefy", "FRAGMENT")
_STORED = "Tensor[] tensors, int[] numbers, float[] factors, int rows, int columns"


def _fake_linear(x: Tensor, *arguments: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], arguments[3])


def _fake_decode(tensors: list[Tensor], *arguments: Any) -> Tensor:
    return tensors[0].new_empty(arguments[2], arguments[3], dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.stored = inputs[1:6]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    weight = torch.ops.rarefy.decode_prepared(*ctx.stored)
    return grad @ weight.to(grad.dtype), [None] * len(ctx.stored[0]), None, None, None, None, None


for _op, _schema, _fake in (
    ("linear_prepared", f"(Tensor x, {_STORED}, bool fast) -> Tensor", _fake_linear),
    ("decode_prepared", f"({_STORED}) -> Tensor", _fake_decode),
):
    library.define(f"{_op}{_schema}")
    torch.library.register_fake(f"rarefy::{_op}", _fake, lib=library)
torch.library.register_autograd("rarefy::linear_prepared", _backward, setup_context=_keep, lib=library)
