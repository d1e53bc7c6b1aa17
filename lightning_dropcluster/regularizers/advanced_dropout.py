"""Advanced Dropout as a module, whose parameters are learned with the model."""

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_dropcluster.checks import check_number
from lightning_dropcluster.functional import advanced_dropout
from lightning_dropcluster.regularizers.regularizer import Regularizer


class AdvancedDropout(Regularizer):
    """Multiply features by logit-normal numbers, whose distribution is learned from the activation.

    Two numbers are computed from each batch, the mean of the logits, m = mean(W_m h + b_m), and their
    deviation, d = mean(softplus(W_d h + b_d)), with h = W x + b; see `functional.advanced_dropout` for their
    use. There is no drop probability to set: the optimiser finds it.

    Source: Advanced Dropout, https://arxiv.org/abs/2010.05244, after the authors' code,
    https://github.com/PRIS-CV/AdvancedDropout, which gives the initial values and the reduction. They put it
    on fully connected layers, and learn it at a rate of 1e-4 where the network has 0.1. Where we differ: on
    maps each position is a vector of its own, and b is a vector, not one number.

    Args:
        num_channels: C, at least 1.
        reduction: C / reduction, at least 1, is the length of h.
        init_mean: initial b_m.
        init_deviation: initial b_d, which softplus makes positive.
        paired: see `Regularizer`.

    Raises:
        TypeError: where an argument has a wrong type.
        ValueError: where it is out of its range.

    Example:
        >>> AdvancedDropout(64)
        AdvancedDropout(
          num_channels=64
          (hidden): Linear(in_features=64, out_features=4, bias=True)
          (mean): Linear(in_features=4, out_features=1, bias=True)
          (deviation): Linear(in_features=4, out_features=1, bias=True)
        )
    """

    def __init__(
        self,
        num_channels: int,
        *,
        reduction: int = 16,
        init_mean: float = 0.0,
        init_deviation: float = 1.2,
        paired: bool = False,
    ) -> None:
        super().__init__(paired=paired)
        self.num_channels = check_number("num_channels", num_channels, 1, integer=True)
        length = max(1, self.num_channels // check_number("reduction", reduction, 1, integer=True))
        self.hidden = nn.Linear(self.num_channels, length)
        self.mean, self.deviation = nn.Linear(length, 1), nn.Linear(length, 1)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, 0.0, 0.01)
        nn.init.constant_(self.mean.bias, check_number("init_mean", init_mean, -20, 20))
        nn.init.constant_(self.deviation.bias, check_number("init_deviation", init_deviation, -20, 20))

    def regularize(self, x: Tensor) -> Tensor:
        """Multiply the features of an activation (N, C, *spatial)."""
        if x.shape[1] != self.num_channels:
            raise ValueError(
                f"x of shape {tuple(x.shape)}: must have num_channels={self.num_channels} channels"
            )
        mean, deviation = self.distribution(x)
        return advanced_dropout(x, mean, deviation, draw=self.draw)

    def distribution(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the distribution of the logits.

        Args:
            x: (N, C, *spatial).

        Returns:
            Mean and deviation, both 0-d.
        """
        hidden = self.hidden(x.movedim(1, -1).to(self.hidden.weight.dtype))
        return self.mean(hidden).mean(), F.softplus(self.deviation(hidden)).mean()

    def _settings(self) -> dict[str, object]:
        return {"num_channels": self.num_channels, **super()._settings()}
