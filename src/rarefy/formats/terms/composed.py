"""Terms made of terms: a product of two, a partition into parts, a reference to one stored elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from rarefy.core.config import StrictModel
from rarefy.core.errors import FormatError
from rarefy.formats.inputs import RawInput
from rarefy.formats.layout import Layout, TensorLayout, prefixed
from rarefy.formats.terms.base import Shape, Term, TermSpec
from rarefy.formats.terms.plain import DenseSpec, ResidualSpec, SparseSpec
from rarefy.formats.terms.quantized import QuantizedSpec

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_DEPTH = 8


class ProductSpec(TermSpec):
    """``left @ right`` with ``left [rows, rank]``, ``right [rank, columns]``: low rank, or a dictionary and its codes.

    On disk the factors are ``lowrank_b`` (left) and ``lowrank_a`` (right, applied first), as in LoRA.
    """

    type: Literal["product"] = "product"
    rank: int = Field(ge=1)
    left: AnyTerm
    right: AnyTerm

    def member_layout(self, rows: int, columns: int) -> Layout:
        return {
            **prefixed("lowrank_b", self.left.layout((rows, self.rank))),
            **prefixed("lowrank_a", self.right.layout((self.rank, columns))),
        }

    def build(self, shape: Shape, tensors: Mapping[str, Tensor]) -> Product:
        *stack, rows, columns = shape
        left = self.left.build((*stack, rows, self.rank), _part(tensors, "lowrank_b"))
        right = self.right.build((*stack, self.rank, columns), _part(tensors, "lowrank_a"))
        return Product(left, right, self, _own(tensors))


class Product(Term):
    """``x -> left(right(x))``; the dense product is never formed."""

    spec: ProductSpec

    def __init__(
        self, left: Term, right: Term, spec: ProductSpec | None = None, tensors: Mapping[str, Tensor] | None = None
    ):
        if left.columns != right.rows or left.stack != right.stack:
            raise FormatError(f"Factors of shapes {list(left.shape)} and {list(right.shape)} do not multiply.")
        spec = spec or ProductSpec(rank=left.columns, left=left.spec, right=right.spec)  # type: ignore[arg-type]
        super().__init__(spec, (*left.stack, left.rows, right.columns))
        self.lowrank_b, self.lowrank_a = left, right
        self._register(tensors or {})

    def product(self, x: Tensor) -> Tensor:
        return self.lowrank_b(self.lowrank_a(x))

    def decode_member(self) -> Tensor:
        return self.lowrank_b.decode() @ self.lowrank_a.decode()

    def check_member(self) -> None:
        self.lowrank_b.check()
        self.lowrank_a.check()


class PartSpec(StrictModel):
    """One part of a partition: how many rows, columns or members of the stack it covers, and its term."""

    size: int = Field(ge=1)
    term: AnyTerm


class PartitionSpec(TermSpec):
    """Different terms for different rows (heads, fused projections), columns (salient ones) or experts.

    Parts follow each other along ``axis``; with ``ordered`` the tensor ``indices`` (int32) says which row, column or
    expert each position of that sequence really is.
    """

    type: Literal["partition"] = "partition"
    axis: Literal["rows", "columns", "experts"]
    parts: tuple[PartSpec, ...] = Field(min_length=1)
    ordered: bool = False

    def model_post_init(self, context: object) -> None:
        if self.axis == "experts" and not isinstance(self.input, RawInput):
            raise ValueError("a partition by experts has no input of its own; give each part its input")

    def layout(self, shape: Shape) -> Layout:
        self._check_extent(shape)
        return self._parts_layout(shape) if self.axis == "experts" else super().layout(shape)

    def member_layout(self, rows: int, columns: int) -> Layout:
        self._check_extent((rows, columns))
        return self._parts_layout((rows, columns))

    def _parts_layout(self, shape: Shape) -> Layout:
        layout: Layout = {}
        for index, part in enumerate(self.parts):
            layout.update(prefixed(f"parts.{index}", part.term.layout(self.part_shape(shape, part.size))))
        if self.ordered:
            layout["indices"] = TensorLayout(torch.int32, (self.extent,), "indices")
        return layout

    def build(self, shape: Shape, tensors: Mapping[str, Tensor]) -> Partition:
        self._check_extent(shape)
        parts: list[Term] = [
            part.term.build(self.part_shape(shape, part.size), _part(tensors, f"parts.{index}"))
            for index, part in enumerate(self.parts)
        ]
        return Partition(self, shape, parts, _own(tensors))

    @property
    def extent(self) -> int:
        return sum(part.size for part in self.parts)

    def part_shape(self, shape: Shape, size: int) -> Shape:
        """The shape of a part of ``size`` along the axis."""
        position = {"rows": -2, "columns": -1, "experts": -3}[self.axis]
        changed = list(shape)
        changed[position] = size
        return tuple(changed)

    def _check_extent(self, shape: Shape) -> None:
        position = {"rows": 2, "columns": 1, "experts": 3}[self.axis]
        if len(shape) < position or (self.axis == "experts" and len(shape) > 3):
            raise FormatError(f"a weight of shape {list(shape)} cannot be partitioned by {self.axis}")
        if shape[-position] != self.extent:
            raise FormatError(f"the parts cover {self.extent} {self.axis} of {shape[-position]}")


class Partition(Term):
    """Parts side by side along one axis."""

    spec: PartitionSpec

    def __init__(self, spec: PartitionSpec, shape: Shape, parts: list[Term], tensors: Mapping[str, Tensor]):
        super().__init__(spec, shape)
        self.parts = nn.ModuleList(parts)
        self._register(tensors)
        self.axis, self.sizes, self.ordered = spec.axis, [part.size for part in spec.parts], spec.ordered

    @classmethod
    def of(
        cls, axis: Literal["rows", "columns", "experts"], parts: list[Term], indices: Tensor | None = None
    ) -> Partition:
        """Join ``parts`` along ``axis``; ``indices`` names the original position of each, in the order of the parts."""
        position = {"rows": -2, "columns": -1, "experts": -3}[axis]
        specs = tuple(PartSpec(size=part.shape[position], term=part.spec) for part in parts)  # type: ignore[arg-type]
        shape = list(parts[0].shape)
        shape[position] = sum(part.size for part in specs)
        tensors = {} if indices is None else {"indices": indices.to(torch.int32)}
        spec = PartitionSpec(axis=axis, parts=specs, ordered=indices is not None)
        return cls(spec, tuple(shape), parts, tensors)

    def product(self, x: Tensor) -> Tensor:
        if self.axis == "rows":
            y = torch.cat([part(x) for part in self._terms()], dim=-1)
            return y.index_select(-1, self._places()) if self.ordered else y
        if self.ordered:
            x = x.index_select(-1, self.get_buffer("indices"))
        pieces = zip(self._terms(), x.split(self.sizes, -1), strict=True)
        return torch.stack([part(piece) for part, piece in pieces]).sum(0)

    def decode(self) -> Tensor:
        if self.axis != "experts":
            return super().decode()
        return torch.stack([self.select(index).decode() for index in range(self.shape[0])])

    def decode_member(self) -> Tensor:
        dim = 0 if self.axis == "rows" else 1
        joined = torch.cat([part.decode() for part in self._terms()], dim=dim)
        return joined.index_select(dim, self._places()) if self.ordered else joined

    def select(self, index: int) -> Term:
        if self.axis != "experts":
            return super().select(index)
        position = int((self.get_buffer("indices") == index).nonzero()) if self.ordered else index
        for part, size in zip(self._terms(), self.sizes, strict=True):
            if position < size:
                return part.select(position)
            position -= size
        raise IndexError(f"expert {index} of {self.shape[0]}")

    def _prepare_members(self) -> None:
        if self.axis == "experts":
            for part in self._terms():
                part.prepare_()

    def check(self) -> None:
        if self.axis == "experts":
            self.check_member()
        else:
            super().check()

    def check_member(self) -> None:
        for part in self._terms():
            part.check()
        if self.ordered:
            order = self.get_buffer("indices").to(torch.int64).sort().values
            if not torch.equal(order, torch.arange(len(order), device=order.device)):
                raise FormatError("'indices' do not name every position once")

    def _terms(self) -> Iterator[Term]:
        for part in self.parts:
            assert isinstance(part, Term)
            yield part

    def _places(self) -> Tensor:
        """Where each original position lies in the sequence of the parts."""
        return self.get_buffer("indices").argsort()


class SharedSpec(TermSpec):
    """The term stored under another name of the same model, such as one dictionary for many layers."""

    type: Literal["shared"] = "shared"
    ref: str = Field(min_length=1)

    def member_layout(self, rows: int, columns: int) -> Layout:
        return {}

    def build(self, shape: Shape, tensors: Mapping[str, Tensor]) -> Shared:
        return Shared(self, shape, tensors)


class Shared(Term):
    """A use of another term's storage, counted at its owner. ``resolve`` connects it once the whole model exists."""

    spec: SharedSpec

    def __init__(self, spec: SharedSpec, shape: Shape, tensors: Mapping[str, Tensor] | None = None):
        super().__init__(spec, shape)
        self._register(tensors or {})
        # Held in a list: a registered submodule would be stored, moved and counted twice.
        self._target: list[Term] = []

    @classmethod
    def of(cls, target: Term, ref: str) -> Shared:
        """A use of ``target``, which the model stores under the name ``ref``."""
        shared = cls(SharedSpec(ref=ref), target.shape)
        shared._target.append(target)
        return shared

    def resolve(self, root: nn.Module) -> None:
        """Find the owner by name. Raises FormatError when it is absent, of another shape, or itself a reference."""
        try:
            target = root.get_submodule(self.spec.ref)
        except AttributeError:
            raise FormatError(f"shared term '{self.spec.ref}' does not exist") from None
        if not isinstance(target, Term) or isinstance(target, Shared) or target.shape != self.shape:
            raise FormatError(f"shared term '{self.spec.ref}' is not a stored term of shape {list(self.shape)}")
        if any(isinstance(part, Shared) for part in target.modules()):
            raise FormatError(f"shared term '{self.spec.ref}' refers to other terms")
        self._target[:] = [target]

    @property
    def target(self) -> Term:
        if not self._target:
            raise FormatError(f"Shared term '{self.spec.ref}' is not connected; call resolve(model) first.")
        return self._target[0]

    def product(self, x: Tensor) -> Tensor:
        return self.target(x)

    def decode_member(self) -> Tensor:
        return self.target.decode()

    def select(self, index: int) -> Term:
        member = Shared(self.spec, self.shape[1:], {name: tensor[index] for name, tensor in self.named_buffers()})
        if self._target:  # not yet, when a loader checks a term before the whole model exists
            member._target.append(self.target.select(index))
        return member


AnyTerm = Annotated[
    QuantizedSpec | SparseSpec | ResidualSpec | DenseSpec | ProductSpec | PartitionSpec | SharedSpec,
    Field(discriminator="type"),
]
for _spec in (ProductSpec, PartSpec, PartitionSpec):
    _spec.model_rebuild()


def check_depth(data: Any, depth: int = 0) -> None:
    """Raise FormatError for descriptions nested deeper than any real weight, before a recursive parser meets them."""
    if depth > 4 * MAX_DEPTH:
        raise FormatError(f"a term is nested deeper than {MAX_DEPTH} levels")
    for value in data.values() if isinstance(data, dict) else data if isinstance(data, list) else ():
        check_depth(value, depth + 1)


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    start = prefix + "."
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def _own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if "." not in name}
