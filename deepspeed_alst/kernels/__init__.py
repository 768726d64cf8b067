"""Triton kernels, one file per op, each beside its definition in plain torch; the only code that knows Triton."""
