"""A program in fewer, larger operations, for executors to which every operation costs a launch.

Only neighbours are joined, and nothing is computed otherwise: a residual sum with the norms around it, projections of
the same input, and everything between those of q, k, v and of the mixed heads.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

from rarefy.core.errors import UnsupportedError
from rarefy.decoding.program import Add, Attend, Cap, Embed, Gate, Norm, Operation, Project, Rotate


@dataclass(frozen=True)
class AddNorm:
    """``add``, with ``branch`` applied to what is added, then ``norm``."""

    norm: Norm
    add: Add | None = None
    branch: Norm | None = None


@dataclass(frozen=True)
class Projects:
    """Projections of the same input."""

    parts: tuple[Project, ...]


@dataclass(frozen=True)
class Attention:
    """Norms of the heads of q and k where there are some, their rotation, and attention."""

    attend: Attend
    q_rotate: Rotate
    k_rotate: Rotate
    q_norm: Norm | None = None
    k_norm: Norm | None = None


Fused: TypeAlias = Embed | AddNorm | Projects | Attention | Gate | Add | Cap


def fuse(operations: Iterable[Operation]) -> tuple[Fused, ...]:
    """``operations`` joined. Raises UnsupportedError for heads that are not rotated and attended together."""
    left = list(operations)
    found: list[Fused] = []
    while left:
        found.append(_attention(left) or _projects(left) or _add_norm(left) or _plain(left))
    return tuple(found)


def _attention(left: list[Operation]) -> Attention | None:
    rest = iter(left)
    parts: list[Operation] = []
    norms: dict[str, Norm] = {}
    turns: dict[str, Rotate] = {}
    for operation in rest:
        parts.append(operation)
        match operation:
            case Norm(x=x, out=out) if x == out and x not in norms and x not in turns:
                norms[x] = operation
            case Rotate(x=x) if x not in turns:
                turns[x] = operation
            case Attend(q=q, k=k) if set(turns) == {q, k} and set(norms) <= {q, k}:
                del left[: len(parts)]
                return Attention(operation, turns[q], turns[k], norms.get(q), norms.get(k))
            case _:
                return None
    return None


def _projects(left: list[Operation]) -> Projects | None:
    parts: list[Project] = []
    for operation in left:
        if not isinstance(operation, Project) or operation.x != (parts[0].x if parts else operation.x):
            break
        parts.append(operation)
        if operation.out == operation.x:
            break
    del left[: len(parts)]
    return Projects(tuple(parts)) if parts else None


def _add_norm(left: list[Operation]) -> AddNorm | None:
    match left:
        case [Norm(x=x, out=out, heads=1) as branch, Add(y=y) as add, Norm(heads=1) as norm, *_] if (
            x == out == y and norm.x == add.x != norm.out
        ):
            del left[:3]
            return AddNorm(norm, add, branch)
        case [Add() as add, Norm(heads=1) as norm, *_] if norm.x == add.x != norm.out:
            del left[:2]
            return AddNorm(norm, add)
        case [Norm(heads=1) as norm, *_]:
            del left[:1]
            return AddNorm(norm)
    return None


def _plain(left: list[Operation]) -> Fused:
    operation = left.pop(0)
    if isinstance(operation, Embed | Gate | Add | Cap):
        return operation
    raise UnsupportedError(f"A {type(operation).__name__} stands where the GPU's runner knows none.")
