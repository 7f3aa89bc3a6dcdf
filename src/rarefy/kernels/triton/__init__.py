"""Kernels in Triton. Its modules import ``triton``, so nothing imports them where it is absent."""
