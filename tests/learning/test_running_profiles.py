"""The memory of response profiles, on its own and under k-means."""

from functools import partial

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from lightning_dropcluster.clustering import TorchKMeans, adjusted_rand_index
from lightning_dropcluster.learning.reclustering import cluster_share
from lightning_dropcluster.learning.running_profiles import RunningProfiles
from lightning_dropcluster.learning.scopes import Grouping
from lightning_dropcluster.learning.sketch import Sketch


def random_profiles(*shape, seed=0):
    return F.normalize(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), dim=2)


def test_without_momentum_nothing_is_kept():
    memory, profiles = RunningProfiles(0.0), random_profiles(2, 3, 4)
    assert memory.blend("a", profiles, observations=8) is profiles
    assert memory.state_dict() == {}
    memory.load_state_dict({"a": profiles})
    assert memory.state_dict() == {}


@given(st.floats(0.01, 0.99), st.integers(1, 6))
@settings(deadline=None)
def test_profiles_have_unit_length_and_dead_ones_stay_zero(momentum, windows):
    memory = RunningProfiles(momentum)
    for seed in range(windows):
        profiles = random_profiles(2, 5, 8, seed=seed)
        profiles[:, 0] = 0.0
        blended = memory.blend("a", profiles, observations=8)
    assert torch.allclose(blended.norm(dim=2)[:, 1:], torch.ones(2, 4))
    assert (blended[:, 0] == 0).all()


def test_correlations_are_blended():
    """Of windows with projections that are independent: momentum x old + (1 - momentum) x new."""
    generator, memory, exact = torch.Generator().manual_seed(0), RunningProfiles(0.7), []
    for _ in range(2):
        x = F.normalize(torch.randn(6, 20, generator=generator), dim=1)
        projection = torch.randn(20, 8192, generator=generator) / 8192**0.5
        blended = memory.blend("a", F.normalize(x @ projection, dim=1)[None], observations=8192)
        exact.append(x @ x.T)
    assert torch.allclose(blended[0] @ blended[0].T, 0.7 * exact[0] + 0.3 * exact[1], atol=0.05)


def test_windows_of_few_observations_do_not_mix():
    """As long as there are columns left, the blend is exact."""
    memory, exact = RunningProfiles(0.7), []
    for seed in range(3):
        x = random_profiles(1, 6, 4, seed=seed)
        blended = memory.blend("a", F.pad(x, (0, 8)), observations=4)
        exact.append(x @ x.mT)
    expected = 0.7 * (0.7 * exact[0] + 0.3 * exact[1]) + 0.3 * exact[2]
    assert torch.allclose(blended @ blended.mT, expected, atol=1e-6)


def test_what_did_not_change_in_a_window_keeps_its_profile():
    memory = RunningProfiles(0.5)
    first, second = random_profiles(1, 3, 8), random_profiles(1, 3, 8, seed=1)
    second[:, 1] = 0.0
    memory.blend("a", first, observations=8)
    assert torch.allclose(memory.blend("a", second, observations=8)[:, 1], first[:, 1])


def test_layers_are_kept_apart_and_what_does_not_fit_starts_again():
    memory, profiles = RunningProfiles(0.5), random_profiles(2, 3, 4)
    blend = partial(memory.blend, observations=4)
    blend("a", random_profiles(2, 3, 4, seed=1))
    assert blend("b", profiles) is profiles
    assert blend("a", profiles, first=2) is profiles  # other maps of the layer
    larger = random_profiles(2, 5, 4)
    assert blend("a", larger, first=2) is larger
    memory.clear()
    assert blend("a", larger, first=2) is larger


def test_a_state_goes_on_where_it_was():
    first, second = RunningProfiles(0.5), RunningProfiles(0.5)
    first.blend("a", random_profiles(2, 3, 4), observations=4)
    second.load_state_dict(first.state_dict())
    profiles = random_profiles(2, 3, 4, seed=1)
    blended = [memory.blend("a", profiles, observations=4) for memory in (first, second)]
    assert torch.equal(*blended)


def test_small_windows_find_planted_clusters_only_with_a_memory():
    generator, truth = torch.Generator().manual_seed(0), torch.arange(60).reshape(1, 60) % 6

    def agreement(momentum):
        memory, tables = RunningProfiles(momentum), {}
        for window in range(40):
            causes = torch.randn(8, 6, generator=generator)
            x = causes[:, truth] + 1.5 * torch.randn(8, 1, 60, generator=generator)
            sketch = Sketch((1, 60), num_samples=8, sketch_dim=64, window=window)
            sketch.update(x)
            grouping = Grouping(num_clusters=6)
            tables = cluster_share({"a": sketch}, tables, TorchKMeans(), grouping, memory)
        return adjusted_rand_index(tables["a"], truth)

    assert agreement(0.0) < 0.5
    assert agreement(0.9) > 0.6  # 0.69 where k-means splits one of the six and merges two


def test_maps_of_other_proportions_start_again():
    memory, asked = RunningProfiles(0.5), []

    class Spy(TorchKMeans):
        def fit(self, profiles, *args, **options):
            asked.append(profiles)
            return super().fit(profiles, *args, **options)

    for shape in ((3, 2, 8), (3, 4, 4)):
        sketch = Sketch(shape, num_samples=8)
        sketch.update(torch.randn(8, *shape, generator=torch.Generator().manual_seed(0)))
        cluster_share({"a": sketch}, {}, Spy(), Grouping(), memory)
        assert torch.equal(asked[-1], sketch.profiles())
