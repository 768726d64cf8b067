"""Changes to a live DeepSpeed engine: wiring, the averaging probe, the activation report."""
