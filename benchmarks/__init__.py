"""Measurements, each with its target beside it; the tests use the same rank processes and cells."""
