import itertools
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import FLOATS, SCOPES, SPATIAL, in_each_memory_format, label_shape, make_problem, problems
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import interpolate
from torch.utils.checkpoint import checkpoint

from lightning_dropcluster.functional import (
    cluster_drop,
    cluster_sizes,
    draw_keep_table,
    draw_uniform,
)
from lightning_dropcluster.methods import ClusterDrop
from lightning_dropcluster.methods.dropping.label_tables import smallest_integer_type

LABELS = torch.arange(2 * 6 * 6).reshape(2, 6, 6) % 7


def naive_mask(x, labels, keep):
    mask = torch.zeros_like(x)
    for n, c, *cell in itertools.product(*map(range, x.shape)):
        where = tuple(min(i, size - 1) for i, size in zip((c, *cell), labels.shape, strict=True))
        mask[(n, c, *cell)] = keep[min(n, len(keep) - 1), min(c, keep.shape[1] - 1), labels[where]]
    return mask


@given(problems(), st.floats(0.5, 4.0, width=32))
@settings(deadline=None, max_examples=60)
def test_equals_the_naive_loop(problem, scale):
    x, labels, keep = problem
    torch.testing.assert_close(
        cluster_drop(x, labels, keep, scale=scale), x * naive_mask(*problem) * scale, rtol=1e-6, atol=0
    )


@given(problems())
@settings(deadline=None, max_examples=60)
def test_rescales_by_the_kept_share_of_the_whole_batch(problem):
    x, labels, keep = problem
    mask = naive_mask(*problem)
    ratio = mask.numel() / mask.sum() if mask.any() else 1.0
    torch.testing.assert_close(cluster_drop(x, labels, keep), x * mask * ratio)


@given(problems())
@settings(deadline=None, max_examples=30)
def test_one_draw_for_the_batch_equals_the_same_draw_for_each_sample(problem):
    x, labels, keep = problem
    shared = keep[:1]
    repeated = shared.expand(len(x), -1, -1)
    torch.testing.assert_close(cluster_drop(x, labels, shared), cluster_drop(x, labels, repeated))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("spatial", SPATIAL, ids=["1d", "2d", "3d"])
def test_every_scope_takes_its_own_table_shape(scope, spatial):
    x, labels, keep = make_problem(scope, spatial=spatial)
    full = labels.expand(x.shape[1:])
    assert labels.shape == label_shape(scope, x.shape[1], spatial)
    torch.testing.assert_close(cluster_drop(x, labels, keep), cluster_drop(x, full, keep))


def test_refuses_a_scale_with_dimensions():
    with pytest.raises(ValueError, match=r"scale of shape \(3, 1, 1\): must be a number or a 0-d tensor"):
        cluster_drop(*make_problem(), scale=torch.ones(3, 1, 1))


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4)])
def test_takes_activations_without_features(shape):
    labels, keep = torch.zeros(shape[1:], dtype=torch.uint8), draw_keep_table((shape[0], 3, 2), 0.5)
    assert cluster_drop(torch.ones(shape), labels, keep).shape == shape


def test_takes_activations_without_spatial_dimensions():
    x, labels, keep = make_problem(spatial=(), scope="layer")
    torch.testing.assert_close(cluster_drop(x, labels, keep, scale=1.0), x * naive_mask(x, labels, keep))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
def test_takes_labels_of_every_integer_type(dtype):
    x, labels, keep = make_problem()
    assert torch.equal(cluster_drop(x, labels.to(dtype), keep), cluster_drop(x, labels, keep))


@pytest.mark.parametrize("drawn", [1, 2])
@pytest.mark.parametrize("scope", SCOPES)
def test_first_and_second_derivatives_are_exact(scope, drawn):
    x, labels, keep = make_problem(scope, samples=2, channels=2, spatial=(2, 3), drawn=drawn)
    x = x.double().requires_grad_()

    def cubed(x):
        return cluster_drop(x**3, labels, keep)

    assert torch.autograd.gradcheck(cubed, x)
    assert torch.autograd.gradgradcheck(cubed, x)


@pytest.mark.parametrize("drawn", [1, 3])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@in_each_memory_format
def test_keeps_dtype_device_and_memory_format(spatial, layout, dtype, drawn):
    x, labels, keep = make_problem(spatial=spatial, drawn=drawn)
    x = x.to(dtype).contiguous(memory_format=layout)
    out = cluster_drop(x, labels, keep)
    assert (out.dtype, out.device, out.stride()) == (x.dtype, x.device, x.stride())
    reference = cluster_drop(x.double(), labels, keep)
    torch.testing.assert_close(out.double(), reference, rtol=4 * torch.finfo(dtype).eps, atol=0)


def test_gradient_has_the_dtype_and_layout_of_the_activation():
    x, labels, keep = make_problem()
    x = x.bfloat16().contiguous(memory_format=torch.channels_last).requires_grad_()
    out = cluster_drop(x, labels, keep)
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
    assert (grad.dtype, grad.stride()) == (x.dtype, x.stride())


def test_takes_activations_that_are_not_contiguous():
    x, labels, keep = make_problem()
    strided = torch.stack([x, x], dim=-1)[..., 0]
    assert not strided.is_contiguous()
    assert torch.equal(cluster_drop(strided, labels, keep), cluster_drop(x, labels, keep))


def test_leaves_its_arguments_alone():
    arguments = make_problem()
    before = [value.clone() for value in arguments]
    cluster_drop(*arguments)
    assert all(map(torch.equal, arguments, before))


@pytest.mark.parametrize("shift", [0.0, 0.618])
def test_each_feature_drops_with_drop_prob_whatever_the_size_of_its_cluster(shift):
    torch.manual_seed(0)
    sizes, draws, drop_prob = (1, 2, 13, 200), 20_000, 0.3
    labels = torch.arange(4).repeat_interleave(torch.tensor(sizes))[None]
    keep = draw_keep_table((draws, 1, 4), drop_prob, draw=partial(draw_uniform, shift=shift))
    dropped = cluster_drop(torch.ones(1, 1, 1).expand(draws, 1, sum(sizes)), labels, keep) == 0
    error = math.sqrt(drop_prob * (1 - drop_prob) / draws)
    assert (dropped.float().mean(0) - drop_prob).abs().max() < 4 * error


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_all_clusters_dropped_give_zeros_forward_and_backward(dtype):
    x, labels, keep = make_problem()
    x = x.to(dtype).requires_grad_()
    out = cluster_drop(x, labels, torch.zeros_like(keep))
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert not out.any()
    assert not grad.any()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_drop_prob_zero_is_the_identity_to_the_last_bit(dtype):
    x, labels, keep = make_problem()
    x = x.to(dtype)
    x.flatten()[:3] = torch.tensor([-0.0, torch.inf, -torch.inf])
    out = cluster_drop(x, labels, draw_keep_table(tuple(keep.shape), 0.0))
    assert torch.equal(out.view(torch.uint8), x.view(torch.uint8))


@pytest.mark.parametrize("scale", [None, 1.5])
def test_backward_keeps_only_table_labels_and_a_scalar(scale):
    x, labels, keep = make_problem(samples=4, channels=8, spatial=(16, 16), clusters=5)
    labels, saved = labels.byte(), []
    with saved_tensors_hooks(lambda tensor: saved.append(tensor.nbytes) or tensor, lambda tensor: tensor):
        cluster_drop(x.requires_grad_(), labels, keep, scale=scale)
    assert sum(saved) == labels.nbytes + keep.nbytes + 4


def test_a_scale_given_as_tensor_equals_the_number():
    problem = make_problem()
    assert torch.equal(cluster_drop(*problem, scale=torch.tensor(1.25)), cluster_drop(*problem, scale=1.25))


def test_sizes_counted_before_give_the_same_result():
    x, labels, keep = make_problem()
    sizes = cluster_sizes(labels, *keep.shape[1:])
    assert torch.equal(cluster_drop(x, labels, keep, sizes=sizes), cluster_drop(x, labels, keep))


def test_other_spatial_sizes_drop_and_rescale_by_the_resized_labels():
    _, labels, keep = make_problem(spatial=(3, 5))
    larger = torch.ones(3, 4, 7, 8)
    resized = interpolate(labels[None].double(), size=(7, 8), mode="nearest")[0].long()
    out = cluster_drop(larger, labels, keep, sizes=cluster_sizes(labels, 4, 3))
    mask = naive_mask(larger, resized, keep)
    torch.testing.assert_close(out, mask * mask.numel() / mask.sum())


def test_the_shift_adds_to_the_uniform_draw_modulo_one():
    torch.manual_seed(3)
    uniform = torch.rand(50, 4, 5)
    torch.manual_seed(3)
    keep = draw_keep_table((50, 4, 5), 0.4, draw=partial(draw_uniform, shift=0.618))
    assert torch.equal(keep, (uniform + 0.618).frac() >= 0.4)


def test_ranks_seeded_alike_draw_apart():
    tables = []
    for rank in range(3):
        torch.manual_seed(0)
        tables.append(draw_keep_table((8, 4, 16), 0.5, draw=partial(draw_uniform, shift=rank * 0.618 % 1.0)))
    for one, other in itertools.combinations(tables, 2):
        assert 0.1 < (one == other).float().mean() < 0.9


def test_a_drop_prob_given_as_tensor_draws_the_same():
    torch.manual_seed(0)
    by_number = draw_keep_table((5, 4, 3), 0.25)
    torch.manual_seed(0)
    assert torch.equal(draw_keep_table((5, 4, 3), torch.tensor(0.25)), by_number)


@pytest.mark.parametrize("scope", SCOPES)
def test_compiled_equals_eager_without_a_graph_break(scope):
    torch.compiler.reset()
    x, labels, keep = make_problem(scope)
    compiled = torch.compile(cluster_drop, fullgraph=True, backend="aot_eager")
    results = []
    for function in (cluster_drop, compiled):
        leaf = x.clone().requires_grad_()
        out = function(leaf, labels, keep)
        out.pow(2).sum().backward()
        results.append((out.detach(), leaf.grad))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_in_place_changes_nothing_but_memory(memory_format):
    conv = torch.nn.Conv2d(2, 3, 3)
    images = torch.randn(5, 2, 9, 8).to(memory_format=memory_format)
    labels, keep = torch.randint(4, (3, 7, 6)), torch.rand(5, 3, 4) > 0.5
    results = []
    for inplace in (False, True):
        x = conv(images)
        out = cluster_drop(x, labels, keep, inplace=inplace)
        assert (out.data_ptr() == x.data_ptr()) == inplace
        conv.zero_grad()
        out.square().sum().backward()
        results.append((out.detach(), conv.weight.grad.clone()))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def make_x(samples=4, seed=0):
    return torch.randn(samples, 2, 6, 6, generator=torch.Generator().manual_seed(seed))


def test_eval_mode_is_the_identity():
    x = make_x()
    assert ClusterDrop(LABELS, 0.5).eval()(x) is x


def test_a_module_with_drop_prob_zero_is_the_identity():
    x = make_x()
    assert torch.equal(ClusterDrop(LABELS, 0.0)(x), x)
    assert torch.equal(ClusterDrop(LABELS, 0.0, rescale="expected")(x), x)
    assert torch.equal(ClusterDrop(LABELS, 0.0, fill="mean")(x), x)


@pytest.mark.parametrize("per_map", [True, False])
@pytest.mark.parametrize("per_sample", [True, False])
def test_forwards_to_the_function_with_a_draw_of_its_own(per_map, per_sample):
    x, drop = make_x(), ClusterDrop(LABELS, 0.4, per_map=per_map, per_sample=per_sample)
    torch.manual_seed(5)
    out = drop(x)
    torch.manual_seed(5)
    keep = draw_keep_table((4 if per_sample else 1, 2 if per_map else 1, 7), 0.4)
    scale = None if per_map or per_sample else 1 / 0.6
    torch.testing.assert_close(out, cluster_drop(x, LABELS, keep, scale=scale), rtol=1e-6, atol=0)


@pytest.mark.parametrize("per_map", [True, False])
@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize("rescale", ["batch", "expected"])
def test_filling_with_the_mean_divides_by_the_keep_probability(per_map, per_sample, rescale):
    options = {"per_map": per_map, "per_sample": per_sample, "rescale": rescale}
    x, drop = make_x(), ClusterDrop(LABELS, 0.4, fill="mean", **options)
    torch.manual_seed(5)
    out = drop(x)
    torch.manual_seed(5)
    keep = draw_keep_table((4 if per_sample else 1, 2 if per_map else 1, 7), 0.4)
    assert torch.equal(out, cluster_drop(x, LABELS, keep, fill="mean", scale=1 / torch.tensor(0.6)))
    assert "fill='mean'" in repr(drop)


def test_halves_of_a_paired_batch_go_to_the_means_of_other_clusters():
    x = make_x(3).repeat(2, 1, 1, 1)
    first, second = (ClusterDrop(LABELS, 0.5, fill="mean", paired=True)(x) - x).chunk(2)
    torch.testing.assert_close(first, -second)  # scaled by two where the other has the mean


def test_without_per_sample_all_samples_drop_alike():
    dropped = ClusterDrop(LABELS, 0.5, per_sample=False)(torch.ones(4, 2, 6, 6)) == 0
    assert dropped.any()
    assert torch.equal(dropped, dropped[:1].expand_as(dropped))


def test_one_draw_for_all_is_scaled_by_what_is_expected():
    """The ratio of a single draw would depend on it, and the mean of outputs would not be the input."""
    drop = ClusterDrop(LABELS, 0.75, per_map=False, per_sample=False)
    assert {*torch.stack([drop(torch.ones(4, 2, 6, 6)) for _ in range(20)]).unique().tolist()} == {0.0, 4.0}


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_highest_probability_of_each_type_scales_to_finite_values(dtype):
    drop = ClusterDrop(LABELS, rescale="expected").to(dtype)
    drop.set_drop_prob(1 - 1e-9)
    assert drop(torch.ones(4, 2, 6, 6, dtype=dtype)).isfinite().all()


def test_labels_of_whole_maps_are_not_taken_for_a_grid_of_one_token():
    with pytest.raises(ValueError, match="do not fit activations"):
        ClusterDrop(LABELS[:, :1, :1], channel_dim=-1)(torch.ones(4, 17, 2))


def test_halves_of_a_paired_batch_drop_what_the_other_keeps():
    first, second = (ClusterDrop(LABELS, 0.5, paired=True)(torch.ones(6, 2, 6, 6)) == 0).chunk(2)
    assert torch.equal(first, ~second)
    with pytest.raises(ValueError, match="paired=True: needs per_sample=True, got per_sample=False"):
        ClusterDrop(LABELS, 0.5, paired=True, per_sample=False)
    with pytest.raises(ValueError, match="paired=True: must have an even batch"):
        ClusterDrop(LABELS, 0.5, paired=True)(torch.ones(3, 2, 6, 6))


@pytest.mark.parametrize("per_map", [True, False])
def test_each_feature_drops_with_drop_prob(per_map):
    torch.manual_seed(0)
    draws = 20_000
    drop = ClusterDrop(torch.tensor([[0, 1, 1, 1], [1, 1, 0, 1]]), 0.2, per_map=per_map)
    rate = (drop(torch.ones(draws, 2, 4)) == 0).float().mean(0)
    assert (rate - 0.2).abs().max() < 4 * math.sqrt(0.2 * 0.8 / draws)


def test_batch_rescaling_keeps_the_sum_of_ones():
    torch.manual_seed(0)
    x = torch.ones(4, 2, 6, 6)
    torch.testing.assert_close(ClusterDrop(LABELS, 0.4)(x).sum(), x.sum())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_batch_rescaling_is_as_exact_in_half_precision(dtype):
    labels = (torch.arange(70_000) > 3000).int()[None]  # half precision holds neither size
    torch.manual_seed(0)
    scales = ClusterDrop(labels, 0.5).to(dtype)(torch.ones(8, 1, 70_000, dtype=dtype)).unique()
    torch.manual_seed(0)
    assert torch.equal(scales, ClusterDrop(labels, 0.5)(torch.ones(8, 1, 70_000)).unique().to(dtype))


def test_expected_rescaling_divides_by_the_keep_probability():
    torch.manual_seed(0)
    out = ClusterDrop(LABELS, 0.2, rescale="expected")(torch.ones(4, 2, 6, 6))
    assert out.unique().tolist() == [0.0, 1.25]


@pytest.mark.parametrize(
    "options", [{"rescale": "batch"}, {"rescale": "expected"}, {"fill": "mean"}], ids=str
)
def test_activation_checkpointing_gives_the_same_gradients(options):
    conv, drop = torch.nn.Conv2d(2, 2, 3, padding=1), ClusterDrop(LABELS, 0.4, **options)

    def block(x):
        return drop(conv(x)).relu()

    gradients = []
    for run in (block, lambda x: checkpoint(block, x, use_reentrant=False)):
        conv.zero_grad()
        torch.manual_seed(7)
        run(make_x()).pow(2).sum().backward()
        gradients.append([parameter.grad.clone() for parameter in conv.parameters()])
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("fill", ["zero", "mean"])
def test_new_labels_and_drop_prob_do_not_recompile(fill):
    torch.compiler.reset()
    drop = ClusterDrop(LABELS, 0.4, fill=fill)
    compiled = torch.compile(drop, fullgraph=True, backend="aot_eager")
    compiled(make_x())
    drop.set_labels(LABELS.flip(2))
    drop.set_drop_prob(0.0)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(compiled(make_x()), make_x())


def test_new_labels_are_written_in_place_and_used():
    drop = ClusterDrop(LABELS, 0.4)
    address = drop.labels.data_ptr()
    drop.set_labels(LABELS.flip(2))
    assert drop.labels.data_ptr() == address
    torch.manual_seed(2)
    out = drop(make_x())
    torch.manual_seed(2)
    assert torch.equal(out, ClusterDrop(LABELS.flip(2), 0.4)(make_x()))


def test_room_for_more_clusters_leaves_the_drop_rate_alone():
    torch.manual_seed(0)
    drop = ClusterDrop(torch.tensor([[0, 0, 1]]), 0.3, num_clusters=50)
    rate = (drop(torch.ones(20_000, 1, 3)) == 0).float().mean()
    assert abs(rate - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 20_000)
    assert drop.can_hold(torch.tensor([[0, 49, 1]]))
    assert not drop.can_hold(torch.tensor([[0, 50, 1]]))
    assert not drop.can_hold(torch.tensor([[0, 1]]))


@pytest.mark.parametrize("clusters", [1, 256, 257, 32768])
def test_as_many_clusters_as_its_integer_type_holds(clusters):
    labels = torch.arange(clusters)[None]
    drop = ClusterDrop(labels, 0.5)
    assert torch.equal(drop.labels.long(), labels)
    assert drop.labels.dtype == smallest_integer_type(clusters)
    assert drop.can_hold(labels)


def test_state_goes_through_a_state_dict():
    drop, other = ClusterDrop(LABELS, 0.4), ClusterDrop(torch.zeros_like(LABELS), 0.4, num_clusters=7)
    other.load_state_dict(drop.state_dict())
    torch.manual_seed(2)
    out = drop(make_x())
    torch.manual_seed(2)
    assert torch.equal(other(make_x()), out)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rescale": "none"}, "rescale='none': must be one of batch, expected"),
        ({"fill": "noise"}, "fill='noise': must be one of zero, mean"),
        ({"drop_prob": 1.0}, r"drop_prob=1.0: must be a number in \[0, 1\)"),
        ({"drop_prob": -0.1}, r"drop_prob=-0.1: must be a number in \[0, 1\)"),
        ({"drop_prob": math.nan}, "drop_prob=nan"),
        ({"num_clusters": 3}, r"labels in \[0, 6\]: must be in \[0, 3\)"),
    ],
)
def test_arguments_out_of_range_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        ClusterDrop(LABELS, **settings)


def test_labels_that_do_not_fit_raise_and_change_nothing():
    drop = ClusterDrop(LABELS)
    for wrong in (LABELS[:1], LABELS - 1, LABELS + 1):
        with pytest.raises(ValueError, match="must be"):
            drop.set_labels(wrong)
    assert torch.equal(drop.labels.long(), LABELS)


def test_repr_shows_the_settings():
    assert "drop_prob=0.15, labels=(2, 6, 6), num_clusters=7" in repr(ClusterDrop(LABELS))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"per_sample": "no"}, "per_sample='no': must be True or False"),
        ({"per_map": 1}, "per_map=1: must be True or False"),
        ({"inplace": None}, "inplace=None: must be True or False"),
        ({"num_clusters": 7.5}, "num_clusters=7.5: must be an integer"),
    ],
)
def test_arguments_of_a_wrong_type_raise(settings, message):
    with pytest.raises(TypeError, match=message):
        ClusterDrop(LABELS, **settings)


def test_labels_of_nothing_raise():
    with pytest.raises(ValueError, match=r"labels of shape \(2, 0\): must be \(C or 1, \*spatial\)"):
        ClusterDrop(LABELS[:, :0, 0])
