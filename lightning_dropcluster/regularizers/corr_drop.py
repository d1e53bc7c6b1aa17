"""CorrDrop as modules."""

from torch import Tensor

from lightning_dropcluster.checks import check_number
from lightning_dropcluster.functional import channel_corr_drop, corr_drop
from lightning_dropcluster.regularizers.regularizer import DropRegularizer


class CorrDrop(DropRegularizer):
    """Drop square tiles that correlate little with the others; see `functional.corr_drop`.

    Args:
        drop_prob: mean probability in [0, 1) that a tile is dropped.
        block_size: side of a tile, at least 1.
        paired: see `Regularizer`.

    Raises:
        TypeError: where an argument has a wrong type.
        ValueError: where it is out of its range.

    Example:
        >>> CorrDrop(0.1, block_size=5)
        CorrDrop(drop_prob=0.1, block_size=5)
    """

    def __init__(self, drop_prob: float = 0.1, *, block_size: int = 5, paired: bool = False) -> None:
        super().__init__(drop_prob, paired=paired)
        self.block_size = check_number("block_size", block_size, 1, integer=True)

    def regularize(self, x: Tensor) -> Tensor:
        """Drop tiles of an activation (N, C, *spatial)."""
        return corr_drop(x, self.drop_prob, self.block_size, draw=self.draw)

    def _settings(self) -> dict[str, object]:
        return {**super()._settings(), "block_size": self.block_size}


class ChannelCorrDrop(DropRegularizer):
    """Drop whole feature maps that correlate little with the others; see `functional.channel_corr_drop`.

    Args:
        drop_prob: mean probability in [0, 1) that a feature map is dropped.
        paired: see `Regularizer`.

    Example:
        >>> ChannelCorrDrop(0.1)
        ChannelCorrDrop(drop_prob=0.1)
    """

    def regularize(self, x: Tensor) -> Tensor:
        """Drop feature maps of an activation (N, C, *spatial)."""
        return channel_corr_drop(x, self.drop_prob, draw=self.draw)
