"""Bytes by owner and FLOPs by operator, on real and on fake tensors."""
