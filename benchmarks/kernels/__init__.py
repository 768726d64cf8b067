"""Triton kernels without a GPU: run in the interpreter, and compiled ahead of time for their target GPUs."""
