"""Benchmarks with targets; the tests share their rank processes and parity cells."""
