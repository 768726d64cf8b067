"""Tiled computation: one rank processes its tokens tile by tile, in time."""
