"""Kernels in CUDA C++, compiled at first use by the compiler that PyTorch brings along, and the layouts they read."""
