"""Gradient reduction: measurements of its parts against their targets."""
