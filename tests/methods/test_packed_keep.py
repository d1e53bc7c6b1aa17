import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_dropcluster.functional import cluster_drop
from lightning_dropcluster.methods import packed_keep
from lightning_dropcluster.methods.packed_keep import look_up, multiply_packed, packing_pays

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def make_problem(samples, shape, clusters, groups, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, *shape, generator=generator).to(dtype)
    index = torch.randint(clusters, shape, generator=generator)
    keep = torch.rand(samples, groups, clusters, generator=generator) > 0.4
    return x, index, keep


def whole_mask(x, index, keep, scale):
    return x * look_up(keep.to(x.dtype), index) * scale


@given(
    st.integers(1, 70),
    st.lists(st.integers(1, 4), min_size=2, max_size=4).map(tuple),
    st.integers(1, 5),
    st.booleans(),
    st.sampled_from(FLOATS),
    st.booleans(),
)
@settings(deadline=None, max_examples=150)
def test_equals_the_product_with_a_whole_mask(samples, shape, clusters, per_row, dtype, inplace):
    x, index, keep = make_problem(samples, shape, clusters, shape[0] if per_row else 1, dtype)
    scale = torch.tensor(1.3, dtype=dtype)
    expected = whole_mask(x, index, keep, scale)
    out = x if inplace else torch.empty_like(x)
    multiply_packed(out, x, index, keep, scale)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("samples", [15, 16, 17, 31, 32, 33, 63, 64, 65])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_takes_batches_beside_the_ends_of_words(samples, dtype, monkeypatch):
    monkeypatch.setattr(packed_keep, "_SLICE", 7 * 6)  # seven samples at a time, which divides no word
    x, index, keep = make_problem(samples, (2, 3), 4, 2, dtype)
    keep[-1], keep[0] = True, False  # the last bits of a word and the first
    out, scale = torch.empty_like(x), torch.ones((), dtype=dtype)
    multiply_packed(out, x, index, keep, scale)
    assert torch.equal(out, whole_mask(x, index, keep, scale))


@pytest.mark.parametrize("scope", ["map", "layer"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_large_activations_are_dropped_like_small_ones(dtype, layout, scope):
    x, labels, keep = make_problem(33, (32, 32, 32), 64, 32 if scope == "map" else 1, dtype)
    x = x.contiguous(memory_format=layout)
    assert packing_pays(x, labels, keep)
    dropped = cluster_drop(x, labels, keep, scale=1.3)
    each = [cluster_drop(x[i : i + 1], labels, keep[i : i + 1], scale=1.3) for i in range(len(x))]
    assert torch.equal(dropped, torch.cat(each))
    assert dropped.stride() == x.stride()


def test_autocast_changes_nothing():
    x, index, keep = make_problem(40, (2, 3), 4, 2, torch.float32)
    out, scale = torch.empty_like(x), torch.tensor(1.3)
    with torch.autocast("cpu", torch.bfloat16):
        multiply_packed(out, x, index, keep, scale)
    assert torch.equal(out, whole_mask(x, index, keep, scale))


@pytest.mark.parametrize(
    ("drawn", "shape"),
    [(1, (64, 64, 64)), (8, (1, 64, 64)), (8, (64, 1, 1))],
    ids=["one draw", "one map", "whole maps"],
)
def test_small_masks_are_looked_up_whole(drawn, shape):
    x, index = torch.empty(8, 64, 64, 64), torch.zeros(shape, dtype=torch.long)
    assert not packing_pays(x, index, torch.ones(drawn, 1, 1, dtype=torch.bool))
