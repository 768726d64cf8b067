"""What becomes of a run when something breaks: ``python -m benchmarks.faults``."""
