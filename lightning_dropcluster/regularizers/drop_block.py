"""DropBlock and ProbDropBlock as modules."""

from torch import Tensor

from lightning_dropcluster.checks import check_bool, check_number
from lightning_dropcluster.functional import drop_block, prob_drop_block
from lightning_dropcluster.regularizers.regularizer import DropRegularizer


class DropBlock(DropRegularizer):
    """Drop square blocks of features; see `functional.drop_block`.

    Args:
        drop_prob: probability in [0, 1) that a feature is dropped, where blocks did not overlap.
        block_size: side of a block, at least 1; cut to the size of smaller maps.
        per_map: True draws for each feature map, False once for all feature maps of a sample.
        paired: see `Regularizer`; blocks of a pair never begin at the same feature, but may overlap.

    Raises:
        TypeError: where an argument has a wrong type.
        ValueError: where it is out of its range.

    Example:
        >>> DropBlock(0.1, block_size=5)
        DropBlock(drop_prob=0.1, block_size=5, per_map=True)
    """

    def __init__(
        self, drop_prob: float = 0.1, *, block_size: int = 7, per_map: bool = True, paired: bool = False
    ) -> None:
        super().__init__(drop_prob, paired=paired)
        check_bool("per_map", per_map)
        self.block_size = check_number("block_size", block_size, 1, integer=True)
        self.per_map = per_map

    def regularize(self, x: Tensor) -> Tensor:
        """Drop blocks of an activation (N, C, *spatial)."""
        return drop_block(x, self.drop_prob, self.block_size, per_map=self.per_map, draw=self.draw)

    def _settings(self) -> dict[str, object]:
        return {**super()._settings(), "block_size": self.block_size, "per_map": self.per_map}


class ProbDropBlock(DropBlock):
    """Drop square blocks, rather where the activation is large; see `functional.prob_drop_block`.

    Args:
        drop_prob: probability in [0, 1) that a feature of average magnitude is dropped, where blocks did not
            overlap.
        block_size: side of a block, at least 1; cut to the size of smaller maps.
        per_map: True draws for each feature map by its own salience, False once for all feature maps of a
            sample.
        paired: see `Regularizer`; blocks of a pair may overlap.

    Example:
        >>> ProbDropBlock(0.1, block_size=5)
        ProbDropBlock(drop_prob=0.1, block_size=5, per_map=True)
    """

    def regularize(self, x: Tensor) -> Tensor:
        """Drop blocks of an activation (N, C, *spatial)."""
        return prob_drop_block(x, self.drop_prob, self.block_size, per_map=self.per_map, draw=self.draw)
