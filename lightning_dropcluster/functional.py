"""The pure functions of the methods, tensor to tensor, on torch alone."""

from lightning_dropcluster.methods.advanced_dropout import advanced_dropout
from lightning_dropcluster.methods.cluster_drop import cluster_drop
from lightning_dropcluster.methods.corr_drop import channel_corr_drop, corr_drop
from lightning_dropcluster.methods.drop_block import drop_block, expected_drop_rate
from lightning_dropcluster.methods.dropout import dropout, spatial_dropout
from lightning_dropcluster.methods.dropping.label_tables import cluster_sizes, resize_labels
from lightning_dropcluster.methods.masking import draw_keep_table, draw_uniform
from lightning_dropcluster.methods.prob_drop_block import prob_drop_block
from lightning_dropcluster.methods.r_block import disagreement, r_block_loss

__all__ = [
    "advanced_dropout",
    "channel_corr_drop",
    "cluster_drop",
    "cluster_sizes",
    "corr_drop",
    "disagreement",
    "draw_keep_table",
    "draw_uniform",
    "drop_block",
    "dropout",
    "expected_drop_rate",
    "prob_drop_block",
    "r_block_loss",
    "resize_labels",
    "spatial_dropout",
]
