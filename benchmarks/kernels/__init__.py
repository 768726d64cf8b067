"""Triton kernels without a GPU: run by the interpreter, and compiled ahead of time for the GPUs that they are for."""
