"""Checks that a model is right under sequence parallelism."""
