"""Live bytes by owner and FLOPs by operator over a training step, on real and fake tensors."""
