import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import FLOATS, SCOPES, SPATIAL, in_each_memory_format, make_problem, problems
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_dropcluster.functional import cluster_drop, resize_labels
from lightning_dropcluster.methods.dropping import cluster_means

SCALES = st.floats(0.5, 4.0, width=32)


def fill(x, labels, keep, **options):
    return cluster_drop(x, labels, keep, fill="mean", **options)


def members(x, labels):
    """Yield (n, c, label, which cells of that map carry it)."""
    labels = labels.expand(x.shape[1:])
    for n, c in itertools.product(*map(range, x.shape[:2])):
        for label in labels[c].unique().tolist():
            yield n, c, label, labels[c] == label


def naive(x, labels, keep, scale):
    out = x.double().clone()
    for n, c, label, cells in members(x, labels):
        mean = out[n, c][cells].mean()
        kept = keep[min(n, len(keep) - 1), min(c, keep.shape[1] - 1), label]
        out[n, c][cells] = mean + (out[n, c][cells] - mean) * kept * scale
    return out


@given(problems(), SCALES, st.sampled_from(FLOATS))
@settings(max_examples=100)
def test_equals_the_naive_loop_but_for_rounding_once(problem, scale, dtype):
    x, labels, keep = problem
    out = fill(x.to(dtype), labels, keep, scale=scale)
    exact = torch.finfo(dtype).eps / 2 + 2e-6
    torch.testing.assert_close(out.double(), naive(x.to(dtype), labels, keep, scale), rtol=exact, atol=4e-6)


@given(problems(), SCALES)
def test_leaves_the_mean_of_each_cluster_as_it_is(problem, scale):
    x, labels, keep = problem
    out = fill(x, labels, keep, scale=scale)
    for n, c, _, cells in members(x, labels):
        torch.testing.assert_close(out[n, c][cells].mean(), x[n, c][cells].mean(), rtol=0, atol=1e-5)


@given(problems(), st.sampled_from(FLOATS))
def test_all_dropped_leaves_the_means_alone(problem, dtype):
    x, labels, keep = problem
    out = fill(x.to(dtype), labels, torch.zeros_like(keep), scale=2.0)
    assert all(len(out[n, c][cells].unique()) == 1 for n, c, _, cells in members(x, labels))
    assert torch.equal(out, fill(x.to(dtype), labels, torch.zeros_like(keep)))


@given(problems(), st.sampled_from(FLOATS))
def test_all_kept_and_not_scaled_is_the_identity_to_the_last_bit(problem, dtype):
    x, labels, keep = problem
    assert torch.equal(fill(x.to(dtype), labels, torch.ones_like(keep)), x.to(dtype))


@given(problems(), SCALES, st.sampled_from(FLOATS))
def test_clusters_of_equal_features_stay_to_the_last_bit(problem, scale, dtype):
    x, labels, keep = problem
    for n, c, _, cells in members(x, labels):
        x[n, c][cells] = x[n, c][cells][0].clone()
    x = x.to(dtype)
    assert torch.equal(fill(x, labels, keep, scale=scale), x)


@pytest.mark.parametrize(("groups", "channels"), [(1, 1), (1, 4), (4, 4)])
@pytest.mark.parametrize("spatial", [(1, 1), (3, 4), ()])
def test_clusters_of_one_feature_stay_to_the_last_bit(spatial, groups, channels):
    x, _, _ = make_problem(channels=channels, spatial=spatial)
    labels = torch.arange(x[0].numel()).reshape(x.shape[1:]) % (x[0].numel() // groups)
    keep = torch.rand(3, groups, int(labels.max()) + 1) > 0.5
    assert torch.equal(fill(x, labels, keep, scale=1 / 0.3), x)


def test_a_mean_over_many_is_as_exact_as_the_type():
    x = (1.0 + torch.rand(2, 1, 100, 100)).bfloat16()
    out = fill(x, torch.zeros(1, 100, 100, dtype=torch.uint8), torch.zeros(2, 1, 1, dtype=torch.bool))
    mean = x.double().mean((1, 2, 3), keepdim=True).bfloat16()
    assert torch.equal(out, mean.expand_as(x))


@pytest.mark.parametrize("scope", SCOPES)
def test_the_expectation_over_draws_is_the_activation(scope):
    x, labels, keep = make_problem(scope, samples=1, channels=2, clusters=3)
    x, keep_prob, expected = x.double(), 0.3, torch.zeros_like(x).double()
    for drawn in itertools.product((False, True), repeat=keep.shape[1] * 3):
        table = torch.tensor(drawn).view(1, -1, 3)
        chance = keep_prob ** sum(drawn) * (1 - keep_prob) ** (len(drawn) - sum(drawn))
        expected += chance * fill(x, labels, table, scale=torch.tensor(1 / keep_prob).double())
    torch.testing.assert_close(expected, x)


@given(problems(), SCALES)
def test_is_its_own_adjoint(problem, scale):
    x, labels, keep = problem
    x, other = x.double(), torch.randn_like(x).double()
    scale = torch.tensor(scale, dtype=torch.float64)
    one, two = (x * fill(other, labels, keep, scale=scale)), (other * fill(x, labels, keep, scale=scale))
    torch.testing.assert_close(one.sum(), two.sum())


# Forward mode makes torch script some of its own decompositions.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")
@pytest.mark.parametrize("drawn", [1, 2])
@pytest.mark.parametrize("scope", SCOPES)
def test_first_and_second_derivatives_are_exact(scope, drawn):
    x, labels, keep = make_problem(scope, samples=2, channels=2, spatial=(2, 3), drawn=drawn)
    x = x.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: fill(x**3, labels, keep), x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda x: fill(x**3, labels, keep), x)


@pytest.mark.parametrize("scope", SCOPES)
def test_backward_keeps_only_table_labels_and_a_scalar(scope):
    x, labels, keep = make_problem(scope, samples=4, channels=8, spatial=(16, 16), clusters=5)
    labels, saved = labels.byte(), []
    with saved_tensors_hooks(lambda tensor: saved.append(tensor.nbytes) or tensor, lambda tensor: tensor):
        fill(x.requires_grad_(), labels, keep)
    assert sum(saved) == labels.nbytes + keep.nbytes + 4


@pytest.mark.parametrize("drawn", [1, 3])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("scope", ["map", "position"])
@in_each_memory_format
def test_keeps_dtype_and_memory_format_forward_and_backward(spatial, layout, scope, dtype, drawn):
    x, labels, keep = make_problem(scope, spatial=spatial, drawn=drawn)
    x = x.to(dtype).contiguous(memory_format=layout).requires_grad_()
    out = fill(x, labels, keep)
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
    for made in (out, grad):
        assert (made.dtype, made.device, made.stride()) == (x.dtype, x.device, x.stride())
    torch.testing.assert_close(out, fill(x.contiguous(), labels, keep), rtol=0, atol=0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("drawn", [1, 7])
def test_slices_change_nothing(scope, layout, drawn, monkeypatch):
    x, labels, keep = make_problem(scope, samples=7, channels=5, spatial=(4, 3), drawn=drawn)
    x = x.contiguous(memory_format=layout)
    whole = fill(x, labels, keep)
    monkeypatch.setattr(cluster_means, "_SLICES", {"cpu": (48, 24)})
    monkeypatch.setattr(cluster_means, "_LANES", 2)
    monkeypatch.setattr(cluster_means, "_SHARED", {"cpu": 120})
    assert torch.equal(fill(x, labels, keep), whole)
    assert torch.equal(fill(x.clone(), labels, keep, inplace=True), whole)


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that is made."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        tensors = [part for part in tree_leaves(made) if isinstance(part, torch.Tensor)]
        self.size = max([self.size, *(tensor.numel() for tensor in tensors)])
        return made


def test_clusters_of_a_layer_need_no_table_larger_than_the_activation():
    x, labels, keep = make_problem("layer", samples=40, channels=8, spatial=(2, 2), clusters=32)
    with LargestTensor() as largest:
        fill(x, labels, keep[:1], scale=1.5)
    assert largest.size == x.numel()


@pytest.mark.parametrize("spatial", SPATIAL, ids=["1d", "2d", "3d"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64], ids=str)
def test_labels_of_any_type_are_resized_to_other_sizes(spatial, dtype):
    _, labels, keep = make_problem(spatial=spatial)
    larger = torch.randn(3, 4, *(2 * size + 1 for size in spatial))
    out = fill(larger, labels.to(dtype), keep, scale=1.5)
    torch.testing.assert_close(
        out.double(), naive(larger, resize_labels(labels, larger.shape[2:]), keep, 1.5), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4)])
def test_takes_activations_without_features(shape):
    labels, keep = torch.zeros(shape[1:], dtype=torch.uint8), torch.ones(shape[0], shape[1], 2).bool()
    assert fill(torch.ones(shape), labels, keep).shape == shape


def test_what_is_not_finite_stays_in_its_cluster():
    x, labels, keep = make_problem(clusters=3)
    x[0, 0][labels[0] == 1] = torch.nan
    out = fill(x, labels, keep)
    assert torch.equal(out.isnan(), x.isnan())


def test_takes_activations_that_are_not_contiguous_and_leaves_them_alone():
    x, labels, keep = make_problem()
    strided = torch.stack([x, x], dim=-1)[..., 0]
    assert torch.equal(fill(strided, labels, keep), fill(x, labels, keep))
    assert torch.equal(strided, x)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_in_place_changes_nothing_but_memory(layout):
    conv, results = torch.nn.Conv2d(2, 3, 3), []
    images = torch.randn(5, 2, 9, 8).to(memory_format=layout)
    labels, keep = torch.randint(4, (3, 7, 6)), torch.rand(5, 3, 4) > 0.5
    for inplace in (False, True):
        x = conv(images)
        out = fill(x, labels, keep, inplace=inplace)
        assert (out.data_ptr() == x.data_ptr()) == inplace
        conv.zero_grad()
        out.square().sum().backward()
        results.append((out.detach(), conv.weight.grad.clone()))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_autocast_changes_nothing():
    x, labels, keep = make_problem()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fill(x, labels, keep), fill(x, labels, keep))
        assert fill(x.bfloat16(), labels, keep).dtype == torch.bfloat16


def test_refuses_another_fill():
    with pytest.raises(ValueError, match="fill='median': must be one of zero, mean"):
        cluster_drop(*make_problem(), fill="median")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("scope", SCOPES)
def test_compiled_equals_eager_without_a_graph_break(scope, layout):
    torch.compiler.reset()
    x, labels, keep = make_problem(scope)
    compiled, results = torch.compile(fill, fullgraph=True, backend="aot_eager"), []
    for function in (fill, compiled):
        leaf = x.clone(memory_format=layout).requires_grad_()
        out = function(leaf, labels, keep)
        out.pow(2).sum().backward()
        assert out.stride() == leaf.stride()
        results.append((out.detach(), leaf.grad))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("method", ["zero", "mean"])
def test_compiled_code_saves_nothing_of_the_size_of_the_activation(method):
    torch.compiler.reset()
    x, labels, keep = make_problem(samples=64, channels=2, spatial=(8, 8), clusters=4)
    saved = []

    def note(graph, _):
        outputs = next(iter(reversed(graph.graph.nodes))).args[0]
        saved.extend(node.meta["val"].numel() for node in outputs[1:] if node is not None)
        return make_boxed_func(graph.forward)

    def loss(x):
        return cluster_drop(x, labels, keep, fill=method).sum()

    compiled = torch.compile(loss, fullgraph=True, backend=aot_autograd(fw_compiler=note))
    compiled(x.requires_grad_()).backward()
    assert saved
    assert max(saved) <= max(keep.numel(), labels.numel())
