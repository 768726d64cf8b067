"""Whole batches that the engine splits, and what a program reads of their outputs for a loss of its own."""
