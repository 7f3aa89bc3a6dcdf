"""A program's step of one sequence as one launch that stays on the GPU, where its operations and weights allow it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rarefy.core.errors import UnsupportedError
from rarefy.decoding.fuse import AddNorm, Attention, Fused, Projects
from rarefy.decoding.products import prepared_of
from rarefy.decoding.program import Add, Embed, Gate, Norm, Program, Rotate
from rarefy.kernels.cuda.resident import (
    ACTIVATIONS,
    ATTENTION,
    CENTRED,
    PLAIN,
    PRODUCT,
    Form,
    Resident,
    Weights,
    blocks_of,
    weights,
)

WARPS, EACH = 8, 2  # of a block that multiply, and steps of a stage that each takes


@dataclass
class Product:
    """``norm``: of what is multiplied; ``gate``: what opens the second half of the rows; ``add``: the result is added
    to what is there."""

    x: str
    outs: tuple[str, ...]
    weights: Weights
    norm: Norm | None
    bias: Tensor | None
    add: bool = False
    gate: Gate | None = None

    @property
    def out(self) -> str:
        """The buffer of the result, which is named after the first of several."""
        return self.outs[0] if self.gate is None else self.gate.out


@dataclass
class Plan:
    """The phases of a step, and what is left to do when they have ended."""

    embed: Embed
    phases: list[Product | Attention] = field(default_factory=list)
    rest: tuple[Fused, ...] = ()

    def products(self) -> list[Product]:
        return [phase for phase in self.phases if isinstance(phase, Product)]


def plan(operations: Sequence[Fused], dtype: torch.dtype) -> Plan:
    """Raises UnsupportedError for operations or weights that a step in one launch does not take, unless they come after
    all layers, as a dense head does."""
    first, *left = operations
    if not isinstance(first, Embed):
        raise UnsupportedError("A step in one launch begins with tokens.")
    made, norms = Plan(first), dict[str, Norm]()
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
        case Projects():
            made.phases.append(_product(operation, norms, dtype))
        case Attention(_, _, _, q_norm, k_norm):
            if any(norm is not None and norm.weight.dtype != dtype for norm in (q_norm, k_norm)):
                raise UnsupportedError("A step in one launch takes norms in the model's dtype.")
            made.phases.append(operation)
        case Gate():
            last = made.phases[-1]
            if not isinstance(last, Product) or last.outs != (operation.gate, operation.up) or last.weights.rows % 32:
                raise UnsupportedError("A step in one launch takes gates right after their product.")
            last.gate = operation
        case _:
            raise UnsupportedError(f"A step in one launch takes no {type(operation).__name__} like this.")


def _product(operation: Projects, norms: dict[str, Norm], dtype: torch.dtype) -> Product:
    linears, x = [part.linear for part in operation.parts], operation.parts[0].x
    terms = prepared_of(linears)
    biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
    if terms is None or len(biases) not in (0, len(linears)) or any(bias.dtype != dtype for bias in biases):
        raise UnsupportedError("A step in one launch takes weights in code that can lie together.")
    norm, outs = norms.get(x), tuple(part.out for part in operation.parts)
    coded = weights(terms, WARPS * EACH)
    return Product(norm.x if norm else x, outs, coded, norm, torch.cat(biases) if biases else None)


def _add(made: Plan, add: Add) -> None:
    last = made.phases[-1]
    if not isinstance(last, Product) or last.outs != (add.y,) or last.gate is not None:
        raise UnsupportedError("A step in one launch adds what a product has just made.")
    last.outs, last.add = (add.x,), True


class ResidentStep:
    """``program``'s step for one sequence, of which ``operations`` are the fused ones. Raises UnsupportedError for one
    that does not fit."""

    def __init__(self, program: Program, operations: Sequence[Fused], dtype: torch.dtype, device: torch.device):
        self.plan = plan(operations, dtype)
        products = self.plan.products()
        entries: dict[Any, int] = {}
        for each in products:
            code = each.weights.code
            entries[code] = max(entries.get(code, 0), each.weights.entries)
        self._kinds = list(entries)
        self.form = Form(
            tuple(entries.items()), dtype == torch.float16, program.heads, program.kv_heads, program.head_dim,
            blocks_of(device), 2 * max(each.weights.steps * each.weights.code.step for each in products), WARPS, EACH,
        )  # fmt: skip
        self.form.check()
        embed = self.plan.embed
        widths = {embed.out: embed.table.embedding_dim}
        for phase in self.plan.phases:
            if isinstance(phase, Attention):
                widths[phase.attend.out] = program.heads * program.head_dim
            elif not phase.add:
                widths[phase.out] = phase.weights.rows // (1 if phase.gate is None else 2)
        self.buffers = {name: torch.zeros(1, width, dtype=dtype, device=device) for name, width in widths.items()}

    @property
    def hidden(self) -> Tensor:
        """Where the token's embedding is wanted, ``[1, width]``."""
        return self.buffers[self.plan.embed.out]

    def bind(
        self, keys: Tensor, values: Tensor, position: Tensor, turned: Callable[[Rotate], Tensor]
    ) -> Resident:
        """The step with caches ``[layers, 1, heads, capacity, channels]``. It leaves logits ``[1, vocabulary]``, or
        what ``plan.rest`` makes them of, in ``buffers``. ``position`` int32 ``[1]`` is only read; ``turned`` answers
        with cosines and sines."""
        kept: list[Any] = [self, keys, values]
        phases = []
        for phase in self.plan.phases:
            if isinstance(phase, Product):
                phases.append(self._of_product(phase))
            else:
                turns, layer = turned(phase.q_rotate), phase.attend.layer
                kept.append(turns)
                phases.append(self._of_attention(phase, keys[layer, 0], values[layer, 0], turns))
        return Resident(self.form, phases, position, kept)

    def _of_product(self, phase: Product) -> dict[str, Any]:
        said = {
            **phase.weights.phase(), "kind": PRODUCT, "code": self._kinds.index(phase.weights.code),
            "x": self.buffers[phase.x].data_ptr(), "y": self.buffers[phase.out].data_ptr(), "add": int(phase.add),
            **_norm(phase.norm, ""),
        }  # fmt: skip
        if phase.norm is not None:
            said["input_scale"] = _scale(phase.norm)
        if phase.bias is not None:
            said["bias"] = phase.bias.data_ptr()
        if phase.gate is not None:
            half = said["units"] // 2
            said.update(units=half, pair=half, activation=ACTIVATIONS[phase.gate.activation])
        return said

    def _of_attention(self, phase: Attention, keys: Tensor, values: Tensor, turns: Tensor) -> dict[str, Any]:
        attend = phase.attend
        q, k = phase.q_rotate, phase.k_rotate
        if (q.inv_freq.data_ptr(), q.scaling) != (k.inv_freq.data_ptr(), k.scaling):
            raise UnsupportedError("A step in one launch turns queries and keys alike.")
        return {
            "kind": ATTENTION, "x": self.buffers[attend.q].data_ptr(), "y": self.buffers[attend.out].data_ptr(),
            "keys": keys.data_ptr(), "values": values.data_ptr(), "head_stride": keys.stride(0),
            "turns": turns.data_ptr(), "window": attend.window or 0, "score_scale": attend.scale * math.log2(math.e),
            "softcap": (attend.softcap or 0.0) * math.log2(math.e), **_norm(phase.q_norm, ""),
            **_norm(phase.k_norm, "k_"),
        }  # fmt: skip


def _norm(norm: Norm | None, prefix: str) -> dict[str, Any]:
    if norm is None:
        return {}
    kind = CENTRED if norm.centred else PLAIN
    return {f"{prefix}gain": norm.weight.data_ptr(), f"{prefix}eps": norm.eps, f"{prefix}norm": kind}


def _scale(norm: Norm) -> float:
    """A power of two that takes the largest number a norm can make to between 2 ** 13 and 2 ** 14, for float16."""
    gain = norm.weight.detach().float() + (1.0 if norm.centred else 0.0)
    most = float(gain.abs().max()) * math.sqrt(norm.weight.numel())
    return 1.0 if most == 0 or norm.weight.dtype == torch.float16 else 2.0 ** (13 - math.floor(math.log2(most)))
