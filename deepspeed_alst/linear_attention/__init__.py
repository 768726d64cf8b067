"""Layers without attention, sharded over the ranks of a sequence."""
