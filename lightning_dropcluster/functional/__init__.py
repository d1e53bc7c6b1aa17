"""Pure functions, tensor to tensor, on torch alone."""

from lightning_dropcluster.functional.cluster_drop import (
    cluster_drop,
    cluster_sizes,
    draw_keep_table,
    resize_labels,
)

__all__ = ["cluster_drop", "cluster_sizes", "draw_keep_table", "resize_labels"]
