"""Gradients summed over all ranks, on every ZeRO path."""
