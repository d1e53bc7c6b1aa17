"""The hook of a layer: what it gathers, and what it leaves to the regulariser."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_dropcluster.layers.hooks import LayerHook
from lightning_dropcluster.learning.sketch import Sketch


class Double(nn.Module):
    def forward(self, x):
        return 2 * x


def make_layer(regularizer=None):
    """Return a layer that hands on what it is given, in the first call of a step, and its hook."""
    layer = nn.Identity()
    hook = LayerHook("layer", layer, regularizer)
    hook.sketch, hook.first_call = Sketch((2, 4), num_samples=8, sketch_dim=4), True
    layer.register_forward_hook(hook)
    return layer, hook


def test_inactive_is_the_identity_that_still_gathers():
    (layer, hook), x = make_layer(Double()), torch.randn(3, 2, 4)
    hook.active = False
    assert layer(x) is x
    assert hook.shape == (2, 4)
    assert hook.sketch.count == 3


@pytest.mark.parametrize(("regularizer", "factor"), [(None, 1), (Double(), 2)])
def test_hands_the_activation_to_the_regulariser(regularizer, factor):
    (layer, _), x = make_layer(regularizer), torch.randn(3, 2, 4)
    assert torch.equal(layer(x), factor * x)


def test_gathers_what_the_layer_made_and_not_what_the_regulariser_made_of_it():
    (layer, hook), x = make_layer(Double()), torch.randn(3, 2, 4)
    layer(x)
    alone = Sketch((2, 4), num_samples=8, sketch_dim=4)
    alone.update(x)
    assert torch.equal(hook.sketch.moments, alone.moments)


def test_gathers_the_first_call_of_each_step_alone():
    layer, hook = make_layer()
    for count in (3, 6):
        hook.first_call = True
        layer(torch.randn(3, 2, 4))
        layer(torch.randn(3, 2, 4))
        assert hook.sketch.count == count


def test_later_calls_of_a_step_are_regularised_and_leave_the_shape_alone():
    layer, hook = make_layer(Double())
    layer(torch.randn(3, 2, 4))
    x = torch.randn(3, 2, 7)
    assert torch.equal(layer(x), 2 * x)
    assert hook.shape == (2, 4)


@pytest.mark.parametrize(("channels", "noted"), [(2, None), (5, 5)])
def test_another_number_of_channels_in_a_later_call_is_noted(channels, noted):
    layer, hook = make_layer()
    layer(torch.randn(3, 2, 4))
    assert hook.other_channels is None
    layer(torch.randn(3, channels, 4))
    assert hook.other_channels == noted


def test_another_size_is_noted_and_not_gathered():
    layer, hook = make_layer()
    layer(torch.randn(3, 2, 5))
    assert hook.shape == (2, 5)
    assert hook.sketch.count == 0


def test_without_a_sketch_it_only_regularises():
    (layer, hook), x = make_layer(Double()), torch.randn(3, 2, 4)
    hook.sketch = None
    assert torch.equal(layer(x), 2 * x)


def test_eval_mode_is_left_alone():
    (layer, hook), x = make_layer(Double()), torch.randn(3, 2, 4)
    assert layer.eval()(x) is x
    assert (hook.fired, hook.shape, int(hook.sketch.count)) == (False, None, 0)


def test_gathering_leaves_gradients_alone():
    (layer, hook), x = make_layer(Double()), torch.randn(3, 2, 4, requires_grad=True)
    layer(x).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 2.0))
    assert not hook.sketch.moments.requires_grad


def test_activation_checkpointing_gathers_each_sample_once():
    layer, hook = make_layer(Double())
    checkpoint(layer, torch.randn(3, 2, 4, requires_grad=True), use_reentrant=False).sum().backward()
    assert hook.sketch.count == 3


def test_a_window_costs_a_compiled_layer_no_graph_break():
    torch.compiler.reset()
    (eager, hook), (traced, traced_hook) = make_layer(Double()), make_layer(Double())
    compiled, x = torch.compile(traced, fullgraph=True, backend="eager"), torch.randn(3, 2, 4)
    for layer in (eager, compiled):
        assert torch.equal(layer(x), 2 * x)
    assert torch.equal(traced_hook.sketch.moments, hook.sketch.moments)
    assert not traced_hook.first_call
