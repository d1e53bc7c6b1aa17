"""Where: from name patterns to layers, and the hooks on them."""

from lightning_dropcluster.layers.selection import select_layers

__all__ = ["select_layers"]
