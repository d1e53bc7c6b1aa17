"""Regularisers: modules x -> x that act in training and are the identity in eval mode."""

from torch import nn

from lightning_dropcluster.regularizers.advanced_dropout import AdvancedDropout
from lightning_dropcluster.regularizers.cluster_drop import ClusterDrop
from lightning_dropcluster.regularizers.corr_drop import ChannelCorrDrop, CorrDrop
from lightning_dropcluster.regularizers.drop_block import DropBlock, ProbDropBlock
from lightning_dropcluster.regularizers.dropout import Dropout, SpatialDropout
from lightning_dropcluster.regularizers.regularizer import DropRegularizer, Regularizer

REGULARIZERS: dict[str, type[nn.Module]] = {
    "advanced_dropout": AdvancedDropout,
    "channel_corr_drop": ChannelCorrDrop,
    "cluster_drop": ClusterDrop,
    "corr_drop": CorrDrop,
    "drop_block": DropBlock,
    "dropout": Dropout,
    "prob_drop_block": ProbDropBlock,
    "spatial_dropout": SpatialDropout,
}
"""Every regulariser by name. All but `ClusterDrop`, which needs labels, are made of nothing or of C alone."""

__all__ = [
    "REGULARIZERS",
    "AdvancedDropout",
    "ChannelCorrDrop",
    "ClusterDrop",
    "CorrDrop",
    "DropBlock",
    "DropRegularizer",
    "Dropout",
    "ProbDropBlock",
    "Regularizer",
    "SpatialDropout",
]
