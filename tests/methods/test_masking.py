import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from lightning_dropcluster.functional import draw_uniform
from lightning_dropcluster.methods.masking import drop, kept_ratio


def test_backward_keeps_only_the_mask_and_a_scalar():
    x, dropped, saved = torch.randn(4, 8, 6, requires_grad=True), torch.rand(4, 8, 1) < 0.5, []
    with saved_tensors_hooks(lambda tensor: saved.append(tensor.nbytes) or tensor, lambda tensor: tensor):
        drop(x, dropped, torch.tensor(1.5))
    assert sum(saved) == dropped.nbytes + 4


def test_first_and_second_derivatives_are_exact():
    x, dropped = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), torch.rand(3, 1) < 0.5
    assert torch.autograd.gradcheck(lambda x: drop(x**3, dropped, 1.5), x)
    assert torch.autograd.gradgradcheck(lambda x: drop(x**3, dropped, 1.5), x)


@pytest.mark.parametrize("features", [41, 47, 82])  # whose reciprocals are not exact
def test_the_kept_ratio_of_all_is_exactly_one(features):
    assert kept_ratio(torch.zeros(features, dtype=torch.bool)).item() == 1.0


@pytest.mark.parametrize("scale", [1.25, torch.inf])
def test_a_scale_given_as_tensor_equals_the_number_and_spares_what_is_dropped(scale):
    x, dropped = torch.ones(3), torch.tensor([True, False, True])
    out = drop(x, dropped, scale)
    assert torch.equal(out, torch.tensor([0.0, scale, 0.0]))
    assert torch.equal(drop(x, dropped, torch.tensor(scale)), out)


@pytest.mark.parametrize(("dropped", "ratio"), [(0, 1.0), (1, 4 / 3), (3, 4.0), (4, 1.0)])
def test_the_kept_ratio(dropped, ratio):
    assert kept_ratio(torch.arange(4) < dropped).item() == pytest.approx(ratio)


@pytest.mark.parametrize("default", [torch.float16, torch.bfloat16, torch.float64])
def test_the_kept_ratio_counts_beyond_half_precision_whatever_the_default_type(default):
    dropped = torch.arange(80_000) < 20_000
    torch.set_default_dtype(default)
    try:
        ratio = kept_ratio(dropped)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(ratio, torch.tensor(4 / 3))


@pytest.mark.parametrize("shift", [0.0, 0.618])
@pytest.mark.parametrize("paired", [False, True])
def test_draws_are_uniform_below_one(shift, paired):
    torch.manual_seed(0)
    uniform = draw_uniform((2000, 50), shift=shift, paired=paired)
    assert 0 <= uniform.min() < uniform.max() < 1
    shares = uniform.histc(10, 0, 1) / uniform.numel()
    assert (shares - 0.1).abs().max() < 0.005
    assert len(uniform.unique()) > 0.9 * uniform.numel() / (1 + paired)


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.5, 0.7])
@pytest.mark.parametrize("shift", [0.0, 0.618])
def test_pairs_have_the_least_overlap_that_there_can_be(threshold, shift):
    torch.manual_seed(0)
    first, second = (draw_uniform((2000, 50), shift=shift, paired=True) < threshold).chunk(2)
    assert (first & second).float().mean() == pytest.approx(max(0, 2 * threshold - 1), abs=0.01)
    assert second.float().mean() == pytest.approx(threshold, abs=0.01)


def test_pairs_of_an_odd_batch_raise():
    with pytest.raises(ValueError, match="paired=True: must have an even batch"):
        draw_uniform((3, 2), paired=True)
