import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_dropcluster.regularizers import Gathering
from lightning_dropcluster.sketch import Sketch


class Double(nn.Module):
    def forward(self, x):
        return 2 * x


def make_gathering(regularizer=None):
    gathering = Gathering(regularizer)
    gathering.active = True
    gathering.sketch = Sketch((2, 4), num_samples=8, sketch_dim=4)
    return gathering


def test_inactive_is_the_identity_that_still_gathers():
    gathering, x = make_gathering(Double()), torch.randn(3, 2, 4)
    gathering.active = False
    assert gathering(x) is x
    assert gathering.shape == (2, 4)
    assert gathering.sketch.count == 3


@pytest.mark.parametrize(("regularizer", "factor"), [(None, 1), (Double(), 2)])
def test_hands_the_activation_to_the_regulariser(regularizer, factor):
    x = torch.randn(3, 2, 4)
    assert torch.equal(make_gathering(regularizer)(x), factor * x)


def test_gathers_what_the_layer_made_and_not_what_the_regulariser_made_of_it():
    gathering, x = make_gathering(Double()), torch.randn(3, 2, 4)
    gathering(x)
    alone = Sketch((2, 4), num_samples=8, sketch_dim=4)
    alone.update(x)
    assert torch.equal(gathering.sketch.moments, alone.moments)


def test_gathers_the_first_call_of_each_step_alone():
    gathering = make_gathering()
    for count in (3, 6):
        gathering.first_call = True
        gathering(torch.randn(3, 2, 4))
        gathering(torch.randn(3, 2, 4))
        assert gathering.sketch.count == count


def test_later_calls_of_a_step_are_regularised_and_leave_the_shape_alone():
    gathering = make_gathering(Double())
    gathering(torch.randn(3, 2, 4))
    x = torch.randn(3, 2, 7)
    assert torch.equal(gathering(x), 2 * x)
    assert gathering.shape == (2, 4)


@pytest.mark.parametrize(("channels", "noted"), [(2, None), (5, 5)])
def test_another_number_of_channels_in_a_later_call_is_noted(channels, noted):
    gathering = make_gathering()
    gathering(torch.randn(3, 2, 4))
    assert gathering.other_channels is None
    gathering(torch.randn(3, channels, 4))
    assert gathering.other_channels == noted


def test_another_size_is_noted_and_not_gathered():
    gathering = make_gathering()
    gathering(torch.randn(3, 2, 5))
    assert gathering.shape == (2, 5)
    assert gathering.sketch.count == 0


def test_without_a_sketch_it_only_regularises():
    gathering, x = Gathering(Double()), torch.randn(3, 2, 4)
    gathering.active = True
    assert torch.equal(gathering(x), 2 * x)


def test_gathering_leaves_gradients_alone():
    x = torch.randn(3, 2, 4, requires_grad=True)
    make_gathering(Double())(x).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 2.0))
    assert not make_gathering().sketch.moments.requires_grad


def test_activation_checkpointing_gathers_each_sample_once():
    gathering = make_gathering(Double())
    checkpoint(gathering, torch.randn(3, 2, 4, requires_grad=True), use_reentrant=False).sum().backward()
    assert gathering.sketch.count == 3


def test_a_window_costs_a_compiled_layer_no_graph_break():
    torch.compiler.reset()
    eager, traced = make_gathering(Double()), make_gathering(Double())
    compiled, x = torch.compile(traced, fullgraph=True, backend="eager"), torch.randn(3, 2, 4)
    for gathering in (eager, compiled):
        assert torch.equal(gathering(x), 2 * x)
    assert torch.equal(traced.sketch.moments, eager.sketch.moments)
    assert not traced.first_call
