"""Scores of single weights ``[out, in]`` (or with leading members), and of groups; float32 and not negative."""

from __future__ import annotations

import torch
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


def taylor(weight: Tensor, gradient: Tensor) -> Tensor:
    """``|g_ij * w_ij|`` for the loss's ``gradient``, of the weight's shape: to first order what losing a weight adds to
    or takes from the loss.

    (Molchanov et al. 2017, Pruning Convolutional Neural Networks for Resource Efficient Inference, equation 7.)
    """
    return (gradient * weight).abs()


def group_obs(groups: Tensor, blocks: Tensor) -> Tensor:
    """``w_G inverse(B_G) w_G^T`` of ``groups [out, groups, size]`` -> ``[out, groups]``: the output error of losing a
    group when all other weights of its row make up for it.

    ``blocks [groups, size, size]``: the part of the inverse Hessian that belongs to a group's inputs.
    (Kurtic et al. 2022, The Optimal BERT Surgeon, section 3.)
    """
    lower = torch.linalg.cholesky(blocks)
    return torch.linalg.solve_triangular(lower, groups.permute(1, 2, 0), upper=False).square().sum(1).T


def group_mean(groups: Tensor, blocks: Tensor) -> Tensor:
    """The mean over each group of ``w_j^2 / B_jj``, as if its weights were lost one at a time; shapes as for
    ``group_obs``."""
    return (groups.square() / blocks.diagonal(dim1=1, dim2=2)).mean(-1)


def outputs(fisher: Tensor, squares: Tensor) -> Tensor:
    """The mean squared gradient of each output, ``[out]`` or ``[experts, out]``: what an error of that row costs the
    loss.

    ``fisher`` is that of the weight, ``squares`` the mean square of each input, ``[in]`` or ``[experts, in]``; gradient
    and input count as independent, so that the one is the product of the others. (Martens and Grosse 2015, K-FAC.)
    """
    return fisher.sum(-1) / squares.sum(-1, keepdim=True).clamp(min=torch.finfo(squares.dtype).tiny)


def relative(counts: Tensor, least: float) -> Tensor:
    """``counts`` over their mean, and ``least`` more: what had no gradient in calibration counts so much yet."""
    return counts / counts.mean().clamp(min=torch.finfo(counts.dtype).tiny) + least
