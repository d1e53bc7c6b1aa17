import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score

from lightning_dropcluster.clustering import adjusted_rand_index


def noisy_pair(problems, items, clusters, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(clusters, (problems, items), generator=generator)
    noise = torch.randint(clusters, labels.shape, generator=generator)
    changed = torch.rand(labels.shape, generator=generator) < 0.2
    return labels, torch.where(changed, noise, labels)


@given(st.integers(1, 5), st.integers(2, 60), st.integers(1, 6), st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_equals_the_mean_of_scikit_learn(problems, items, clusters, seed):
    labels, other = noisy_pair(problems, items, clusters, seed)
    expected = sum(map(adjusted_rand_score, other, labels)) / problems
    assert adjusted_rand_index(labels, other) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("clusters", [1, 7, 300, 4096])
def test_large_problems_do_not_overflow(clusters):
    labels, other = noisy_pair(1, 4096, clusters)
    expected = adjusted_rand_score(other[0], labels[0])
    assert adjusted_rand_index(labels, other) == pytest.approx(expected, abs=1e-5)


def test_is_one_where_only_the_names_differ():
    labels, _ = noisy_pair(3, 50, 5)
    assert adjusted_rand_index(labels, (labels + 2) % 5) == pytest.approx(1.0)


def test_is_zero_by_chance():
    labels, _ = noisy_pair(16, 2000, 5)
    other, _ = noisy_pair(16, 2000, 5, seed=1)
    assert abs(adjusted_rand_index(labels, other)) < 0.01


@pytest.mark.parametrize("clusters", [1, 6])
def test_equal_trivial_clusterings_agree(clusters):
    labels = (torch.arange(6) % clusters)[None]
    assert adjusted_rand_index(labels, labels) == 1.0


def test_compares_a_fixed_sample_of_large_layers():
    labels, other = noisy_pair(40, 500, 5)
    sample = adjusted_rand_index(labels, other, max_problems=8, max_items=100)
    assert sample == adjusted_rand_index(labels, other, max_problems=8, max_items=100)
    assert sample == pytest.approx(adjusted_rand_index(labels, other, max_problems=40), abs=0.05)


def test_the_sample_reaches_from_the_first_to_the_last_problem_and_item():
    labels, other = torch.zeros(3, 5, dtype=torch.int64), torch.zeros(3, 5, dtype=torch.int64)
    labels[-1], other[-1] = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 0, 1, 1, 0])
    assert adjusted_rand_index(labels, other, max_problems=2, max_items=2) == pytest.approx(0.5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("shape", [(3, 50, 5), (64, 3136, 196), (1, 200_000, 4096)], ids=str)
def test_a_gpu_compares_as_a_cpu_does(shape):
    labels, other = noisy_pair(*shape)
    assert adjusted_rand_index(labels.cuda(), other.cuda()) == adjusted_rand_index(labels, other)
