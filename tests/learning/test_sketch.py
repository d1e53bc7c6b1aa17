import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from lightning_dropcluster.functional import resize_labels
from lightning_dropcluster.learning import sketch as sketch_module
from lightning_dropcluster.learning.sketch import Sketch

SCOPES = ("map", "position", "layer", "channel")
SHAPES = ((3, 5), (2, 3, 4), (2, 2, 3, 2))
ADDITIVE = ("moments", "sums", "column_sums", "count")
TENSORS = (*ADDITIVE, "origin")


def make_x(samples=24, shape=(2, 3, 4), seed=0):
    return torch.randn(samples, *shape, generator=torch.Generator().manual_seed(seed))


def gather(batches, shape=(2, 3, 4), **options):
    sketch = Sketch(shape, **({"num_samples": 1000} | options))
    for batch in batches:
        sketch.update(batch)
    return sketch


def naive_profiles(x, scope):
    """Take each item's values over all observations, in float64; items that never change are zero."""
    values = x.double().numpy().reshape(len(x), x.shape[1], -1)
    maps = [[values[:, c, s] for s in range(values.shape[2])] for c in range(values.shape[1])]
    items = {
        "map": maps,
        "position": [[values[:, :, s].ravel() for s in range(values.shape[2])]],
        "layer": [[item for items in maps for item in items]],
        "channel": [[values[:, c, :].ravel() for c in range(values.shape[1])]],
    }[scope]
    centred = np.array(items) - np.array(items).mean(axis=-1, keepdims=True)
    return torch.from_numpy(centred / np.linalg.norm(centred, axis=-1, keepdims=True).clip(1e-300))


def inner(profiles):
    return profiles.double() @ profiles.double().mT


def split(x, cuts):
    return x.tensor_split(sorted(set(cuts)))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("shape", SHAPES, ids=["1d", "2d", "3d"])
def test_is_exact_where_every_observation_has_a_column(scope, shape):
    x = make_x(4, shape)
    expected = naive_profiles(x, scope)
    sketch = gather([x], shape, scope=scope, num_samples=4, sketch_dim=expected.shape[2])
    torch.testing.assert_close(inner(sketch.profiles()), inner(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("scope", SCOPES)
def test_inner_products_approximate_correlations(scope):
    mixed = make_x(300) + 2 * make_x(300, (1, 1, 1), seed=1) + make_x(300, (2, 1, 1), seed=2)
    profiles = gather([mixed], scope=scope, sketch_dim=256).profiles()
    error = inner(profiles) - inner(naive_profiles(mixed, scope))
    torch.testing.assert_close(profiles.norm(dim=2), torch.ones(profiles.shape[:2]))
    assert error.square().mean().sqrt() < 1 / math.sqrt(256)


def test_more_columns_approximate_better():
    x = make_x(500)
    errors = [
        (inner(gather([x], sketch_dim=dim).profiles()) - inner(naive_profiles(x, "map"))).abs().mean()
        for dim in (16, 64, 256)
    ]
    assert errors[0] > 1.5 * errors[1] > 1.5**2 * errors[2]


@given(st.lists(st.integers(1, 23), max_size=4), st.sampled_from(SCOPES), st.sampled_from([8, 64, 512]))
@settings(deadline=None, max_examples=40)
def test_how_the_samples_are_split_into_batches_does_not_matter(cuts, scope, sketch_dim):
    x, options = make_x(), {"scope": scope, "sketch_dim": sketch_dim, "num_samples": 24}
    whole, parts = gather([x], **options), gather(split(x, cuts), **options)
    for name in TENSORS:
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(parts.profiles(), whole.profiles(), rtol=0, atol=1e-5)


def add_up(first, others):
    """What `Sketch.merge` does over ranks (tests/test_ranks.py), here in one process."""
    for other in others:
        other.rebase(first.origin)
        for name in ADDITIVE:
            getattr(first, name).add_(getattr(other, name))


@given(st.integers(1, 4), st.sampled_from(SCOPES), st.sampled_from([8, 64, 512]))
@settings(deadline=None, max_examples=30)
def test_merged_ranks_equal_one_process(ranks, scope, sketch_dim):
    x, options = make_x(), {"scope": scope, "sketch_dim": sketch_dim}
    alone = gather([x], num_samples=24, **options)
    first, *others = (
        gather([x[rank::ranks]], num_samples=24 // ranks, rank=rank, world_size=ranks, **options)
        for rank in range(ranks)
    )
    add_up(first, others)
    for name in TENSORS:
        torch.testing.assert_close(getattr(first, name), getattr(alone, name), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(first.profiles(), alone.profiles(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("sample", [0, 7, 23])
def test_rebasing_to_another_sample_leaves_the_profiles_alone(sample):
    x = make_x()
    sketch = gather([x])
    expected = sketch.profiles()
    sketch.rebase(x[sample].flatten())
    torch.testing.assert_close(sketch.profiles(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("ranks", [1, 3])
@given(value=st.floats(-(2.0**60), 2.0**60, width=32))
@settings(deadline=None, max_examples=40)
def test_features_that_never_change_are_zero(ranks, value):
    x = make_x()
    x[:, 0, 1] = value
    first, *others = (gather(x[rank::ranks].split(3), world_size=ranks, rank=rank) for rank in range(ranks))
    add_up(first, others)
    alive = first.profiles().any(dim=2).reshape(2, 3, 4)
    assert not alive[0, 1].any()
    assert alive.sum() == 20


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("value", [0.0, 7.123, -1234.567, 1e6 / 3])
def test_features_equal_on_all_ranks_but_for_one_sample_are_alive(value, ranks):
    x = torch.full((2000, 1, 3), value)
    x[0, 0, 0], x[-1, 0, 1] = value + 1, value + 1
    first, *others = (
        gather(x[rank::ranks].split(64), (1, 3), num_samples=2000, world_size=ranks, rank=rank)
        for rank in range(ranks)
    )
    add_up(first, others)
    assert first.profiles().any(dim=2).tolist() == [[True, True, False]]


@pytest.mark.parametrize("mean", [1e3, -1e5, 1e6])
def test_large_means_cost_no_precision(mean):
    x = (make_x(200).mul(64).round() / 64) + mean  # multiples of 1/64 are exact in float32 up to 2**18
    exact = gather([x], sketch_dim=200, num_samples=200).profiles()
    torch.testing.assert_close(inner(exact), inner(naive_profiles(x, "map")), rtol=0, atol=1e-5)


def test_profiles_do_not_depend_on_scale_or_sign_of_scale():
    x = make_x()
    torch.testing.assert_close(gather([x * 1000]).profiles(), gather([x]).profiles(), rtol=0, atol=1e-5)
    torch.testing.assert_close(gather([x * -1e-3]).profiles(), -gather([x]).profiles(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes_are_added_up_in_float32(dtype):
    x = make_x().to(dtype)
    sketch, reference = gather([x]), gather([x.float()])
    assert all(torch.equal(getattr(sketch, name), getattr(reference, name)) for name in TENSORS)
    assert sketch.moments.dtype == sketch.sums.dtype == torch.float32


def test_autocast_costs_no_precision():
    x = make_x()
    with torch.autocast("cpu", torch.bfloat16):
        sketch = gather([x])
    assert torch.equal(sketch.moments, gather([x]).moments)
    assert torch.equal(sketch.sums, gather([x]).sums)


@pytest.mark.parametrize("scope", SCOPES)
def test_memory_does_not_grow_with_the_samples(scope):
    sizes = {
        sum(buffer.nbytes for buffer in gather([make_x(seen)], num_samples=asked, scope=scope).buffers())
        for seen, asked in ((1, 100), (200, 200), (200, 100_000))
    }
    assert len(sizes) == 1


@pytest.mark.parametrize("sketch_dim", [8, 64])
@pytest.mark.parametrize("batch", [3, 8, 24])
def test_samples_beyond_those_asked_for_are_left_out(batch, sketch_dim):
    x = make_x()
    sketch = gather(x.split(batch), num_samples=10, sketch_dim=sketch_dim)
    expected = gather([x[:10]], num_samples=10, sketch_dim=sketch_dim)
    for name in TENSORS:
        torch.testing.assert_close(getattr(sketch, name), getattr(expected, name), rtol=1e-5, atol=1e-5)


def test_gathering_changes_neither_the_activation_nor_the_generator():
    x, state = make_x(), torch.get_rng_state()
    before = x.clone()
    gather([x])
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("sample", [0, 5, 23])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e19])
def test_what_cannot_be_squared_is_noticed(value, sample):
    x = make_x()
    assert gather([x]).is_finite()
    x[sample, 1, 2, 3] = value
    assert not gather(x.split(5)).is_finite()


@pytest.mark.parametrize("host_looks", [True, False])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_samples_beyond_those_asked_for_do_no_harm(value, host_looks, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: not host_looks)
    x = make_x()
    wanted, beyond = gather([x[:8]], num_samples=8), torch.full_like(x, value)
    got = gather([x[:5], torch.cat([x[5:8], beyond]), beyond], num_samples=8)
    assert got.is_finite()
    torch.testing.assert_close(got.profiles(), wanted.profiles())


def test_infinities_of_half_precision_are_noticed():
    assert not gather([(make_x() * 1e6).half()]).is_finite()


@pytest.mark.parametrize("scope", SCOPES)
def test_a_window_saved_halfway_goes_on_to_the_last_bit(scope):
    batches = make_x().split(5)
    whole, first = gather(batches, scope=scope), gather(batches[:2], scope=scope)
    resumed = gather([], scope=scope)
    resumed.load_state_dict(first.state_dict())
    for batch in batches[2:]:
        resumed.update(batch)
    assert torch.equal(resumed.profiles(), whole.profiles())
    assert all(torch.equal(getattr(resumed, name), getattr(whole, name)) for name in TENSORS)


def signs(num_samples=400, sketch_dim=100, **options):
    """Read the signs through the front door: item i moves in sample i + 1 alone."""
    x = torch.cat([torch.zeros(1, num_samples), torch.eye(num_samples)])[:, None]
    sketch = gather([x], (1, num_samples), num_samples=num_samples + 1, sketch_dim=sketch_dim, **options)
    return sketch.moments.T


def test_observations_take_the_columns_in_turns():
    columns = signs().abs().argmax(1)
    assert torch.equal(columns[:99], torch.arange(99) + 1)  # the first column has the first sample
    starts = columns[99::100]
    assert torch.equal(columns[99:], (torch.arange(100) + starts[:, None]).flatten()[: 400 - 99] % 100)
    assert len(starts.unique()) == len(starts)
    assert torch.equal(signs().abs().sum(1), torch.ones(400))


@pytest.mark.parametrize("scope", ["map", "layer"])
@pytest.mark.parametrize("period", [16, 64])
def test_loud_samples_that_come_round_again_do_not_fill_a_column(scope, period):
    x = make_x(1024, (4, 4, 4))
    x[::period] *= 30.0
    sketch = gather([x], (4, 4, 4), scope=scope, num_samples=1024, sketch_dim=64)
    errors = inner(sketch.profiles()) - inner(naive_profiles(x, scope))
    assert errors.square().mean().sqrt() < 0.15


@pytest.mark.parametrize(("scope", "loud"), [("position", (0, slice(None))), ("channel", (slice(None), 0))])
def test_one_loud_channel_or_position_does_not_fill_a_column(scope, loud):
    x = make_x(512, (16, 4, 4))
    x[:, *loud] *= 30.0
    sketch = gather([x], (16, 4, 4), scope=scope, num_samples=512, sketch_dim=64)
    errors = inner(sketch.profiles()) - inner(naive_profiles(x, scope))
    assert errors.square().mean().sqrt() < 0.15


def test_signs_are_balanced_and_uncorrelated():
    drawn = signs(4000).sum(1)
    assert drawn.mean().abs() < 4 / math.sqrt(4000)
    products = torch.stack([(drawn[lag:] * drawn[:-lag]).mean() for lag in range(1, 200)])
    assert products.square().mean().sqrt() == pytest.approx(1 / math.sqrt(4000), rel=0.2)
    assert products.abs().max() < 6 / math.sqrt(4000)


def test_it_approximates_as_well_as_dense_random_signs():
    profiles = naive_profiles(make_x(1000), "map")[0]
    generator = torch.Generator().manual_seed(1)
    dense = torch.randint(2, (1000, 64), generator=generator).double() * 2 - 1
    expected = (inner(F.normalize(profiles @ dense)) - inner(profiles)).square().mean().sqrt()
    sketched = gather([make_x(1000)], num_samples=1000).profiles()[0]
    assert (inner(sketched) - inner(profiles)).square().mean().sqrt() < 1.3 * expected


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"window": 1}, {"seed": -1}, {"seed": 2**40 + 3, "window": 7}]
)
def test_each_seed_and_window_has_signs_of_its_own(other):
    assert torch.equal(signs(**other), signs(**other))
    assert (signs(**other) * signs()).sum().abs() < 4 * math.sqrt(400)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("sketch_dim", [8, 512])
def test_compiled_update_equals_eager_without_a_graph_break(scope, sketch_dim):
    torch.compiler.reset()
    options = {"scope": scope, "sketch_dim": sketch_dim, "num_samples": 24}
    traced = gather([], **options)
    update = torch.compile(traced.update, fullgraph=True, backend="eager")
    for batch in make_x().split(8):
        update(batch)
    torch.testing.assert_close(traced.moments, gather(make_x().split(8), **options).moments)
    assert traced.count == 24


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("block", [slice(0, 1), slice(1, 2), slice(0, 0), slice(None)])
def test_profiles_of_some_problems_are_those_of_all(scope, block):
    sketch = gather([make_x()], scope=scope)
    assert torch.equal(sketch.profiles(block), sketch.profiles()[block])


def test_an_unknown_scope_raises():
    with pytest.raises(KeyError, match="pixel"):
        Sketch((2, 3), scope="pixel")


def test_an_empty_batch_changes_nothing():
    sketch = Sketch((1, 2), num_samples=4)
    before = {name: value.clone() for name, value in sketch.state_dict().items()}
    sketch.update(torch.zeros(0, 1, 2))
    assert all(torch.equal(value, before[name]) for name, value in sketch.state_dict().items())


def test_profiles_of_tiny_activations_have_unit_length():
    sketch = Sketch((1, 8), num_samples=8, sketch_dim=8)
    sketch.update(torch.randn(8, 1, 8, generator=torch.Generator().manual_seed(0)) * 1e-14)
    torch.testing.assert_close(sketch.profiles().norm(dim=2), torch.ones(1, 8))


@pytest.mark.parametrize("size", [(3,), (12,), (5,)])
def test_maps_of_another_size_are_taken_in_as_if_their_labels_were_looked_up(size):
    sketch, expected = (Sketch((2, 6), num_samples=8, sketch_dim=8, any_size=True) for _ in range(2))
    assert sketch.takes((2, *size))
    assert not sketch.takes((3, *size))
    x = torch.randn(8, 2, *size, generator=torch.Generator().manual_seed(0))
    sketch.update(x)
    expected.update(resize_labels(x.flatten(0, 1), (6,)).reshape(8, 2, 6))
    assert torch.equal(sketch.profiles(), expected.profiles())


def test_maps_of_another_size_are_refused_unless_they_are_asked_for():
    sketch = Sketch((2, 6))
    assert sketch.takes((2, 6))
    assert not sketch.takes((2, 7))


def test_activations_come_from_whatever_device():
    """Of a model that is spread over devices; here the sketch is on the one that holds no values."""
    sketch = Sketch((2, 4), num_samples=8, sketch_dim=4, device=torch.device("meta"))
    sketch.update(torch.randn(3, 2, 4))
    assert sketch.moments.device.type == "meta"


FORMATS = [torch.contiguous_format, torch.channels_last]


def gather_on(x, scope, device="cpu", num_samples=40):
    sketch = Sketch(tuple(x.shape[1:]), scope=scope, num_samples=num_samples, sketch_dim=16, device=device)
    for batch in x.to(device).split(24):
        sketch.update(batch)
    return {name: value.cpu() for name, value in sketch.state_dict().items()}


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("scope", SCOPES)
def test_as_on_a_gpu_the_same_is_gathered(monkeypatch, scope, memory_format):
    x = torch.randn(72, 3, 4, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[40:] = torch.nan  # beyond those asked for
    x = x.to(memory_format=memory_format)
    here = gather_on(x, scope)
    monkeypatch.setattr(sketch_module, "_host_may_look", lambda x: False)
    monkeypatch.setattr(sketch_module, "_adds_in_order", lambda x: False)
    monkeypatch.setattr(Sketch, "_part_size", lambda self, x: -(-len(x) // 4))
    torch.testing.assert_close(gather_on(x, scope), here)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("scope", SCOPES)
def test_a_gpu_gathers_what_a_cpu_does(scope, memory_format):
    x = torch.randn(72, 3, 8, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[40:] = torch.inf
    x = x.to(memory_format=memory_format)
    torch.testing.assert_close(gather_on(x, scope, "cuda"), gather_on(x, scope), rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("scope", SCOPES)
def test_on_a_gpu_the_same_is_gathered_each_time(scope):
    x = torch.randn(72, 3, 8, 5)
    first, second = (gather_on(x, scope, "cuda") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
