import math

import numpy as np
import pytest
import torch
from scipy.special import expit
from scipy.stats import kstest, norm

from lightning_dropcluster.functional import advanced_dropout


def make_draw(uniform):
    return lambda shape, *, device=None: uniform.reshape(shape)


@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 1.0), (1.5, 0.3), (-0.7, 2.0)])
def test_equals_the_formula(mean, deviation):
    torch.manual_seed(0)
    x, uniform = torch.randn(5, 3, 4), torch.rand(5, 3, 4).clamp_min(1e-4)
    out = advanced_dropout(x, torch.tensor(mean), torch.tensor(deviation), draw=make_draw(uniform))
    mask = expit(mean + deviation * norm.ppf(uniform.double()))
    average = expit(mean / math.sqrt(1 + math.pi / 8 * deviation**2))
    np.testing.assert_allclose(out, x.numpy() * mask / average, rtol=2e-4)


def test_the_logits_are_normal():
    torch.manual_seed(0)
    mean, deviation = 0.4, 1.3
    out = advanced_dropout(torch.ones(4000), torch.tensor(mean), torch.tensor(deviation)).double()
    mask = out * expit(mean / math.sqrt(1 + math.pi / 8 * deviation**2))
    assert kstest(mask.logit().numpy(), norm(mean, deviation).cdf).pvalue > 0.01


@pytest.mark.parametrize(("mean", "error"), [(0.0, 1e-6), (1.0, 0.01), (-1.0, 0.025), (3.0, 0.01)])
def test_the_mean_is_kept_as_well_as_documented(mean, error):
    deviation = 1.46
    uniform = (torch.arange(200_000) + 0.5) / 200_000
    out = advanced_dropout(
        torch.ones(200_000), torch.tensor(mean), torch.tensor(deviation), draw=make_draw(uniform)
    )
    assert out.double().mean() == pytest.approx(1, abs=error)


@pytest.mark.parametrize("uniform", [0.0, 2.0**-24, 1 - 2.0**-24])
def test_the_ends_of_the_draw_stay_finite(uniform):
    mean, deviation = torch.tensor(0.0, requires_grad=True), torch.tensor(1.0, requires_grad=True)
    out = advanced_dropout(torch.ones(2), mean, deviation, draw=make_draw(torch.full((2,), uniform)))
    out.sum().backward()
    assert all(tensor.isfinite().all() for tensor in (out, mean.grad, deviation.grad))


def test_the_divisor_gets_no_gradient():
    torch.manual_seed(0)
    x, uniform = torch.randn(50), torch.rand(50)
    mean, deviation = (torch.tensor(value, requires_grad=True) for value in (0.5, 0.8))
    advanced_dropout(x, mean, deviation, draw=make_draw(uniform)).sum().backward()
    normal = norm.ppf(uniform.double())
    mask = expit(0.5 + 0.8 * normal)
    slope = x.numpy() * mask * (1 - mask) / expit(0.5 / math.sqrt(1 + math.pi / 8 * 0.8**2))
    assert mean.grad.item() == pytest.approx(slope.sum(), rel=1e-3)
    assert deviation.grad.item() == pytest.approx((slope * normal).sum(), rel=1e-3)
