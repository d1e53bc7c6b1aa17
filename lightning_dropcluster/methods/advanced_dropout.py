"""Advanced Dropout, as a function and as a module whose parameters are learned with the model."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_dropcluster.checks import check_number
from lightning_dropcluster.methods.base import Regularizer
from lightning_dropcluster.methods.masking import Draw, draw_uniform


def advanced_dropout(x: Tensor, mean: Tensor, deviation: Tensor, *, draw: Draw = draw_uniform) -> Tensor:
    """Multiply each feature by a logit-normal number and divide by the mean of these numbers.

    The output is x sigmoid(m + d e) / sigmoid(m / sqrt(1 + pi d^2 / 8)), with e standard normal for each
    feature. The divisor is close to the mean of the sigmoid, exact for m = 0, and gets no gradient.

    Source: Advanced Dropout, https://arxiv.org/abs/2010.05244, after the authors' code,
    https://github.com/PRIS-CV/AdvancedDropout, which has 3.14 for pi.

    Args:
        x: activation of any shape, floating point.
        mean: m, 0-d.
        deviation: d, 0-d, above 0.
        draw: where the uniform numbers come from, which the inverse of the normal distribution turns to e.

    Returns:
        A tensor like ``x``: same shape, dtype, device and memory format.

    Example:
        >>> advanced_dropout(torch.ones(2), torch.tensor(1.0), torch.tensor(0.0))
        tensor([1., 1.])
    """
    uniform = draw(x.shape, device=x.device).clamp_min(2.0**-25)  # the normal number of 0 is infinite
    normal = math.sqrt(2.0) * torch.erfinv(2.0 * uniform - 1.0)
    exact = torch.promote_types(mean.dtype, torch.float32)  # a coarse divisor would bias all features alike
    mean, deviation = mean.to(exact), deviation.to(exact)
    average = torch.sigmoid(mean / torch.sqrt(1.0 + math.pi / 8.0 * deviation**2)).detach()
    return x * (torch.sigmoid(mean + deviation * normal) / average).to(x.dtype)


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
        TypeError: if an argument has the wrong type.
        ValueError: if it is out of range.

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
