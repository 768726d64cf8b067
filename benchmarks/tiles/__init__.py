"""Comparison of our tiled MLP and loss with DeepSpeed's ``TiledMLP`` and ``TiledFusedLogitsLoss``."""
