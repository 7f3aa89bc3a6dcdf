"""What every term is: stored tensors with a strict description, a dense meaning, and a product with an input."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rarefy.core.config import StrictModel
from rarefy.core.errors import FormatError
from rarefy.formats.bytes import ByteCount
from rarefy.formats.inputs import AnyInput, RawInput
from rarefy.formats.layout import Layout, TensorLayout
from rarefy.kernels import native

Shape = tuple[int, ...]


class TermSpec(StrictModel, ABC):
    """Everything about a term that is not a tensor: JSON in the checkpoint's manifest."""

    type: str
    input: AnyInput = RawInput()

    @abstractmethod
    def member_layout(self, rows: int, columns: int) -> Layout:
        """Stored tensors of one ``[rows, columns]`` weight, without those of the input transform."""

    def layout(self, shape: Shape) -> Layout:
        """Stored tensors of a weight ``[*stack, rows, columns]``; stacked members (experts) lead every shape."""
        *stack, rows, columns = shape
        layout = {**self.member_layout(rows, columns), **self.input.layout(columns)}
        return {name: type(entry)(entry.dtype, (*stack, *entry.shape), entry.purpose) for name, entry in layout.items()}

    @abstractmethod
    def build(self, shape: Shape, tensors: Mapping[str, Tensor]) -> Term:
        """The term over ``tensors``, which are exactly those of ``layout(shape)``, not copied."""

    def empty(self, shape: Shape, sizes: Mapping[str, int]) -> Term:
        """The term with uninitialised tensors on the current default device, for a loader to fill."""

        def extent(entry: TensorLayout) -> list[int]:
            return [sizes[size] if isinstance(size, str) else size for size in entry.shape]

        layout = self.layout(shape).items()
        return self.build(shape, {name: torch.empty(extent(entry), dtype=entry.dtype) for name, entry in layout})


class Term(nn.Module, ABC):
    """One summand of a compressed weight ``[rows, columns]``, or of a stack of them ``[*stack, rows, columns]``.

    Its tensors are buffers named as in the layout table; moving the module moves them, no cast ever changes them.
    """

    spec: TermSpec
    fast = False  # whether a native kernel may quantize activations
    _prepared: native.Prepared | None = None
    _members: tuple[Term, ...] = ()  # of a stack whose members are in layouts of native kernels
    _refused: str | None = None  # why no native kernel reads it, once that was asked
    floating: ClassVar[tuple[str, ...]] = ("scale", "zero_point", "second_order", "multiplier", "lut", "values")

    def __init__(self, spec: TermSpec, shape: Shape):
        super().__init__()
        self.spec = spec
        self.shape = tuple(shape)
        self.transforms_input = not isinstance(spec.input, RawInput)

    @property
    def rows(self) -> int:
        return self.shape[-2]

    @property
    def columns(self) -> int:
        return self.shape[-1]

    @property
    def stack(self) -> Shape:
        return self.shape[:-2]

    def operation(self) -> tuple[str, tuple[Any, ...], float] | None:
        """The op family, its arguments and the multiplier, of a term that is one op of kernels/ops.py; else None."""
        return None

    def prepare_(self) -> native.Prepared | None:
        """Put the stored tensors into the layout of a native kernel; nothing is kept twice.

        Returns that layout, or None where the term stays as it is: no kernels for the device, or a representation
        that no native kernel reads (``refused`` then says which); a term made of terms prepares those, a stack on the
        CPU its members, each in a layout of its own.
        Whoever asks for a stored tensor by its name gets it back as it was, which undoes the layout.
        """
        if self.is_prepared or self._refused is not None:
            return self._prepared
        if self.stack:
            if native.engine(torch.device("cpu")) and all(
                type(tensor) is Tensor and tensor.device.type == "cpu" for tensor in self.own_tensors().values()
            ):
                self._prepare_members()
            return None
        operation = self.operation()
        if operation is None:
            for part in self.modules():
                if isinstance(part, Term) and part is not self:
                    part.prepare_()
            return None
        tensors = self.own_tensors().values()
        devices = {tensor.device for tensor in tensors}
        if len(devices) != 1 or any(type(tensor) is not Tensor for tensor in tensors):
            return None
        engine = native.engine(devices.pop())
        if engine is None:
            return None
        family, arguments, multiplier = operation
        try:
            self._prepared = engine.prepare(family, arguments, multiplier)
        except native.NotCovered as reason:
            self._refused = str(reason)
            return None
        for name in self._operands():
            self._buffers[name] = torch.empty_like(self._buffers[name], device="meta")  # type: ignore[arg-type]
        return self._prepared

    def _prepare_members(self) -> None:
        """``prepare_`` of a stack's members; those that are made of terms stay as they are."""
        if not self._operands():
            return
        members = tuple(self._member(index) for index in range(self.stack[0]))
        for member in members:
            member.prepare_()
            if not member.is_prepared:
                self._refused = member.refused
                return
        self._members = members
        for name in self._operands():
            self._buffers[name] = torch.empty_like(self._buffers[name], device="meta")  # type: ignore[arg-type]

    def prepared_for(self, x: Tensor) -> native.Prepared | None:
        """The layout for a native product with ``x``; None where torch computes it."""
        if self._prepared is not None and not native.takes(x):
            self._undo()
        return self._prepared

    def restore_(self) -> None:
        """Undo ``prepare_``, of this term and its parts: every stored tensor is where and what it was."""
        for part in self.modules():
            if isinstance(part, Term):
                part._undo()

    def _undo(self) -> None:
        if self._members:  # else nothing is written: a compiler would make a program for each shape
            members, self._members = self._members, ()
            for member in members:
                member.restore_()
            for name in self._operands():
                parts = [member._buffers[name] for member in members]
                self._buffers[name] = torch.stack(parts)  # type: ignore[arg-type]
        if self._prepared is None:
            return
        names, tensors = self._operands(), [value for value in self._prepared.canonical() if isinstance(value, Tensor)]
        self._buffers.update(zip(names, tensors, strict=True))
        self._prepared = None

    @property
    def is_prepared(self) -> bool:
        """Whether the stored tensors are in the layout of a native kernel."""
        return self._prepared is not None or bool(self._members)

    @property
    def prepared(self) -> native.Prepared | None:
        """That layout."""
        return self._prepared

    @property
    def quantizes_activations(self) -> bool:
        """Whether a native kernel serves this term that ``fast`` execution lets quantize activations."""
        if self._members:
            return any(member.quantizes_activations for member in self._members)
        return self._prepared is not None and self._prepared.multiplies_bytes

    @property
    def refused(self) -> str | None:
        """Why no native kernel reads this term; None if one does, or nobody asked yet."""
        return self._refused

    def _operands(self) -> list[str]:
        """Names of the tensors that the op reads, in the order of its arguments."""
        return []

    def own_tensors(self) -> dict[str, Tensor]:
        """The term's own stored tensors by name (not those of its parts)."""
        return {name: tensor for name, tensor in self._buffers.items() if tensor is not None}

    def forward(self, x: Tensor) -> Tensor:
        """``x @ weight.T`` for ``x [..., columns]``, in the dtype of ``x``. Only for a term that is not stacked.

        Raises FormatError when ``x`` has another number of channels.
        """
        # A compiler that treats sizes as symbols learns here that this one is a number.
        if x.shape[-1] != self.columns:
            raise FormatError(f"The input has {x.shape[-1]} channels, but the weight has {self.columns} columns.")
        if self.transforms_input:
            x = self.spec.input.transform(x, self.own_tensors())
        return self.product(x)

    @abstractmethod
    def product(self, x: Tensor) -> Tensor:
        """``forward`` on the term's own input."""

    def decode(self) -> Tensor:
        """The dense weight, float32 of ``shape``."""
        if self.stack:
            return torch.stack([self.select(index).decode() for index in range(self.stack[0])])
        weight = self.decode_member()
        return self.spec.input.fold(weight, self.own_tensors()) if self.transforms_input else weight

    @abstractmethod
    def decode_member(self) -> Tensor:
        """The dense weight on the term's own input, float32 ``[rows, columns]``; not for a stacked term."""

    def select(self, index: int) -> Term:
        """Member ``index`` of the first stack dimension, sharing storage."""
        if self._members:
            member = self._members[index]
            member.fast = self.fast
            return member
        member = self._member(index)
        for part in member.modules():
            if isinstance(part, Term):  # a layout would be made anew for every use
                part._refused = "a member of a stack"
        return member

    def _member(self, index: int) -> Term:
        return self.spec.build(self.shape[1:], {name: tensor[index] for name, tensor in self.named_buffers()})

    def named_buffers(self, *args: Any, **kwargs: Any) -> Any:
        self.restore_()
        return super().named_buffers(*args, **kwargs)

    def get_buffer(self, target: str) -> Tensor:
        owner = self.get_submodule(target.rpartition(".")[0])
        if isinstance(owner, Term):
            owner._undo()
        return super().get_buffer(target)

    def byte_count(self) -> ByteCount:
        """Bytes of the stored tensors by purpose."""
        purposes = {name: entry.purpose for name, entry in self.spec.layout(self.shape).items()}
        count = dict.fromkeys(("codes", "scales", "tables", "indices", "values", "transform"), 0)
        for name, tensor in nn.Module.named_buffers(self):  # sizes are known in any layout
            size = tensor.numel() * tensor.element_size()
            if purposes[name] == "entries":  # a 16-bit value and a 16-bit column in one word
                count["values"] += size // 2
                count["indices"] += size - size // 2
            else:
                count[purposes[name]] += size
        return ByteCount(**count)

    def check(self) -> None:
        """Raise FormatError when stored numbers could mislead a kernel: NaN, or positions and codes out of bounds."""
        self.restore_()
        if self.stack:
            for index in range(self.stack[0]):
                self.select(index).check()
            return
        for name in self.floating:
            tensor = self._buffers.get(name)
            if tensor is not None and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise FormatError(f"'{name}' holds NaN or infinity")
        self.spec.input.check(self.own_tensors(), self.columns)
        self.check_member()

    def check_member(self) -> None:
        """The checks of a particular kind of term, for a term that is not stacked."""

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._undo()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._undo()
        self._refused = None
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Term:
        self._undo()

        def move_only(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move_only, recurse)

    def extra_repr(self) -> str:
        return f"shape={list(self.shape)}, {self.spec.model_dump(exclude_defaults=True, exclude={'type'})}"

    def _register(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


def op_arguments(term: Term, names: tuple[str | None, ...], plain: tuple[Any, ...]) -> tuple[Any, ...]:
    """Buffers by name (None for those the term does not have), followed by plain numbers and strings."""
    return (*(term._buffers.get(name) if name else None for name in names), *plain)
