"""A program's step of one sequence as one launch that stays on the GPU, where its operations and weights allow it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import log2, e as EULER
from typing import Any

import torch
from torch import Tensor

from rarefy.core.errors import UnsupportedError
from rarefy.decoding.fuse import AddNorm, Attention, Fused, Projects
from rarefy.decoding.products import prepared_of
from rarefy.decoding.program import Add, Embed, Gate, Norm, Program, Rotate
from rarefy.kernels.cuda.resident import ACTIVATIONS, ATTENTION, LEAST, PRODUCT, Form, Resident, Weights, blocks_of, weights

WARPS = 16
PLAIN, CENTRED = 1, 2


@dataclass
class Product:
    """``gate``: what opens the second half of the rows; ``add``: the result is added to what is there."""

    x: str
    outs: tuple[str, ...]
    weights: Weights
    norm: Norm | None
    bias: Tensor | None = None
    add: bool = False
    gate: Gate | None = None


@dataclass
class Plan:
    """The phases of a step, in terms of names, and what is left to do when they have ended."""

    embed: Embed
    phases: list[Product | Attention] = field(default_factory=list)
    rest: tuple[Fused, ...] = ()


def plan(operations: Sequence[Fused], dtype: torch.dtype) -> Plan:
    """Raises UnsupportedError for operations or weights that a step in one launch does not take, unless only the head
    is so."""
    first, *left = operations
    if not isinstance(first, Embed):
        raise UnsupportedError("A step in one launch begins with tokens.")
    made = Plan(first)
    norms: dict[str, Norm] = {}
    for index, operation in enumerate(left):
        try:
            _take(made, norms, operation, dtype)
        except UnsupportedError:
            rest = left[index:]
            if not made.phases or any(isinstance(each, Attention | Gate) for each in rest):
                raise
            wanted = operation.parts[0].x if isinstance(operation, Projects) else None
            made.rest = (*(AddNorm(norm) for out, norm in norms.items() if out == wanted), *rest)
            break
    return made


def _take(made: Plan, norms: dict[str, Norm], operation: Fused, dtype: torch.dtype) -> None:
    """Put one more operation into the phases."""
    match operation:
        case AddNorm(norm, add, None) if norm.weight.dtype == dtype:
            if add is not None:
                _add(made, add)
            norms[norm.out] = norm
        case Add():
            _add(made, operation)
        case Projects(parts):
            x, linears = parts[0].x, [part.linear for part in parts]
            terms = prepared_of(linears)
            biases = [linear.bias for linear in linears if linear.bias is not None]
            if terms is None or len(biases) not in (0, len(linears)) or {each.dtype for each in biases} - {dtype}:
                raise UnsupportedError("A step in one launch takes weights in code that can lie together.")
            own = norms.get(x)
            bias = torch.cat([each.detach() for each in biases]) if biases else None
            outs = tuple(part.out for part in parts)
            made.phases.append(Product(own.x if own else x, outs, weights(terms, dtype == torch.float16, WARPS), own, bias))
        case Attention() if all(norm is None or norm.weight.dtype == dtype for norm in (operation.q_norm, operation.k_norm)):
            made.phases.append(operation)
        case Gate():
            last = made.phases[-1]
            if not isinstance(last, Product) or last.outs != (operation.gate, operation.up) or last.weights.rows % 32:
                raise UnsupportedError("A step in one launch takes gates right after their product.")
            last.gate = operation
        case _:
            raise UnsupportedError(f"A step in one launch takes no {type(operation).__name__} here.")


def _add(made: Plan, add: Add) -> None:
    last = made.phases[-1]
    if not isinstance(last, Product) or last.outs != (add.y,) or last.gate is not None:
        raise UnsupportedError("A step in one launch adds what a product has just made.")
    last.outs, last.add = (add.x,), True


class ResidentStep:
    """``program``'s step for one sequence. Raises UnsupportedError for one that does not fit."""

    def __init__(self, program: Program, operations: Sequence[Fused], dtype: torch.dtype, device: torch.device):
        self._program, self._dtype, self._device = program, dtype, device
        self.plan = plan(operations, dtype)
        products = [phase for phase in self.plan.phases if isinstance(phase, Product)]
        kinds: dict[Any, int] = {}
        for each in products:
            code = each.weights.code
            kinds[code] = max(kinds.get(code, 0), each.weights.entries)
        longest = max(each.weights.phase()["steps"] * each.weights.code.step for each in products)
        self._form = Form(
            tuple(kinds.items()), dtype == torch.float16, program.heads, program.kv_heads, program.head_dim,
            max(1, blocks_of(device) // program.kv_heads), 2 * longest, WARPS,
        )  # fmt: skip
        self._form.check()
        self._kinds = list(kinds)
        self._buffers: dict[str, Tensor] = {}
        embed = self.plan.embed
        self._make((embed.out,), embed.table.weight.shape[1])
        for phase in self.plan.phases:
            if isinstance(phase, Attention):
                self._make((phase.attend.out,), program.heads * program.head_dim)
            elif phase.gate is not None:
                self._make((phase.gate.out,), phase.weights.rows // 2)
            elif not phase.add:
                self._make(phase.outs, phase.weights.rows)

    def _make(self, names: tuple[str, ...], width: int) -> None:
        if names[0] not in self._buffers:
            self._buffers[names[0]] = torch.zeros(1, width, dtype=self._dtype, device=self._device)

    @property
    def hidden(self) -> Tensor:
        """Where the embedding of the token is wanted, ``[1, width]``."""
        return self._buffers[self.plan.embed.out]

    @property
    def made(self) -> dict[str, Tensor]:
        """What a step leaves, by name: the logits ``[1, vocabulary]``, or what ``plan.rest`` makes them of."""
        return dict(self._buffers)

    def bind(
        self, keys: Tensor, values: Tensor, position: Tensor, turned: Callable[[Rotate], Tensor]
    ) -> Resident:
        """The step with caches ``[layers, 1, heads, capacity, channels]``; ``position`` int32 ``[1]`` is read and left
        as it is; ``turned`` answers with cosines and sines."""
        phases, kept = [], [keys, values, position]
        for phase in self.plan.phases:
            if isinstance(phase, Product):
                phases.append(self._product(phase))
                continue
            attend, turns = phase.attend, turned(phase.q_rotate)
            kept.append(turns)
            if phase.k_rotate != replace(phase.q_rotate, x=phase.k_rotate.x, heads=phase.k_rotate.heads):
                raise UnsupportedError("A step in one launch turns queries and keys alike.")
            key, value = keys[attend.layer, 0], values[attend.layer, 0]
            norms = phase.q_norm, phase.k_norm
            own: dict[str, Any] = {}
            for norm, (gain, eps, kind) in zip(norms, (("gain", "eps", "norm"), ("k_gain", "k_eps", "k_norm")), strict=True):
                if norm is not None:
                    own.update({gain: norm.weight.data_ptr(), eps: norm.eps, kind: _kind(norm)})
            phases.append({
                **own, "kind": ATTENTION, "x": self._buffers[attend.q].data_ptr(), "y": self._buffers[attend.out].data_ptr(),
                "keys": key.data_ptr(), "values": value.data_ptr(), "head_stride": key.stride(0),
                "turns": turns.data_ptr(), "window": attend.window or 0, "score_scale": attend.scale * log2(EULER),
                "softcap": (attend.softcap or 0.0) * log2(EULER),
            })  # fmt: skip
        return Resident(self._form, phases, position, (kept, self))

    def _product(self, phase: Product) -> dict[str, Any]:
        norm, own = phase.norm, phase.weights
        out = phase.outs[0] if phase.gate is None else phase.gate.out
        said = {
            **own.phase(), "kind": PRODUCT, "code": self._kinds.index(own.code),
            "x": self._buffers[phase.x].data_ptr(), "y": self._buffers[out].data_ptr(), "add": int(phase.add),
        }  # fmt: skip
        if norm is not None:
            said.update(gain=norm.weight.data_ptr(), eps=norm.eps, norm=_kind(norm))
        if phase.bias is not None:
            said["bias"] = phase.bias.data_ptr()
        if phase.gate is not None:
            half = said["units"] // 2
            said.update(units=half, pair=half, activation=ACTIVATIONS[phase.gate.activation])
        return said


def _kind(norm: Norm) -> int:
    return CENTRED if norm.centred else PLAIN
