"""Kernels in Triton. Its modules import ``triton``, so nothing imports them where it is absent."""

from importlib.util import find_spec

import torch


def usable(device: torch.device) -> bool:
    """Whether kernels of this package can run on ``device``."""
    return device.type == "cuda" and find_spec("triton") is not None
