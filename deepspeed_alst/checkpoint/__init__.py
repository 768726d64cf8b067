"""Checkpoints: saved on all ranks or none, loaded on any number of ranks."""
