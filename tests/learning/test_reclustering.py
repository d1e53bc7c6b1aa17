from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_dropcluster import ranks
from lightning_dropcluster.clustering import FaissKMeans, TorchKMeans
from lightning_dropcluster.clustering.protocol import append_positions, count_clusters
from lightning_dropcluster.learning import reclustering
from lightning_dropcluster.learning.reclustering import cluster_share, recluster, try_clusterer
from lightning_dropcluster.learning.scopes import Grouping
from lightning_dropcluster.learning.sketch import Sketch

CPU = torch.device("cpu")
SHAPE = (5, 4, 6)


class Spy(TorchKMeans):
    """Note what it was asked for."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def fit(self, profiles, num_clusters, init_labels=None, grid=None):
        self.calls.append((profiles, num_clusters, init_labels, grid))
        return super().fit(profiles, num_clusters, init_labels, grid)


class Broken:
    def fit(self, profiles, num_clusters, init_labels=None, grid=None):
        raise ValueError("out of luck")


def make_sketch(shape=SHAPE, scope="map", seed=0):
    sketch = Sketch(shape, scope=scope, num_samples=32, sketch_dim=32)
    sketch.update(torch.randn(32, *shape, generator=torch.Generator().manual_seed(seed)))
    return sketch


def pretend_rank(monkeypatch, rank, size):
    monkeypatch.setattr(ranks, "rank", lambda: rank)
    monkeypatch.setattr(ranks, "world_size", lambda: size)


@pytest.mark.parametrize(
    ("grouping", "shape", "expected"),
    [
        (Grouping(num_clusters=7), (3, 8, 8), 7),
        (Grouping(num_clusters=70), (3, 8, 8), 64),
        (Grouping(cluster_size=16), (3, 8, 8), 4),
        (Grouping(cluster_size=1), (3, 8, 8), 64),
        (Grouping(cluster_size=1000), (3, 8, 8), 1),
        (Grouping("position", cluster_size=8), (3, 8, 8), 8),
        (Grouping("channel", cluster_size=2), (12, 8, 8), 6),
        (Grouping("layer", cluster_size=16), (3, 8, 8), 12),
        (Grouping("layer", cluster_size=1), (64, 32, 32), 4096),
        (Grouping("map"), (3, 1, 1), 1),
        (Grouping(num_clusters=5), (3, 10), 5),
        (Grouping(cluster_size=9), (3, 3, 3, 3), 3),
    ],
)
def test_the_number_of_clusters_follows_the_settings(grouping, shape, expected):
    assert grouping.clusters_for(shape) == expected


@pytest.mark.parametrize("shape", [(5, 24), SHAPE, (3, 2, 4, 3)], ids=["1d", "2d", "3d"])
@pytest.mark.parametrize("scope", ["map", "position", "layer", "channel"])
def test_every_problem_gets_labels_without_an_empty_cluster(scope, shape):
    sketch = make_sketch(shape, scope)
    grouping = Grouping(scope, num_clusters=3)
    labels = cluster_share({"stem": sketch}, {}, FaissKMeans(), grouping)["stem"]
    assert labels.dtype == torch.int64
    assert labels.shape == sketch.scope.problems(shape)
    assert count_clusters(labels).tolist() == [3] * len(labels)


def test_the_clusterer_sees_profiles_and_grid():
    spy, sketch = Spy(), make_sketch()
    cluster_share({"stem": sketch}, {}, spy, Grouping(num_clusters=4))
    profiles, count, old, grid = spy.calls[0]
    assert torch.equal(profiles, sketch.profiles())
    assert (count, old, grid) == (4, None, (4, 6))


def test_a_scope_without_a_grid_gets_none():
    spy, sketch = Spy(), make_sketch(scope="channel")
    cluster_share({"stem": sketch}, {}, spy, Grouping("channel", num_clusters=2))
    profiles, _, _, grid = spy.calls[0]
    assert torch.equal(profiles, sketch.profiles())
    assert grid is None


def test_positions_are_appended_with_their_weight():
    spy, sketch = Spy(), make_sketch()
    cluster_share({"stem": sketch}, {}, spy, Grouping(num_clusters=4, position_weight=0.5))
    assert torch.equal(spy.calls[0][0], append_positions(sketch.profiles(), (4, 6), 0.5))


@pytest.mark.parametrize("scope", ["map", "position", "layer", "channel"])
def test_old_tables_become_a_warm_start_of_int64(scope):
    spy, sketch = Spy(), make_sketch(scope=scope)
    problems, items = sketch.scope.problems(SHAPE)
    old = torch.arange(problems * items).reshape(sketch.scope.label_shape(SHAPE)) % 5
    cluster_share({"stem": sketch}, {"stem": old.byte()}, spy, Grouping(scope, num_clusters=3))
    assert torch.equal(spy.calls[0][2], old.reshape(problems, items).clamp(max=2))
    assert spy.calls[0][2].dtype == torch.int64


def test_dead_features_take_the_cluster_of_the_nearest_live_position():
    x = torch.randn(32, 1, 10, generator=torch.Generator().manual_seed(0))
    x[:, :, 4:] = 7.123
    sketch = Sketch((1, 10), num_samples=32, sketch_dim=32)
    sketch.update(x)
    labels = cluster_share({"stem": sketch}, {}, FaissKMeans(), Grouping(num_clusters=4))["stem"][0]
    assert labels[:4].sort().values.tolist() == [0, 1, 2, 3]
    assert (labels[4:] == labels[3]).all()


@given(size=st.integers(1, 6), layers=st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_ranks_share_every_problem_exactly_once(size, layers):
    sketches = {str(position): make_sketch((maps, 3)) for position, maps in enumerate(layers)}
    clustered = 0
    for rank in range(size):
        with pytest.MonkeyPatch.context() as patch:
            pretend_rank(patch, rank, size)
            spy = Spy()
            cluster_share(sketches, {}, spy, Grouping(num_clusters=2))
            clustered += sum(len(profiles) for profiles, *_ in spy.calls)
    assert clustered == sum(layers)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_the_shares_add_up_to_what_one_process_finds(monkeypatch, size):
    sketches = {"stem": make_sketch(), "late": make_sketch((2, 8), seed=1)}
    old = {"stem": torch.arange(120).reshape(SHAPE) % 4}
    alone = cluster_share(sketches, old, FaissKMeans(), Grouping(num_clusters=4))
    total = {name: torch.zeros_like(labels) for name, labels in alone.items()}
    for rank in range(size):
        pretend_rank(monkeypatch, rank, size)
        for name, share in cluster_share(sketches, old, FaissKMeans(), Grouping(num_clusters=4)).items():
            total[name] += share
    assert all(torch.equal(total[name], alone[name]) for name in alone)


@pytest.mark.parametrize("limit", [0, 2 * 120 * 32, 2**22])
def test_layers_that_are_alike_are_clustered_together_as_far_as_memory_allows(monkeypatch, limit):
    sketches = {name: make_sketch(seed=seed) for seed, name in enumerate("abc")}
    sketches["odd"] = make_sketch((2, 8))
    old = {"c": torch.arange(120).reshape(SHAPE) % 4}
    grouping = Grouping(num_clusters=4)
    alone = [cluster_share({name: one}, old, Spy(), grouping) for name, one in sketches.items()]
    monkeypatch.setattr(reclustering, "_TOGETHER", limit)
    spy = Spy()
    labels = cluster_share(sketches, old, spy, grouping)
    assert [*labels] == [*sketches]
    assert all(torch.equal(labels[name], one[name]) for one in alone for name in one)
    assert len(spy.calls) == (4 if limit == 0 else 3)


def test_errors_name_the_layers():
    sketches = {name: make_sketch() for name in ("stem", "late")}
    with pytest.raises(ValueError, match="out of luck") as caught:
        cluster_share(sketches, {}, Broken(), Grouping())
    assert caught.value.__notes__ == ["while reclustering layer 'stem', 'late'"]


def test_progress_counts_up_from_nothing_in_the_order_of_the_layers():
    sketches = {"a": make_sketch((1, 8)), "b": make_sketch((3, 4)), "c": make_sketch((1, 8))}
    told = []
    cluster_share(sketches, {}, TorchKMeans(), Grouping(), on_progress=lambda *told_: told.append(told_))
    assert told == [("a", 0.0), ("b", 16 / 28)]


@pytest.mark.parametrize("error", [MemoryError(), ValueError("out of luck")])
def test_a_trial_that_finds_no_memory_lets_training_begin(error):
    class Fails:
        def fit(self, profiles, num_clusters, init_labels=None, grid=None):
            raise error

    with nullcontext() if isinstance(error, MemoryError) else pytest.raises(ValueError, match="out of luck"):
        try_clusterer(Fails(), Grouping(), CPU)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_trial_is_on_a_grid_with_the_dimensions_of_the_layers(dims):
    spy = Spy()
    try_clusterer(spy, Grouping(), CPU, dims)
    assert {len(grid) for *_, grid in spy.calls} == {dims}


def test_layers_start_with_another_rank_each(monkeypatch):
    sketches = {name: make_sketch((1, 6)) for name in "abc"}
    for rank in range(3):
        pretend_rank(monkeypatch, rank, 3)
        spy = Spy()
        cluster_share(sketches, {}, spy, Grouping(num_clusters=2))
        assert len(spy.calls) == 1


def test_problems_stay_with_their_rank_where_another_layer_is_left_out(monkeypatch):
    sketches = {name: make_sketch((1, 6)) for name in "abc"}
    for rank in range(2):
        pretend_rank(monkeypatch, rank, 2)
        whole, part = Spy(), Spy()
        cluster_share(sketches, {}, whole, Grouping(), layers="abc")
        cluster_share({"a": sketches["a"], "c": sketches["c"]}, {}, part, Grouping(), layers="abc")
        assert [len(spy.calls) for spy in (whole, part)] == ([1, 0] if rank == 0 else [1, 1])


def test_the_labels_are_those_of_the_work():
    labels = torch.tensor([[0, 1, 1]])
    assert recluster(lambda: {"stem": labels}, CPU) == {"stem": labels}


def test_errors_of_the_work_are_raised():
    def fail():
        raise ValueError("out of luck")

    with pytest.raises(ValueError, match="out of luck"):
        recluster(fail, CPU)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("std::bad_alloc"), torch.OutOfMemoryError()])
def test_where_memory_does_not_suffice_there_are_no_labels(error):
    def fail():
        raise error

    with pytest.warns(UserWarning, match="out of memory in reclustering; the old labels stay"):
        assert recluster(fail, CPU) == {}
