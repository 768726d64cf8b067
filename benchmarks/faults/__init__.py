"""Fault injection into training runs: ``python -m benchmarks.faults``."""
