"""On a GPU that only pretends, so that any machine can tell: a step waits for no value and mixes no devices.

Tensors without values that say they are on a GPU fail where the host looks at one, as it would have to wait,
and where one of the CPU comes in. They tell nothing of results and speed.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import timm
import torch
from torch import Tensor, nn
from torch._dynamo.source import ConstantSource
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorDeviceMismatchError
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_dropcluster import REGULARIZERS, ClusterDrop
from lightning_dropcluster.clustering import FaissKMeans
from lightning_dropcluster.clustering.centroids import add_up, assign_nearest
from lightning_dropcluster.clustering.protocol import is_alive
from lightning_dropcluster.layers.selection import select_layers
from lightning_dropcluster.learning.learner import ClusterLearner
from lightning_dropcluster.learning.scopes import SCOPES, Grouping
from lightning_dropcluster.learning.sketch import Sketch, SketchSettings
from lightning_dropcluster.methods.dropping.fused_drop import drop_fused

SHAPE = (4, 6, 8)
OPTIONS = {
    "advanced_dropout": {"num_channels": 4, "reduction": 2},
    "cluster_drop": {"labels": (torch.arange(192) % 7).reshape(SHAPE)},
}
FORMATS = [torch.contiguous_format, torch.channels_last]


class NoCopies(TorchDispatchMode):
    """Fail where values go from one device to another, since the host may have to wait for them."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        assert len({x.device.type for x in tensors}) <= 1, f"{func} copies between devices"
        return out


@contextmanager
def pretended_gpu() -> Iterator[None]:
    with FakeTensorMode(), NoCopies():
        yield


def symbolic_size(shapes: ShapeEnv, hint: int) -> torch.SymInt:
    source = ConstantSource("size")
    symbol = shapes.create_symbol(hint, source=source, dynamic_dim=DimDynamic.DYNAMIC)
    return shapes.create_symintnode(symbol, hint=hint)


def moved(module: nn.Module) -> nn.Module:
    for part in module.modules():
        for held in (part._buffers, part._parameters):
            for name, value in held.items():
                if value is not None:
                    there = torch.empty(value.shape, dtype=value.dtype, device="cuda")
                    held[name] = nn.Parameter(there) if isinstance(value, nn.Parameter) else there
    return module


def make_maps(memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    return torch.empty(8, *SHAPE, device="cuda").to(memory_format=memory_format).requires_grad_()


def go_back(out: Tensor) -> list[Tensor]:
    """Apply the last operation's backward function alone: torch's engine needs a GPU that is there."""
    backward = getattr(out.grad_fn, "apply", out.grad_fn)
    return [grad for grad in tree_leaves(backward(torch.empty_like(out))) if grad is not None]


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("name", REGULARIZERS)
def test_regularisers_wait_for_no_value(name, memory_format):
    module = REGULARIZERS[name](**OPTIONS.get(name, {}))
    with pretended_gpu():
        out = moved(module)(make_maps(memory_format))
        assert {x.device.type for x in (out, *go_back(out))} == {"cuda"}


@pytest.mark.parametrize("scope", SCOPES)
def test_a_sketch_waits_for_no_value(scope):
    sketch = Sketch(SHAPE, scope=scope, num_samples=16, sketch_dim=8)
    with pretended_gpu():
        moved(sketch).update(make_maps())


def test_an_iteration_of_k_means_waits_for_no_value():
    with pretended_gpu():
        points, means = torch.empty(5, 30, 8, device="cuda"), torch.empty(5, 4, 8, device="cuda")
        labels, _ = assign_nearest(points, means)
        sums, sizes = add_up(points, is_alive(points), labels, 4)
        assert {sums.device.type, sizes.device.type} == {"cuda"}


def make_step(model: nn.Module, *, gathers: bool, fill: str) -> ClusterLearner:
    """Hook a model, let it learn clusters, and begin the step after that, all of it on the CPU."""
    settings = SketchSettings(num_samples=8, sketch_dim=8)
    learner = ClusterLearner(
        Grouping(cluster_size=4), FaissKMeans(), settings, make_drop=partial(ClusterDrop, fill=fill)
    )
    learner.attach(select_layers(model, "layer*.*.conv2"), torch.device("cpu"))
    learner.open_window()
    while not learner.end_step():
        learner.begin_step(0.0)
        model(torch.randn(8, 3, 64, 64))
    if gathers:
        learner.open_window()
    learner.begin_step(0.3)
    return learner


@pytest.mark.parametrize(("gathers", "fill"), [(False, "zero"), (True, "zero"), (False, "mean")])
def test_a_step_waits_for_no_value_but_to_learn_whether_the_window_is_full(gathers, fill):
    model = timm.create_model("resnet18", num_classes=10)
    learner = make_step(model, gathers=gathers, fill=fill)
    with pretended_gpu():
        parts = [part for hook in learner.hooks.values() for part in (hook.regularizer, hook.sketch)]
        for module in (model, *filter(None, parts)):
            moved(module)
        learner.begin_step(0.3)
        assert model(torch.empty(8, 3, 64, 64, device="cuda")).device.type == "cuda"
        with pytest.raises(DataDependentOutputException) if gathers else nullcontext():
            learner.end_step()


def test_the_pretence_notices_a_value_that_is_looked_at():
    with pretended_gpu(), pytest.raises(DataDependentOutputException):
        make_maps().sum().item()


def test_the_pretence_notices_a_tensor_of_the_cpu():
    with pretended_gpu(), pytest.raises(FakeTensorDeviceMismatchError):
        make_maps() * torch.ones(8)


def test_the_pretence_notices_a_copy():
    with pretended_gpu(), pytest.raises(AssertionError, match="copies between devices"):
        make_maps().cpu()


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("mean", [False, True], ids=["zero", "mean"])
def test_compiled_code_serves_batches_of_all_sizes(mean, memory_format):
    shapes = ShapeEnv()
    with FakeTensorMode(shape_env=shapes):
        size = symbolic_size(shapes, 24)
        x = torch.empty((size, 16, 8, 8), device="cuda").to(memory_format=memory_format)
        labels, sizes = (
            torch.empty(shape, dtype=torch.int32, device="cuda") for shape in ((16, 8, 8), (16, 4))
        )
        uniform, prob = torch.empty((size, 16, 4), device="cuda"), torch.empty((), device="cuda")
        drop_fused(x, labels, sizes, uniform, prob, by_batch=not mean, mean=mean)
    assert not shapes.replacements
