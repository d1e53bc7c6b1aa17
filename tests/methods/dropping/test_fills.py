"""The fills under the transforms of torch.func, whichever of their arguments are batched."""

import itertools

import pytest
import torch
from problems import SCOPES, make_problem
from torch import nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap

from lightning_dropcluster import ClusterDrop
from lightning_dropcluster.functional import cluster_drop

FILLS = ("zero", "mean")
# Forward mode makes torch script some of its own decompositions.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")


def make_batch(scope="map", count=5):
    """Several problems, stacked: activations, labels, keep tables, scales."""
    problems = [make_problem(scope, seed=seed) for seed in range(count)]
    return [torch.stack(parts) for parts in zip(*problems, strict=True)] + [torch.linspace(0.5, 2.0, count)]


@pytest.mark.parametrize("batched", list(itertools.product([True, False], repeat=4))[:-1], ids=str)
@pytest.mark.parametrize("fill", FILLS)
def test_vmap_equals_a_loop_over_whatever_is_batched(fill, batched):
    arguments = [each if take else each[0] for each, take in zip(make_batch(), batched, strict=True)]

    def gradient(x, labels, keep, scale):
        return grad(lambda x: cluster_drop(x, labels, keep, fill=fill, scale=scale).pow(3).sum())(x)

    together = vmap(gradient, tuple(0 if take else None for take in batched))(*arguments)
    for i, made in enumerate(together):
        one = [each[i] if take else each for each, take in zip(arguments, batched, strict=True)]
        torch.testing.assert_close(made, gradient(*one))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("fill", FILLS)
def test_forward_mode_applies_the_map_to_the_tangent(fill, scope, inplace):
    x, labels, keep = make_problem(scope)
    tangent = torch.randn_like(x)

    def drop(x):
        return cluster_drop(x.clone(), labels, keep, fill=fill, inplace=inplace)

    out, moved = jvp(drop, (x,), (tangent,))
    assert torch.equal(out, drop(x))
    assert torch.equal(moved, drop(tangent))
    assert torch.equal(vjp(drop, x)[1](tangent)[0], drop(tangent))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("fill", FILLS)
def test_transforms_nest(fill, inplace):
    x, labels, keep = (
        part.double() if part.is_floating_point() else part for part in make_problem(samples=1)
    )

    def loss(x):
        return cluster_drop(x**2, labels, keep, fill=fill, inplace=inplace).pow(2).sum()

    torch.testing.assert_close(hessian(loss)(x), jacrev(jacrev(loss))(x))


@pytest.mark.parametrize("fill", FILLS)
def test_vmap_over_draws_alone_leaves_the_activation_as_it_is(fill):
    x, labels, keep = make_problem()
    before = x.clone()
    tables = torch.stack([keep, ~keep])
    drop = vmap(lambda keep: cluster_drop(x, labels, keep, fill=fill, inplace=True))
    expected = [cluster_drop(x, labels, table, fill=fill) for table in tables]
    torch.testing.assert_close(drop(tables), torch.stack(expected))
    assert torch.equal(x, before)


@pytest.mark.parametrize("fill", FILLS)
def test_gradients_of_samples_through_a_hooked_model(fill):
    conv, drop = nn.Conv2d(2, 3, 3), ClusterDrop(torch.randint(4, (3, 4, 4)), 0.5, fill=fill, inplace=True)
    conv.register_forward_hook(lambda module, args, output: drop(output))
    model = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(48, 3))
    parameters, images = dict(model.named_parameters()), torch.randn(6, 2, 6, 6)

    def loss(parameters, image, label):
        return nn.functional.cross_entropy(functional_call(model, parameters, (image[None],)), label[None])

    labels, gradients = torch.arange(6) % 3, {}
    for randomness in ("same", "different"):
        torch.manual_seed(0)
        each = vmap(grad(loss), (None, 0, 0), randomness=randomness)(parameters, images, labels)
        gradients[randomness] = each["0.weight"]
    torch.manual_seed(0)
    first = grad(loss)(parameters, images[0], labels[0])["0.weight"]
    torch.testing.assert_close(gradients["same"][0], first)
    assert not torch.equal(gradients["same"], gradients["different"])
