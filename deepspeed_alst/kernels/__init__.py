"""Triton kernels, one file per op, next to its PyTorch reference; the only code that imports Triton."""
