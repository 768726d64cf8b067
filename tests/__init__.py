"""Tests: behaviour against a reference, on real engines and real gloo ranks."""
