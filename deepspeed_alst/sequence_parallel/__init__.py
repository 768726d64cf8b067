"""Ulysses sequence parallelism: attention, masks, positions and batches."""
