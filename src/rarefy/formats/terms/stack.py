"""Members of equal shape (experts) as one stacked term."""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy.core.errors import FormatError
from rarefy.formats.terms.base import Term
from rarefy.formats.terms.composed import Partition, Shared


def stack(members: list[Term]) -> Term:
    """One term ``[len(members), rows, columns]`` from terms of one shape.

    Members of one description share tensors with a leading dimension, sizes that depend on the data filled with zeros
    to the largest; members of different descriptions become a partition by experts.
    """
    if any(member.shape != members[0].shape for member in members):
        raise FormatError("Only terms of one shape can be stacked.")
    if any(isinstance(part, Shared) for member in members for part in member.modules()):
        raise FormatError("Shared terms cannot be stacked; let every expert store its own.")
    kinds: dict[str, list[int]] = {}
    for index, member in enumerate(members):
        kinds.setdefault(member.spec.model_dump_json(), []).append(index)
    groups = list(kinds.values())
    parts = [_stack_alike([members[index] for index in group]) for group in groups]
    if len(parts) == 1:
        return parts[0]
    order = [index for group in groups for index in group]
    indices = torch.tensor(order, device=next(parts[0].buffers()).device)
    return Partition.of("experts", parts, None if order == sorted(order) else indices)


def _stack_alike(members: list[Term]) -> Term:
    first = members[0]
    layout = first.spec.layout(first.shape)
    tensors = {}
    for name, entry in layout.items():
        pieces = [dict(member.named_buffers())[name] for member in members]
        flexible = [isinstance(size, str) for size in entry.shape]
        tensors[name] = torch.stack(_filled(name, pieces, flexible))
    return first.spec.build((len(members), *first.shape), tensors)


def _filled(name: str, pieces: list[Tensor], flexible: list[bool]) -> list[Tensor]:
    largest = [max(sizes) for sizes in zip(*(piece.shape for piece in pieces), strict=True)]
    if any(list(piece.shape) != largest for piece in pieces) and not flexible[0]:
        # Only a flat list can be filled at its end; equal numbers per row would stop being equal.
        raise FormatError(f"'{name}' differs in size between experts; use a bitmap or csr index for them.")
    return [
        torch.nn.functional.pad(piece, [end for size, top in zip(piece.shape[::-1], largest[::-1], strict=True)
                                        for end in (0, top - size)])
        for piece in pieces
    ]  # fmt: skip
