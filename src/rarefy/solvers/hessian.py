"""The inverse of a layer's Hessian, factored once for all weights that read one input.

For a squared output error the Hessian of every row is the Gram matrix of the inputs. Column solvers need only the
upper triangular ``U`` with ``inverse(H) = U^T U``: ``U[i, i:]`` is how column ``i``'s error is best made up for by the
columns after it (Frantar et al. 2022, GPTQ, section 3.3).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rarefy.statistics import Gram

# Steps of dampening that are tried after the wanted one, each ten times the last, up to the mean of the diagonal.
STRONGEST = 1.0
# An expert that saw fewer tokens than it has columns has a singular Hessian: it is damped at least this much.
FEW_TOKENS = 0.1


@dataclass(frozen=True)
class InverseHessian:
    """``upper`` float32 ``[members, columns, columns]`` and ``diagonal`` of the Hessian ``[members, columns]``, both in
    the order ``order`` int64 ``[members, columns]`` (position -> column); ``sorted`` says whether that may differ from
    the stored one. ``notes`` tell every fallback."""

    upper: Tensor
    diagonal: Tensor
    order: Tensor
    sorted: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def columns(self) -> int:
        return self.upper.shape[-1]

    @property
    def scales(self) -> Tensor:
        """The diagonal of ``upper``, ``[members, columns]``: an error's cost is ``(error / scale) ** 2 / 2``."""
        return self.upper.diagonal(dim1=1, dim2=2)

    def member(self, index: int) -> InverseHessian:
        """That of one stacked expert."""
        part = slice(index, index + 1)
        return InverseHessian(self.upper[part], self.diagonal[part], self.order[part], self.sorted)

    def hessian(self) -> Tensor:
        """What was inverted, dampening included: float32 ``[members, columns, columns]`` in stored order."""
        eye = torch.eye(self.columns, device=self.upper.device).expand_as(self.upper)
        root = torch.linalg.solve_triangular(self.upper, eye, upper=True)
        whole = root @ root.transpose(1, 2)
        back = self.order.argsort(1)
        rows = whole.gather(1, back[..., None].expand_as(whole))
        return rows.gather(2, back[:, None].expand_as(whole))

    def in_place(self, numbers: Tensor) -> Tensor:
        """``numbers [members, columns]`` from processing order to stored order."""
        return torch.empty_like(numbers).scatter_(1, self.order, numbers)


def inverse_hessian(gram: Gram, dampening: float, sort: bool = False) -> InverseHessian:
    """Invert the mean of ``gram`` plus ``dampening`` times its mean diagonal.

    ``sort`` puts the columns with the largest inputs first. A column that never had an input counts as one with the
    mean input, so that its weights are rounded as they are. When a factorization fails the ladder is: more dampening,
    64 bits, the diagonal alone; each rung taken is noted.
    """
    members = gram.mean() if gram.members is not None else gram.mean()[None]
    tokens = gram.tokens.reshape(-1).tolist()
    found = [_factor(own, dampening, sort, count) for own, count in zip(members, tokens, strict=True)]
    uppers, diagonals, orders, notes = zip(*found, strict=True)
    named = [
        f"{note} (expert {index})" if gram.members is not None else note
        for index, own in enumerate(notes)
        for note in own
    ]
    return InverseHessian(torch.stack(uppers), torch.stack(diagonals), torch.stack(orders), sort, named)


def _factor(gram: Tensor, dampening: float, sort: bool, tokens: int) -> tuple[Tensor, Tensor, Tensor, list[str]]:
    notes: list[str] = []
    columns = gram.shape[0]
    order = torch.arange(columns, device=gram.device)
    diagonal = gram.diagonal().clone()
    mean = diagonal.mean()
    if not tokens or not float(mean) > 0:
        notes.append("no calibration input reached it; rounded to nearest")
        return torch.eye(columns, device=gram.device), torch.ones_like(diagonal), order, notes
    dead = diagonal == 0
    diagonal = torch.where(dead, mean, diagonal)
    if sort:
        order = diagonal.argsort(descending=True, stable=True)
        gram, diagonal = gram[order][:, order], diagonal[order]
    if tokens < columns:
        notes.append(f"only {tokens} calibration tokens for {columns} columns")
        dampening = max(dampening, FEW_TOKENS)
    for note, attempt in _ladder(dampening):
        upper = attempt(_damped(gram, diagonal, float(mean)))
        if upper is not None:
            return upper, diagonal, order, notes + note
    notes.append("its Hessian could not be factored; columns were rounded one by one")
    return torch.diag(diagonal.rsqrt()), diagonal, order, notes


Damped = Callable[[float], Tensor]


def _damped(gram: Tensor, diagonal: Tensor, mean: float) -> Damped:
    def build(dampening: float) -> Tensor:
        damped = gram.clone()
        damped.diagonal().copy_(diagonal + dampening * mean)
        return damped

    return build


def _ladder(dampening: float) -> list[tuple[list[str], Callable[[Damped], Tensor | None]]]:
    rungs: list[tuple[list[str], Callable[[Damped], Tensor | None]]] = [([], lambda build: _upper(build(dampening)))]
    stronger = dampening
    while stronger < STRONGEST:
        stronger = min(stronger * 10 or 0.01, STRONGEST)
        note = f"its Hessian was not positive definite; dampening {stronger:g} was used"
        rungs.append(([note], lambda build, value=stronger: _upper(build(value))))  # type: ignore[misc]
    note = "its Hessian was not positive definite in 32 bits; factored in 64 bits"
    rungs.append(([note], lambda build: _upper(build(dampening).double())))
    return rungs


def _upper(damped: Tensor) -> Tensor | None:
    """Upper triangular ``U`` with ``inverse(damped) = U^T U``, float32; None when ``damped`` has no factorization.

    The Cholesky factor of the matrix in reverse order is, reversed again, an upper ``R`` with ``damped = R R^T``, and
    ``U = inverse(R)``: one factorization and one triangular inverse.
    """
    lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
    if int(failed):
        return None
    root = lower.flip(0, 1)
    eye = torch.eye(root.shape[0], dtype=root.dtype, device=root.device)
    upper = torch.linalg.solve_triangular(root, eye, upper=True).float()
    return upper if bool(torch.isfinite(upper).all()) else None
