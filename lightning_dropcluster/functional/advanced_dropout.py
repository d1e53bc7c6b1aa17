"""Advanced Dropout as a pure function: multiply by numbers whose logits are normal."""

import math

import torch
from torch import Tensor

from lightning_dropcluster.functional.masking import Draw, draw_uniform


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
