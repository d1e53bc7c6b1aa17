import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import SPATIAL
from torch.nn.functional import interpolate

from lightning_dropcluster.functional import cluster_sizes, resize_labels
from lightning_dropcluster.methods.dropping.label_tables import smallest_integer_type


@given(st.integers(2, 24), st.integers(1, 40), st.integers(2, 12), st.integers(1, 12))
@settings(deadline=None)
def test_labels_resize_as_torch_does_by_nearest(height, new_height, width, new_width):
    labels = torch.arange(height * width).reshape(1, height, width)
    expected = interpolate(labels[None].double(), size=(new_height, new_width), mode="nearest")[0].long()
    assert torch.equal(resize_labels(labels, (new_height, new_width)), expected)


@pytest.mark.parametrize("spatial", SPATIAL, ids=["1d", "2d", "3d"])
def test_labels_resize_in_every_number_of_dimensions(spatial):
    labels = torch.arange(2 * math.prod(spatial)).reshape(2, *spatial)
    double = tuple(2 * size for size in spatial)
    expected = interpolate(labels[None].double(), size=double, mode="nearest")[0].long()
    assert torch.equal(resize_labels(labels, double), expected)


@pytest.mark.parametrize(("old", "new"), [((3, 4), (3, 4)), ((1, 1), (5, 6))])
def test_labels_that_need_no_resizing_are_handed_back(old, new):
    labels = torch.zeros(2, *old, dtype=torch.uint8)
    assert resize_labels(labels, new) is labels


def test_labels_of_another_number_of_dimensions_raise():
    with pytest.raises(ValueError, match="zip"):
        resize_labels(torch.zeros(1, 3, 4, dtype=torch.int64), (5,))


@given(st.integers(1, 3), st.integers(1, 20), st.integers(1, 6), st.integers(0, 99))
def test_sizes_are_counts(groups, features, clusters, seed):
    labels = torch.randint(clusters, (groups, features), generator=torch.Generator().manual_seed(seed))
    counts = torch.stack([row.bincount(minlength=clusters) for row in labels])
    assert torch.equal(cluster_sizes(labels, groups, clusters), counts.float())


@pytest.mark.parametrize(
    ("count", "dtype"),
    [(1, torch.uint8), (256, torch.uint8), (257, torch.int16), (32768, torch.int16), (32769, torch.int32)],
)
def test_the_smallest_type_holds_the_largest_label(count, dtype):
    assert smallest_integer_type(count) == dtype
    assert torch.tensor(count - 1, dtype=dtype).item() == count - 1
