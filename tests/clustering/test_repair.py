import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lightning_dropcluster.clustering.repair import centroids, repair


@st.composite
def clusterings(draw, distinct=True):
    """Points, any labels for them and a share; without ``distinct`` some points are copies."""
    num_points, num_clusters = draw(st.integers(1, 60)), draw(st.integers(1, 12))
    num_points = max(num_points, num_clusters)
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    points = rng.standard_normal((num_points, 3)).astype(np.float32)
    if not distinct:
        points = points[rng.integers(draw(st.integers(1, num_points)), size=num_points)]
    labels = draw(hnp.arrays(np.int64, num_points, elements=st.integers(0, num_clusters - 1)))
    return points, labels, num_clusters, draw(st.floats(0, 0.5))


@given(clusterings())
@settings(deadline=None, max_examples=200)
def test_no_cluster_is_empty_or_below_the_floor(clustering):
    points, _, num_clusters, min_share = clustering
    sizes = np.bincount(repair(*clustering), minlength=num_clusters)
    assert len(sizes) == num_clusters
    assert sizes.min() >= max(1, int(min_share * len(points) / num_clusters))


@given(clusterings(distinct=False))
@settings(deadline=None, max_examples=200)
def test_copies_leave_no_cluster_empty_that_could_have_a_member(clustering):
    points, _, num_clusters, _ = clustering
    labels = repair(*clustering)
    possible = min(num_clusters, len(np.unique(points, axis=0)))
    assert labels.shape == (len(points),)
    assert labels.dtype == np.int64
    assert labels.min() >= 0
    assert labels.max() < num_clusters
    assert len(np.unique(labels)) >= possible


@given(clusterings(distinct=False))
@settings(deadline=None, max_examples=100)
def test_the_arguments_stay_as_they_were(clustering):
    points, labels, num_clusters, min_share = clustering
    copies = points.copy(), labels.copy()
    repair(points, labels, num_clusters, min_share)
    np.testing.assert_array_equal(points, copies[0])
    np.testing.assert_array_equal(labels, copies[1])


@given(clusterings(), st.floats(2, 6))
@settings(deadline=None, max_examples=200)
def test_no_cluster_is_above_the_bound_and_the_floor_holds(clustering, max_share):
    points, _, num_clusters, min_share = clustering
    sizes = np.bincount(repair(*clustering, max_share), minlength=num_clusters)
    assert sizes.max() <= max_share * len(points) / num_clusters
    assert sizes.min() >= max(1, int(min_share * len(points) / num_clusters))


@given(clusterings(distinct=False))
@settings(deadline=None, max_examples=100)
def test_only_copies_of_one_point_may_be_above_the_bound(clustering):
    points, _, num_clusters, _ = clustering
    labels = repair(*clustering, 2.0)
    for cluster in np.flatnonzero(np.bincount(labels) > 2.0 * len(points) / num_clusters):
        assert len(np.unique(points[labels == cluster], axis=0)) == 1


def test_a_sound_clustering_is_handed_back():
    labels = np.array([0, 0, 1, 1, 2, 2])
    points = np.arange(6, dtype=np.float32)[:, None]
    assert repair(points, labels, 3, 0.5) is labels


def test_a_small_cluster_joins_its_nearest_and_the_largest_is_halved():
    points = np.array([0, 1, 2, 3, 4, 5, 6, 7, 100, 101, 102, 90], dtype=np.float32)[:, None]
    labels = np.array([0] * 8 + [1] * 3 + [2])
    expected = [0] * 4 + [2] * 4 + [1] * 4
    result = repair(points, labels, 3, 0.5)
    if result[0] == 2:  # which half keeps its number does not matter
        result = np.array([2, 1, 0])[result]
    np.testing.assert_array_equal(result, expected)


def test_fewer_distinct_points_than_clusters_become_one_cluster_each():
    points = np.array([[1, 0], [0, 1], [1, 0], [0, 1], [1, 1]], dtype=np.float32)
    labels = repair(points, np.zeros(5, dtype=np.int64), 4, 0.25)
    assert labels[0] == labels[2]
    assert labels[1] == labels[3]
    assert sorted(np.unique(labels)) == [0, 1, 2]


@pytest.mark.parametrize("noise", [0.0, 1e-7])
def test_copies_in_a_small_cluster_join_the_others(noise):
    rng = np.random.default_rng(0)
    points = np.ones((8, 3), np.float32) + noise * rng.standard_normal((8, 3)).astype(np.float32)
    labels = repair(points, np.array([0, 1, 1, 1, 1, 1, 1, 1]), 2, 0.5)
    assert len(np.unique(labels)) == 1


@given(clusterings(distinct=False))
@settings(deadline=None)
def test_centroids_are_means(clustering):
    points, labels, num_clusters, _ = clustering
    means, sizes = centroids(points, labels, num_clusters)
    for cluster in range(num_clusters):
        members = points[labels == cluster]
        assert sizes[cluster] == len(members)
        expected = members.mean(0) if len(members) else np.zeros(3)
        np.testing.assert_allclose(means[cluster], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_clusters", [1, 5])
def test_one_cluster_and_one_per_point_pass_through(num_clusters):
    points, labels = np.eye(5, dtype=np.float32), np.arange(5) % num_clusters
    np.testing.assert_array_equal(repair(points, labels, num_clusters, 0.5), labels)
