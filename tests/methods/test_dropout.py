import pytest
import torch
import torch.nn.functional as F

from lightning_dropcluster.functional import dropout, spatial_dropout

SPATIAL = ((5,), (4, 3), (2, 3, 2))
TORCHS = {1: F.dropout1d, 2: F.dropout2d, 3: F.dropout3d}


@pytest.mark.parametrize("drop_prob", [0.0, 0.25, 0.5])
def test_dropout_gives_the_values_of_torchs_as_often(drop_prob):
    torch.manual_seed(0)
    x = torch.full((200, 50), 3.0)
    ours, torchs = dropout(x, drop_prob), F.dropout(x, drop_prob)
    assert torch.equal(ours.unique(), torchs.unique())
    assert abs((ours == 0).float().mean() - (torchs == 0).float().mean()) < 0.02


@pytest.mark.parametrize("spatial", SPATIAL, ids=["1d", "2d", "3d"])
def test_spatial_dropout_gives_the_values_of_torchs_as_often(spatial):
    torch.manual_seed(0)
    x = torch.full((200, 50, *spatial), 3.0)
    ours, torchs = spatial_dropout(x, 0.25), TORCHS[len(spatial)](x, 0.25)
    assert torch.equal(ours.unique(), torchs.unique())
    for out in (ours, torchs):
        kept = out.flatten(2) > 0
        assert torch.equal(kept.any(-1), kept.all(-1))
        assert kept.float().mean() == pytest.approx(0.75, abs=0.02)


@pytest.mark.parametrize("function", [dropout, spatial_dropout])
def test_takes_activations_without_spatial_dimensions(function):
    torch.manual_seed(0)
    assert (function(torch.ones(100, 100), 0.5) == 0).float().mean() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("function", [dropout, spatial_dropout])
def test_a_probability_in_a_tensor_of_a_coarse_type_does_not_bias_the_mean(function):
    coarse = torch.tensor(0.15, dtype=torch.bfloat16)
    out = function(torch.ones(100, 100, dtype=torch.float64), coarse)
    assert out.max().item() == pytest.approx(1 / (1 - coarse.item()), rel=1e-6)
