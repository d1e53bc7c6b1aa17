from typing import get_args

import pytest
import torch

from benchmarks.gain.variants import MOST, BySalience, Noise, OtherImage, ValueSketch, VariantName, variant
from lightning_dropcluster.learning import learner, window
from lightning_dropcluster.learning.sketch import Sketch
from lightning_dropcluster.methods import ClusterDrop

HALVES = torch.tensor([[0] * 50 + [1] * 50])


def parts():
    return window.Sketch, learner.ClusterDrop


@pytest.mark.parametrize("name", get_args(VariantName))
def test_a_variant_lasts_as_long_as_its_block(name):
    with variant(name):
        assert (parts() == (Sketch, ClusterDrop)) == (name == "none")
    assert parts() == (Sketch, ClusterDrop)


def test_profiles_of_values_keep_the_inner_products_of_the_values():
    x = torch.randn(8, 3, 2, 2, generator=torch.Generator().manual_seed(0)) + 5
    sketch = ValueSketch((3, 2, 2), num_samples=8, sketch_dim=16)
    sketch.update(x)
    profiles, values = sketch.profiles(slice(1, 3)), x.flatten(2).permute(1, 2, 0)[1:]
    torch.testing.assert_close(profiles @ profiles.mT, values @ values.mT)


@pytest.mark.parametrize("kind", [Noise, OtherImage, BySalience])
def test_nothing_changes_in_eval_mode_or_where_nothing_is_dropped(kind):
    x = torch.randn(4, 1, 100)
    assert kind(HALVES, 0.5).eval()(x) is x
    assert torch.equal(kind(HALVES, 0.0)(x), x)


def test_dropped_clusters_are_those_of_another_image():
    x = torch.arange(400.0).reshape(4, 1, 100)
    out = OtherImage(HALVES, 0.5)(x)
    kept = out == x
    assert torch.equal(out[~kept], x.roll(1, 0)[~kept])
    assert {row.unique().numel() for row in kept.reshape(4, 2, 50).flatten(0, 1)} == {1}
    assert kept.any()
    assert not kept.all()


def test_noise_has_the_mean_and_deviation_of_the_channel():
    x = torch.randn(1000, 2, 4) * torch.tensor([1.0, 3.0])[:, None] + torch.tensor([0.0, 10.0])[:, None]
    noise = Noise(torch.zeros(2, 4, dtype=torch.int64), 0.5).filling(x)
    for kind in (torch.mean, torch.std):
        torch.testing.assert_close(kind(noise, (0, 2)), kind(x, (0, 2)), atol=0.2, rtol=0.05)
    assert not torch.equal(noise, x)


def test_salient_clusters_are_dropped_more_often():
    x = torch.cat([torch.full((20000, 1, 50), -3.0), torch.full((20000, 1, 50), 1.0)], 2)
    dropped = BySalience(HALVES, 0.4)(x)[:, 0, [0, 50]] == 0
    torch.testing.assert_close(dropped.float().mean(0), torch.tensor([0.6, 0.2]), atol=0.02, rtol=0)
    always = BySalience(HALVES, 0.9)(x)[:, 0, 0] == 0
    assert always.float().mean() == pytest.approx(MOST, abs=0.01)
