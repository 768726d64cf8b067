"""Tiles: what one rank computes piece by piece, in time."""
