"""Activation offload between forward and backward: host and disk tiers, and tensors kept on the device."""
