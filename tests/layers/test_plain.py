"""Tensor types of other libraries, and torch.func's: sketches and regularisers see what is inside."""

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, functionalize, grad, hessian, jvp, vmap

from lightning_dropcluster.layers.hooks import LayerHook
from lightning_dropcluster.layers.plain import NotSeen, apply_plainly, as_plain, has_own_arithmetic, see
from lightning_dropcluster.learning.sketch import Sketch

X = torch.randn(5, 3, 6, generator=torch.Generator().manual_seed(0))


class Tagged(Tensor):
    """Like MONAI's MetaTensor: what it meets it keeps, and some functions fail on it."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (Tensor.__getitem__, Tensor.split, Tensor.mul, Tensor.sub, Tensor.reshape):
            raise RuntimeError(f"no {func.__name__} of what is tagged")
        made = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(made, cls):
            made.tag = next(x.tag for x in args if isinstance(x, Tagged))
        return made


def tagged(x: Tensor, tag: str = "a") -> Tagged:
    made = x.as_subclass(Tagged)
    made.tag = tag
    return made


class Halve(nn.Module):
    def forward(self, x):
        assert type(x) is Tensor
        return x.reshape(x.shape) * 0.5


def test_types_of_torch_itself_stay_as_they_are():
    for x in (X, nn.Parameter(X)):
        assert not has_own_arithmetic(x)
        assert as_plain(x) is x
    with torch.device("meta"):  # a mode looks at all functions, too
        assert as_plain(X) is X


def test_a_plain_tensor_shares_the_memory():
    plain = as_plain(tagged(X))
    assert type(plain) is Tensor
    assert plain.data_ptr() == X.data_ptr()


def test_what_a_function_makes_is_of_the_users_type_and_has_its_tag():
    x = X.clone().requires_grad_()
    made = apply_plainly(Halve(), tagged(x, "b"))
    assert (type(made), made.tag) == (Tagged, "b")
    as_plain(made).sum().backward()
    assert torch.equal(x.grad, torch.full_like(X, 0.5))


def test_a_hook_gathers_and_regularises_plain_values():
    layer = nn.Identity()
    hook, expected = LayerHook("layer", layer, Halve()), Sketch((3, 6), num_samples=8, sketch_dim=4)
    hook.sketch, hook.first_call = Sketch((3, 6), num_samples=8, sketch_dim=4), True
    layer.register_forward_hook(hook)
    made = layer(tagged(X))
    assert torch.equal(as_plain(made), 0.5 * X)
    assert made.tag == "a"
    expected.update(X)
    assert torch.equal(hook.sketch.moments, expected.moments)


def seen_in(run) -> list[Tensor]:
    """Run with a layer whose outputs are looked at, and return what was seen."""
    layer, seen = nn.Linear(6, 6), []
    with torch.no_grad():
        layer.weight.copy_(torch.eye(6))
        layer.bias.zero_()
    layer.register_forward_hook(lambda module, args, output: see(output, lambda x: seen.append(x.clone())))
    run(layer, dict(layer.named_parameters()))
    return seen


def loss(layer, weights, x):
    return functional_call(layer, weights, (x[None],)).square().sum()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own jvp uses it
@pytest.mark.parametrize(
    "run",
    [
        lambda layer, weights: layer(X),
        lambda layer, weights: grad(lambda w: loss(layer, w, X))(weights),
        lambda layer, weights: vmap(lambda x: layer(x[None]))(X),
        lambda layer, weights: vmap(grad(loss, 1), in_dims=(None, None, 0))(layer, weights, X),
        lambda layer, weights: vmap(lambda x: layer(x[None]), in_dims=2)(X.movedim(0, 2)),
        lambda layer, weights: grad(lambda w: vmap(lambda x: loss(layer, w, x))(X).sum())(weights),
        lambda layer, weights: jvp(layer, (X,), (X,)),
        lambda layer, weights: hessian(lambda x: layer(x).square().sum())(X),
    ],
    ids=["none", "grad", "vmap", "vmap of grad", "vmap over another", "grad of vmap", "jvp", "hessian"],
)
def test_values_are_seen_through_the_transforms_of_torch_func(run):
    (seen,) = seen_in(run)
    assert not seen.requires_grad
    assert torch.equal(seen.reshape(X.shape), X)


def test_nested_maps_are_a_batch_of_all_that_they_map_over():
    (seen,) = seen_in(lambda layer, weights: vmap(vmap(lambda x: layer(x[None])))(X))
    assert torch.equal(seen, X.reshape(15, 6))


def test_where_a_transform_hides_the_values_nobody_looks():
    with pytest.raises(NotSeen, match="Functionalize"):
        seen_in(lambda layer, weights: functionalize(layer)(X))


def test_a_hook_under_such_a_transform_lets_training_go_on():
    layer = nn.Identity()
    hook = LayerHook("layer", layer, None)
    hook.sketch, hook.first_call = Sketch((3, 6)), True
    layer.register_forward_hook(hook)
    assert torch.equal(functionalize(layer)(X), X)
    assert hook.sketch is None
    assert isinstance(hook.gather_error, NotSeen)


def test_errors_of_the_one_who_looks_pass():
    with pytest.raises(ZeroDivisionError):
        see(X, lambda x: 1 / 0)
