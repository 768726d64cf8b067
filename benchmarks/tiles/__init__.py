"""Tiles of this package beside DeepSpeed's ``TiledMLP`` and ``TiledFusedLogitsLoss``."""
