"""Dropout and SpatialDropout: modules with a drop probability that may change without recompilation."""

from torch import Tensor

from lightning_dropcluster.functional import dropout, spatial_dropout
from lightning_dropcluster.regularizers.regularizer import DropRegularizer


class Dropout(DropRegularizer):
    """Drop single features; see `functional.dropout`.

    Args:
        drop_prob: probability in [0, 1) that a feature is dropped.
        paired: see `Regularizer`.

    Example:
        >>> Dropout(0.5)
        Dropout(drop_prob=0.5)
    """

    def regularize(self, x: Tensor) -> Tensor:
        """Drop features of an activation of any shape with the batch first."""
        return dropout(x, self.drop_prob, draw=self.draw)


class SpatialDropout(DropRegularizer):
    """Drop whole feature maps; see `functional.spatial_dropout`.

    Args:
        drop_prob: probability in [0, 1) that a feature map is dropped.
        paired: see `Regularizer`.

    Example:
        >>> SpatialDropout(0.5)
        SpatialDropout(drop_prob=0.5)
    """

    def regularize(self, x: Tensor) -> Tensor:
        """Drop feature maps of an activation (N, C, *spatial)."""
        return spatial_dropout(x, self.drop_prob, draw=self.draw)
