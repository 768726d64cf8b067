"""Metrics of each training step."""
