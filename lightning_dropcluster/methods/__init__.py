"""What: the methods, each a pure function and a module x -> x that is the identity in eval mode."""

from torch import nn

from lightning_dropcluster.methods.advanced_dropout import AdvancedDropout
from lightning_dropcluster.methods.base import DropRegularizer, Regularizer
from lightning_dropcluster.methods.cluster_drop import ClusterDrop
from lightning_dropcluster.methods.corr_drop import ChannelCorrDrop, CorrDrop
from lightning_dropcluster.methods.drop_block import DropBlock
from lightning_dropcluster.methods.dropout import Dropout, SpatialDropout
from lightning_dropcluster.methods.prob_drop_block import ProbDropBlock
from lightning_dropcluster.methods.r_block import RBlock

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
    "RBlock",
    "Regularizer",
    "SpatialDropout",
]
