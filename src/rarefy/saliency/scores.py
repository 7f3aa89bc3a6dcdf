"""Scores of single weights ``[out, in]`` (or with leading members), float32 and not negative."""

from __future__ import annotations

from torch import Tensor


def magnitude(weight: Tensor) -> Tensor:
    """``|w|``."""
    return weight.abs()


def wanda(weight: Tensor, norm: Tensor) -> Tensor:
    """``|w_ij| * |x_j|`` for the norm of each input column, ``[in]`` or ``[experts, in]``; comparable within a row.

    (Sun et al. 2023, Wanda, equation 1.)
    """
    return weight.abs() * norm.unsqueeze(-2)


def obs(weight: Tensor, scale: Tensor) -> Tensor:
    """``w_ij^2 / U_jj^2``: the output error of losing a weight when all columns after it make up for the loss.

    ``scale`` is ``U_jj``, of a shape that fits ``weight``. (Frantar and Alistarh 2023, SparseGPT, equation 3.)
    """
    return (weight / scale).square()
