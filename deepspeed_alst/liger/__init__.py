"""Liger kernels."""
