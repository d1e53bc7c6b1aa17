import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import expit
from scipy.stats import kstest, norm

from lightning_dropcluster import AdvancedDropout
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


def test_the_distribution_is_the_authors_on_vectors():
    module, x = AdvancedDropout(32), torch.randn(7, 32)
    hidden = F.linear(x, module.hidden.weight, module.hidden.bias)
    mean = F.linear(hidden, module.mean.weight, module.mean.bias).mean()
    deviation = F.softplus(F.linear(hidden, module.deviation.weight, module.deviation.bias)).mean()
    torch.testing.assert_close(module.distribution(x), (mean, deviation))


@pytest.mark.parametrize("spatial", [(5,), (3, 4), (2, 3, 2)], ids=str)
def test_each_position_of_a_map_is_a_vector(spatial):
    module, x = AdvancedDropout(32), torch.randn(7, 32, *spatial)
    vectors = x.movedim(1, -1).reshape(-1, 32)
    torch.testing.assert_close(module.distribution(x), module.distribution(vectors))


def test_begins_as_the_authors_code_does():
    module = AdvancedDropout(64)
    assert module.hidden.weight.shape == (4, 64)
    assert module.mean.bias == 0
    assert module.deviation.bias.item() == pytest.approx(1.2)
    for linear in (module.hidden, module.mean, module.deviation):
        assert 0 <= linear.weight.min() < linear.weight.max() <= 0.01


def test_every_parameter_is_learned():
    torch.manual_seed(0)
    module = AdvancedDropout(32)
    before = {name: value.clone() for name, value in module.named_parameters()}
    sgd = torch.optim.SGD(module.parameters(), 0.1)
    module(torch.randn(8, 32, 4, 4)).square().mean().backward()
    sgd.step()
    assert all(not torch.equal(value, before[name]) for name, value in module.named_parameters())


def test_learns_to_leave_features_alone_where_noise_hurts():
    torch.manual_seed(0)
    module, x = AdvancedDropout(8), torch.randn(16, 8, 4, 4)
    adam = torch.optim.Adam(module.parameters(), 0.05)
    errors = []
    for _ in range(60):
        error = (module(x) - x).square().mean()
        adam.zero_grad()
        error.backward()
        adam.step()
        errors.append(error.item())
    assert sum(errors[-5:]) < 0.2 * sum(errors[:5])


def test_moves_devices_and_checkpoints_with_its_model():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), AdvancedDropout(8))
    other = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), AdvancedDropout(8))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other[1].mean.weight, model[1].mean.weight)
    assert {value.device.type for value in model.to("meta").state_dict().values()} == {"meta"}


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"num_channels": 0}, ValueError, "num_channels=0"),
        ({"num_channels": 2.5}, TypeError, "num_channels=2.5"),
        ({"num_channels": 8, "reduction": 0}, ValueError, "reduction=0"),
        ({"num_channels": 8, "init_mean": float("inf")}, ValueError, "init_mean=inf"),
        ({"num_channels": 8, "init_deviation": "1"}, TypeError, "init_deviation='1'"),
    ],
)
def test_bad_arguments_raise(arguments, error, match):
    with pytest.raises(error, match=match):
        AdvancedDropout(**arguments)
