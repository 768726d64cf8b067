"""Mixtures of experts under sequence parallelism."""
