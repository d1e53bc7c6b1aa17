"""Collectives: the identity in one process, and two real processes that talk by gloo."""

import warnings
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import spawn

from lightning_dropcluster import ranks
from lightning_dropcluster.clustering import FaissKMeans
from lightning_dropcluster.layers.hooks import LayerHook
from lightning_dropcluster.learning.reclustering import cluster_share, recluster
from lightning_dropcluster.learning.scopes import SCOPES, Grouping
from lightning_dropcluster.learning.sketch import Sketch, SketchSettings
from lightning_dropcluster.learning.window import GatheringWindow

CPU = torch.device("cpu")
SHAPE = (3, 4, 5)
X = torch.randn(24, *SHAPE, generator=torch.Generator().manual_seed(0)) + 50.0
X[:, 1, 2, 3] = 7.123
CASES = [(scope, sketch_dim) for scope in SCOPES for sketch_dim in (16, 512)]


def test_one_process_is_rank_zero_of_one():
    assert (ranks.rank(), ranks.world_size()) == (0, 1)


def test_collectives_of_one_process_hand_back_the_tensor():
    value = torch.arange(3)
    assert ranks.sum_over_ranks(value) is value
    assert ranks.from_rank(value, 0) is value
    assert value.tolist() == [0, 1, 2]


def test_one_process_raises_its_own_error_or_none():
    ranks.raise_together(None, CPU)
    error = KeyError("mine")
    with pytest.raises(KeyError, match="mine") as caught:
        ranks.raise_together(error, CPU)
    assert caught.value is error


def gather(x, scope, sketch_dim, **options):
    sketch = Sketch(SHAPE, scope=scope, sketch_dim=sketch_dim, **options)
    if len(x):
        sketch.update(x)
    return sketch


def run_collectives(rank):
    return {
        "rank": [ranks.rank(), ranks.world_size()],
        "sum": ranks.sum_over_ranks(torch.tensor([1.0, rank])),
        "from_rank": [ranks.from_rank(torch.tensor(10 * rank), source) for source in range(2)],
    }


def run_merge(rank):
    merged = {}
    for scope, sketch_dim in CASES:
        sketch = gather(X[rank::2], scope, sketch_dim, num_samples=12, rank=rank, world_size=2)
        sketch.merge()
        merged[f"{scope} {sketch_dim}"] = {**sketch.state_dict(), "profiles": sketch.profiles()}
    return merged


def run_merge_with_an_empty_rank(rank):
    merged = []
    for empty in range(2):
        x = X[:0] if rank == empty else X[:12]
        sketch = gather(x, "map", 16, num_samples=12, rank=rank, world_size=2)
        sketch.merge()
        merged.append((sketch.count, sketch.profiles()))
    return merged


def fail():
    raise ValueError("out of luck")


def run_failures(rank):
    messages = []
    for culprit in (0, 1):
        work = fail if rank == culprit else dict
        try:
            recluster(work, CPU)
        except Exception as error:
            messages.append(f"{type(error).__name__}: {error}")
    return messages


def make_sketches():
    late = Sketch((3, 20), sketch_dim=16)
    late.update(X.flatten(2))
    return {"stem": gather(X, "map", 16), "late": late}


class Counting(FaissKMeans):
    problems = 0

    def fit(self, profiles, *args, **options):
        self.problems += len(profiles)
        return super().fit(profiles, *args, **options)


def run_reclustering(rank):
    clusterer = Counting()
    work = partial(cluster_share, make_sketches(), {}, clusterer, Grouping(num_clusters=4))
    labels = recluster(work, CPU)
    return {"labels": labels, "problems": clusterer.problems}


def run_window(rank):
    layer = torch.nn.Identity()
    hooks = {name: LayerHook(name, layer, None) for name in ("stem", "late")}
    window = GatheringWindow(hooks, SketchSettings(num_samples=12, sketch_dim=8), 0, CPU)
    full = []
    for batch in range(3):
        window.arm()
        for name, hook in hooks.items():
            if name == "stem" or rank == 0:  # "late" never runs on rank 1
                hook.first_call = True
                hook(layer, (), X[8 * batch + rank : 8 * (batch + 1) : 2])
        full.append(window.verdict())
    state = window.state_dict()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        merged = window.merge()
    return {
        "full": full,
        "state": state,
        "merged": [*merged],
        "counts": [int(sketch.count) for sketch in merged.values()],
        "profiles": merged["stem"].profiles(),
        "warnings": [str(warning.message) for warning in caught],
    }


def run_failing_window(rank):
    """Memory does not suffice on rank 1."""
    window = GatheringWindow(
        {"stem": LayerHook("stem", torch.nn.Identity(), None)}, SketchSettings(num_samples=12), 0, CPU
    )
    window.hooks["stem"].gather_error = MemoryError("full") if rank == 1 else None
    found = [window.verdict(), [*window.failed], window.failed["stem"] is None]
    window.close()
    return [*found, window.verdict()]


def run_stalled_window(rank):
    """The size changes on rank 1 alone."""
    layer = torch.nn.Identity()
    hook = LayerHook("stem", layer, None)
    window = GatheringWindow({"stem": hook}, SketchSettings(num_samples=20), 0, CPU)
    found = []
    for width in (5, 5, *[3 if rank == 1 else 5] * 3):
        window.arm()
        hook.first_call = True
        hook(layer, (), X[:2] if width == 5 and len(found) > 1 else X[:8, :, :, :width])
        found.append(window.verdict())
    return found


RUNS = (
    run_collectives,
    run_merge,
    run_merge_with_an_empty_rank,
    run_failures,
    run_reclustering,
    run_window,
    run_failing_window,
    run_stalled_window,
)


def run(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    torch.save({function.__name__: function(rank) for function in RUNS}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    spawn(run, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_two_processes_talk(both):
    for rank, results in enumerate(both):
        assert results["run_collectives"]["rank"] == [rank, 2]
        assert results["run_collectives"]["sum"].tolist() == [2.0, 1.0]
        assert results["run_collectives"]["from_rank"] == [0, 10]


@pytest.mark.parametrize(("scope", "sketch_dim"), CASES)
def test_merged_sketches_equal_that_of_one_process(both, scope, sketch_dim):
    alone = gather(X, scope, sketch_dim, num_samples=24)
    expected = {**alone.state_dict(), "profiles": alone.profiles()}
    first, second = (results["run_merge"][f"{scope} {sketch_dim}"] for results in both)
    for name, value in expected.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(first["profiles"], expected["profiles"], rtol=0, atol=1e-5)


def test_a_rank_without_samples_takes_over_the_others(both):
    for empty in range(2):
        alone = gather(X[:12], "map", 16, num_samples=12, rank=1 - empty, world_size=2)
        for results in both:
            count, profiles = results["run_merge_with_an_empty_rank"][empty]
            assert count == 12
            torch.testing.assert_close(profiles, alone.profiles(), rtol=0, atol=1e-5)


def test_an_error_on_one_rank_is_raised_on_both(both):
    own, other = (
        "ValueError: out of luck",
        "RuntimeError: failed on rank {}: see the error there",
    )
    assert both[0]["run_failures"] == [own, other.format(1)]
    assert both[1]["run_failures"] == [other.format(0), own]


def test_problems_are_shared_out_and_all_ranks_get_all_labels(both):
    alone = cluster_share(make_sketches(), {}, FaissKMeans(), Grouping(num_clusters=4))
    for results in both:
        assert results["run_reclustering"]["problems"] == 3
        assert all(torch.equal(results["run_reclustering"]["labels"][name], alone[name]) for name in alone)


def test_a_window_counts_and_merges_over_ranks(both):
    for results in both:
        assert results["run_window"]["full"] == ["open", "open", "full"]
        assert results["run_window"]["merged"] == ["stem"]
        assert results["run_window"]["counts"] == [12]
    assert torch.equal(both[0]["run_window"]["profiles"], both[1]["run_window"]["profiles"])


def test_a_window_of_two_ranks_equals_that_of_one(both):
    alone = gather(X[8:], "map", 8, num_samples=12).profiles()
    torch.testing.assert_close(both[0]["run_window"]["profiles"], alone, rtol=0, atol=1e-5)


def test_a_layer_that_ran_on_one_rank_alone_is_named_once(both):
    warned = both[0]["run_window"]["warnings"]
    assert len(warned) == 1
    assert "layer 'late' was not gathered, or not alike on all ranks" in warned[0]
    assert both[1]["run_window"]["warnings"] == []


def test_a_window_fails_on_all_ranks_where_memory_does_not_suffice_on_one(both):
    for rank, results in enumerate(both):
        assert results["run_failing_window"] == ["failed", ["stem"], rank == 0, "open"]


def test_a_window_stalls_on_all_ranks_where_enough_have_passed_on_one(both):
    for results in both:
        assert results["run_stalled_window"] == ["open"] * 4 + ["stalled"]


def test_with_several_ranks_an_open_window_is_not_in_the_state(both):
    assert both[0]["run_window"]["state"] == both[1]["run_window"]["state"] == {}
