"""Operators compiled from csrc/, each next to its PyTorch reference."""
