"""Attention over the ranks of a sequence, and over some rows and keys."""
