"""Pure functions, tensor to tensor, on torch alone."""

from lightning_dropcluster.functional.cluster_drop import (
    cluster_drop,
    cluster_sizes,
    draw_keep_table,
    resize_labels,
)
from lightning_dropcluster.functional.drop_block import drop_block, expected_drop_rate
from lightning_dropcluster.functional.dropout import dropout, spatial_dropout
from lightning_dropcluster.functional.masking import draw_uniform

__all__ = [
    "cluster_drop",
    "cluster_sizes",
    "draw_keep_table",
    "draw_uniform",
    "drop_block",
    "dropout",
    "expected_drop_rate",
    "resize_labels",
    "spatial_dropout",
]
