"""Activations that wait for the backward: on the host, on disk, or kept whole."""
