"""The reduction of gradients: its parts, each beside its target."""
