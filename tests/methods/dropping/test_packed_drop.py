import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import FLOATS
from torch._subclasses import FakeTensorMode

from lightning_dropcluster.functional import cluster_drop, draw_keep_table, draw_uniform
from lightning_dropcluster.methods import ClusterDrop
from lightning_dropcluster.methods.dropping import packed_drop
from lightning_dropcluster.methods.dropping.label_tables import kept_ratio_of_clusters
from lightning_dropcluster.methods.dropping.memory_order import (
    ClusterIndex,
    is_channels_last,
    number_clusters,
)
from lightning_dropcluster.methods.dropping.packed_drop import (
    drop_packed,
    kept_ratio_of_marks,
    pack,
    packing_pays,
    to_marks,
)

LAYOUTS = (torch.contiguous_format, torch.channels_last)
SCALE = 1.25


def make_problem(samples, shape, clusters, groups, dtype=torch.float32, layout=torch.contiguous_format):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, *shape, generator=generator).to(dtype).contiguous(memory_format=layout)
    labels = torch.randint(clusters, shape, generator=generator)
    return x, labels, torch.rand(samples, groups, clusters, generator=generator) > 0.4


def drop_in_words(x, labels, keep, inplace=False):
    index = number_clusters(labels, keep.shape[1:], is_channels_last(x)).flatten()
    return drop_packed(x, index, pack(to_marks(~keep, x.dtype)), SCALE, inplace)


def one_by_one(x, labels, keep):
    """By calls for single samples, which have one draw and so are not packed."""
    each = zip(x.split(1), keep.split(1), strict=True)
    return torch.cat([cluster_drop(sample, labels, kept, scale=SCALE) for sample, kept in each])


@given(
    st.integers(1, 70),
    st.tuples(*[st.integers(1, 4)] * 3),
    st.integers(1, 5),
    st.booleans(),
    st.sampled_from(FLOATS),
    st.sampled_from(LAYOUTS),
    st.booleans(),
)
@settings(deadline=None, max_examples=100)
def test_equals_samples_one_by_one(samples, shape, clusters, per_map, dtype, layout, inplace):
    x, labels, keep = make_problem(samples, shape, clusters, shape[0] if per_map else 1, dtype, layout)
    expected, strides = one_by_one(x, labels, keep), x.stride()
    made = drop_in_words(x, labels, keep, inplace)
    assert torch.equal(made, expected)
    assert (made is x, made.stride()) == (inplace, strides)


@pytest.mark.parametrize("samples", [15, 16, 17, 31, 32, 33, 63, 64, 65])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_takes_batches_beside_the_ends_of_words(samples, dtype, monkeypatch):
    monkeypatch.setattr(packed_drop, "_SLICE", 7 * 6)  # seven samples at a time, which divides no word
    x, labels, keep = make_problem(samples, (2, 3), 4, 2, dtype)
    keep[-1], keep[0] = True, False  # the last bits of a word and the first
    assert torch.equal(drop_in_words(x, labels, keep), one_by_one(x, labels, keep))


@pytest.mark.parametrize("groups", [1, 32], ids=["layer", "map"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_large_activations_are_dropped_like_small_ones(dtype, layout, groups):
    x, labels, keep = make_problem(33, (32, 32, 32), 64, groups, dtype, layout)
    assert packing_pays(x, labels, len(keep))
    assert torch.equal(cluster_drop(x, labels, keep, scale=SCALE), one_by_one(x, labels, keep))


def test_autocast_changes_nothing():
    x, labels, keep = make_problem(40, (2, 3), 4, 2)
    with torch.autocast("cpu", torch.bfloat16):
        made = drop_in_words(x, labels, keep)
    assert torch.equal(made, one_by_one(x, labels, keep))


@given(st.integers(1, 40), st.integers(1, 3), st.integers(1, 6), st.floats(0, 1, exclude_max=True, width=32))
@settings(deadline=None, max_examples=60)
def test_marks_and_counts_what_a_keep_table_drops(samples, groups, clusters, drop_prob):
    prob, sizes = torch.tensor(drop_prob), torch.randint(9, (groups, clusters), dtype=torch.int32)
    total = int(sizes.sum())
    torch.manual_seed(0)
    keep = draw_keep_table((samples, groups, clusters), prob)
    torch.manual_seed(0)
    marks = to_marks(draw_uniform((samples, groups, clusters)) < prob, torch.float32)
    assert torch.equal(marks, (~keep).int())
    expected = kept_ratio_of_clusters(keep, sizes, total)
    torch.testing.assert_close(torch.tensor(kept_ratio_of_marks(marks, sizes, total)), expected)


@pytest.mark.parametrize("rescale", ["batch", "expected"])
@pytest.mark.parametrize("groups", [1, 16], ids=["layer", "map"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_module_equals_the_function_forward_and_backward(layout, groups, rescale):
    x, labels, keep = make_problem(5, (16, 32, 32), 9, groups, layout=layout)
    drop = ClusterDrop(labels, 0.4, num_clusters=9, per_map=groups > 1, rescale=rescale)
    torch.manual_seed(3)
    keep = draw_keep_table(tuple(keep.shape), drop.drop_prob)
    torch.manual_seed(3)
    made = drop(x.requires_grad_())
    options = {} if rescale == "batch" else {"scale": 1 / 0.6}
    torch.testing.assert_close(made, cluster_drop(x, labels, keep, **options))
    probe = torch.randn(x.shape)  # with the channels first, whatever x has
    (grad,) = torch.autograd.grad(made, x, probe)
    torch.testing.assert_close(grad, cluster_drop(probe, labels, keep, **options))
    assert grad.stride() == x.stride()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_first_and_second_derivatives_are_exact(layout):
    x, labels, keep = make_problem(3, (2, 3, 2), 4, 2, torch.float64, layout)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: drop_in_words(x**3, labels, keep), x)
    assert torch.autograd.gradgradcheck(lambda x: drop_in_words(x**3, labels, keep), x)


@pytest.mark.parametrize(
    ("draws", "shape"),
    [(1, (64, 64, 64)), (8, (1, 64, 64)), (8, (64, 1, 1))],
    ids=["one draw", "one map", "whole maps"],
)
def test_small_masks_are_looked_up_whole(draws, shape):
    assert not packing_pays(torch.empty(8, 64, 64, 64), torch.zeros(shape), draws)


def test_activations_with_gaps_are_looked_up_whole():
    gaps = torch.empty(8, 64, 64, 128)[..., ::2]
    assert not packing_pays(gaps, torch.zeros(gaps.shape[1:]), 8)


def test_an_index_is_made_once_for_labels_that_stay_as_they_are():
    index, labels = ClusterIndex(), torch.tensor([[0, 1], [1, 0]])
    first = index.of(labels, (2, 2), False)
    assert first.tolist() == [0, 1, 3, 2]
    assert index.of(labels, (2, 2), False) is first
    assert index.of(labels, (2, 2), True).tolist() == [0, 3, 1, 2]
    labels[0, 0] = 1
    assert index.of(labels, (2, 2), False).tolist() == [1, 1, 3, 2]
    assert index.of(1 - labels, (2, 2), False).tolist() == [0, 0, 2, 3]


def test_an_index_follows_labels_whose_changes_torch_does_not_count():
    index = ClusterIndex()
    with torch.inference_mode():
        labels = torch.tensor([[0, 1]])
        assert index.of(labels, (1, 2), False).tolist() == [0, 1]
        labels[0, 0] = 1
        assert index.of(labels, (1, 2), False).tolist() == [1, 1]


def test_an_index_made_in_inference_mode_serves_training():
    x, labels, _ = make_problem(8, (16, 32, 32), 9, 16)
    drop = ClusterDrop(labels, 0.4, num_clusters=9)
    with torch.inference_mode():
        drop(x)
    drop(x.requires_grad_()).sum().backward()
    assert x.grad is not None


def test_fake_tensors_are_dropped_without_values():
    _, labels, _ = make_problem(8, (16, 32, 32), 9, 16)
    drop = ClusterDrop(labels, 0.4, num_clusters=9)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(8, 16, 32, 32, requires_grad=True)
        made = drop(x)
        assert torch.autograd.grad(made.sum(), x)[0].shape == x.shape


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda drop: pickle.loads(pickle.dumps(drop))])
def test_copies_of_a_module_follow_their_own_labels(duplicate):
    x, labels, _ = make_problem(8, (16, 32, 32), 9, 16)
    drop = ClusterDrop(labels, 0.4, num_clusters=9)
    drop(x)
    other = duplicate(drop)
    other(x)
    other.load_state_dict(ClusterDrop(labels.flip(1), 0.4, num_clusters=9).state_dict())
    torch.manual_seed(0)
    made = other(x)
    torch.manual_seed(0)
    assert torch.equal(made.flip(2), drop(x.flip(2)))
