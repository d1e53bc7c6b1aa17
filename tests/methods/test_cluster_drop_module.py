import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lightning_dropcluster.functional import cluster_drop, draw_keep_table
from lightning_dropcluster.methods import ClusterDrop
from lightning_dropcluster.methods.label_tables import smallest_integer_type

LABELS = torch.arange(2 * 6 * 6).reshape(2, 6, 6) % 7


def make_x(samples=4, seed=0):
    return torch.randn(samples, 2, 6, 6, generator=torch.Generator().manual_seed(seed))


def test_eval_mode_is_the_identity():
    x = make_x()
    assert ClusterDrop(LABELS, 0.5).eval()(x) is x


def test_drop_prob_zero_is_the_identity_to_the_last_bit():
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
    assert torch.equal(out, cluster_drop(x, LABELS, keep))


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


@pytest.mark.parametrize(
    ("count", "dtype"),
    [(1, torch.uint8), (256, torch.uint8), (257, torch.int16), (32768, torch.int16), (32769, torch.int32)],
)
def test_the_smallest_type_holds_the_largest_label(count, dtype):
    assert smallest_integer_type(count) == dtype
    assert torch.tensor(count - 1, dtype=dtype).item() == count - 1


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
