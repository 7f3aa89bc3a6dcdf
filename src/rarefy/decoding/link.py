"""Products that do what follows them: the gate of what they make, or the residual sum and the norm after it.

A norm divides a whole row by one number, which a product can as well be divided by. So whatever makes the residual
stream multiplies it by the norm's gain and leaves the sum of its squares, and the next product takes both: no launch
lies between two products of a layer but attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from rarefy.decoding.fuse import AddNorm, Fused, Projects
from rarefy.decoding.program import Gate, Norm


@dataclass(frozen=True)
class Linked:
    """``product``, whose input is still to be divided as ``normed`` divides it if there is one, and what its result
    becomes: ``after``."""

    product: Projects
    normed: Norm | None = None
    after: After = None


Step: TypeAlias = Fused | Linked
After: TypeAlias = Gate | AddNorm | None


def link(operations: Sequence[Fused], takes: Callable[[Projects, After], bool]) -> tuple[Step, ...]:
    """``operations`` with products linked to what surrounds them, where ``takes`` accepts a product and what its result
    becomes."""
    found: list[Step] = []
    left = list(operations)
    while left:
        operation = left.pop(0)
        if not isinstance(operation, Projects):
            found.append(operation)
            continue
        match left:
            case [Gate() as gate, *_] if _gated(operation, gate) and takes(operation, gate):
                del left[:1]
                found.append(Linked(operation, after=gate))
            case [AddNorm(norm, add, None) as after, Projects(parts) as following, *rest] if (
                add is not None
                and [part.out for part in operation.parts] == [add.y]
                and parts[0].x == norm.out
                and takes(operation, after)
                and takes(following, None)
                and not _read(norm.out, rest)
            ):
                del left[:2]
                found.append(Linked(operation, after=after))
                left.insert(0, following)
            case _:
                found.append(Linked(operation) if takes(operation, None) else operation)
    return tuple(_with_norms(found))


def _gated(product: Projects, gate: Gate) -> bool:
    outs, rows = ([part.out for part in product.parts], [part.linear.out_features for part in product.parts])
    return outs == [gate.gate, gate.up] and rows[0] == rows[1] and rows[0] % 16 == 0


def _read(name: str, operations: Sequence[Fused]) -> bool:
    """Whether one of ``operations`` reads ``name`` before another writes it."""
    for operation in operations:
        match operation:
            case AddNorm(norm, add, _):
                if name in (norm.x, add and add.y):
                    return True
                if norm.out == name:
                    return False
            case Projects(parts) if parts[0].x == name:
                return True
            case Gate(gate, up, _, _) if name in (gate, up):
                return True
    return False


def _with_norms(steps: Sequence[Step]) -> list[Step]:
    """Products that follow one whose result a norm is to divide know that norm."""
    found: list[Step] = []
    for step in steps:
        before = found[-1] if found else None
        if isinstance(step, Linked) and isinstance(before, Linked) and isinstance(before.after, AddNorm):
            found.append(replace(step, normed=before.after.norm))
        elif isinstance(step, Linked) and step.after is None:
            found.append(step.product)
        else:
            found.append(step)
    return found
