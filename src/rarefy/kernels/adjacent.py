"""Tensors that lie behind each other in memory, so that several can be taken for one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def together(tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """``tensors`` as one along their first dimension, and as the views of it that can take their places.

    Memory is allocated unless they lie behind each other already.
    """
    first = tensors[0]
    place, storage, rows = first.data_ptr(), first.untyped_storage().data_ptr(), [len(each) for each in tensors]
    for tensor in tensors:
        here = tensor.data_ptr() == place and tensor.untyped_storage().data_ptr() == storage
        if not here or not tensor.is_contiguous():
            whole = torch.cat(list(tensors))
            return whole, list(whole.split(rows))
        place += tensor.numel() * tensor.element_size()
    return first.as_strided((sum(rows), *first.shape[1:]), first.stride()), list(tensors)
