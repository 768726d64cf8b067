"""Activation offload and kept attention: memory savings and their costs."""
