"""Any configuration on any small conv net trains, or ends in an error that names what is wrong."""

import inspect
import math
import re
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from fits import Classifier, count_hooks, make_trainer
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_dropcluster
from lightning_dropcluster import DropCluster, FaissKMeans, ReNA, TorchKMeans, Ward

PACKAGE = Path(lightning_dropcluster.__file__).parent
ARGUMENTS = list(inspect.signature(DropCluster).parameters)
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Network:
    """What a random network is made of."""

    size: tuple[int, ...]
    channels: tuple[int, int]
    kernel: int
    stride: int
    dead: bool  # a ReLU whose input is negative throughout
    in_place: bool

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        conv, padding = CONVS[len(self.size)], self.kernel // 2
        first = conv(2, self.channels[0], self.kernel, padding=padding)
        if self.dead:
            nn.init.constant_(first.bias[:1], -1e3)
        return nn.Sequential(
            first,
            nn.ReLU(inplace=self.in_place),
            conv(*self.channels, self.kernel, self.stride, padding),
            nn.ReLU(inplace=self.in_place),
            Mean(),
            nn.Linear(self.channels[1], 4),
        )


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(2)


def networks() -> st.SearchStrategy[Network]:
    sizes = st.integers(1, 3).flatmap(lambda n: st.tuples(*[st.integers(1, (40, 9, 4)[n - 1])] * n))
    return st.builds(
        Network,
        size=sizes,
        channels=st.tuples(st.integers(1, 5), st.integers(1, 5)),
        kernel=st.sampled_from([1, 3]),
        stride=st.integers(1, 3),
        dead=st.booleans(),
        in_place=st.booleans(),
    )


def make_labels(spatial: tuple[int, ...], channels: int) -> dict[str, Tensor]:
    return {"model.0": torch.arange(math.prod(spatial)).reshape(1, *spatial).repeat_interleave(channels, 0)}


def optional(strategy: st.SearchStrategy, **chosen: st.SearchStrategy) -> st.SearchStrategy[dict]:
    """Arguments that may be left out, of which one, if any, is given."""
    return strategy | st.one_of(*(st.fixed_dictionaries({name: value}) for name, value in chosen.items()))


NOTHING = st.just({})
LAYERS = st.sampled_from(
    [
        *({"layers": layers} for layers in ("0", "2", "[02]", ["0", "2"], "re:^model", "*")),
        {"layers": lambda name, module: name.endswith("0")},
        {"layers": "**", "layer_types": nn.Module},
        {"layers": "**", "layer_types": nn.Linear},
        {"layers": "*", "layer_types": [nn.ReLU, nn.Conv2d]},
        {"layers": ["4", "5"], "layer_types": [Mean, nn.Linear]},
        {"layers": "0", "layer_types": nn.Conv1d},
    ]
)
GROUPING = optional(NOTHING, num_clusters=st.integers(1, 50), cluster_size=st.floats(1, 100))
OFTEN = optional(NOTHING, every_n_epochs=st.integers(0, 2), every_n_train_steps=st.integers(0, 4))
OPTIONS = {
    "scope": st.sampled_from(["map", "position", "layer", "channel"]),
    "drop_prob": st.floats(0, 1, exclude_max=True),
    "start": st.sampled_from([0, 0.0, 0.2, 1]) | st.floats(0, 1, exclude_max=True) | st.integers(0, 3),
    "schedule": st.sampled_from(["linear", "cosine", "constant", math.sqrt, lambda fraction: 0.5]),
    "num_samples": st.integers(1, 7) | st.sampled_from([20, 2**31 - 1]),
    "sketch_dim": st.integers(1, 40),
    "clusterer": st.sampled_from([None, TorchKMeans(), FaissKMeans(min_share=0.0), Ward(), ReNA()]),
    "per_sample": st.booleans(),
    "fill": st.sampled_from(["zero", "mean"]),
    "rescale": st.sampled_from(["batch", "expected"]),
    "position_weight": st.just(0.0) | st.floats(0, 1e6),
    "seed": st.integers(0, 2**31 - 1),
}
ANYTHING = st.sampled_from([-1, 0, 1, 2.5, 1.0, NAN, INF, -INF, 10**30, 2**31, 1e300, True, "1", None, [1]])


@st.composite
def configurations(draw: st.DrawFn) -> tuple[Network, dict]:
    """A network and arguments for DropCluster: most often all good, else one of them anything at all."""
    network = draw(networks())
    options = draw(st.fixed_dictionaries(OPTIONS)) | draw(LAYERS) | draw(GROUPING) | draw(OFTEN)
    if "layer_types" in options and isinstance(options["clusterer"], Ward | ReNA):
        options["clusterer"] = None  # see test_connected_clusters_of_flat_layers
    kind = draw(st.integers(0, 7))
    if kind in (1, 2):
        spatial = tuple(draw(st.integers(1, 5)) for _ in network.size)
        options["initial_labels"] = make_labels(spatial, network.channels[0])
    elif kind == 3:
        spatial = draw(st.lists(st.integers(1, 5), max_size=3).map(tuple))
        options["initial_labels"] = make_labels(spatial, draw(st.integers(1, 5)))
    elif kind == 4:
        options[draw(st.sampled_from(ARGUMENTS))] = draw(ANYTHING)
    return network, options


def check(network: Network, options: dict, batch_size: int) -> None:
    """Fit for 2 epochs of 3 batches."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(3 * batch_size, 2, *network.size, generator=generator)
    data = TensorDataset(images, torch.arange(len(images)) % 4)
    module = Classifier(network.build())
    hooks, keys = count_hooks(module), list(module.state_dict())
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="DropCluster: |start=")
            callback = DropCluster(**options)
            make_trainer(callback, max_epochs=2).fit(module, DataLoader(data, batch_size))
    except FileNotFoundError:
        assert isinstance(options["initial_labels"], str)
    except (TypeError, ValueError, RuntimeError) as error:
        assert_named(error, module)
    else:
        assert_in_range(callback)
        assert all(math.isfinite(loss) for loss in module.losses) or options.get("drop_prob", 0.0) > 0.9
    assert count_hooks(module) == hooks
    assert list(module.state_dict()) == keys


def assert_named(error: Exception, module: nn.Module) -> None:
    """An error is ours and says of which argument or layer it is."""
    thrower = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    names = [*ARGUMENTS, "labels of shape", *(repr(name) for name, _ in module.named_modules() if name)]
    said = "\n".join([str(error), *getattr(error, "__notes__", [])])
    if not (thrower.is_relative_to(PACKAGE) and re.search("|".join(map(re.escape, names)), said)):
        raise error


def assert_in_range(callback: DropCluster) -> None:
    for labels in callback.labels.values():
        assert labels.dtype == torch.int64
        assert labels.min() >= 0
        assert labels.max() < labels.numel()


FLAT = Network(size=(5,), channels=(2, 1), kernel=1, stride=1, dead=False, in_place=False)
RELAXED = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@example((FLAT, {"layers": "0", "start": 0, "position_weight": 1e300}), 2)
@example((FLAT, {"layers": "0", "start": 0, "num_samples": 10**30}), 2)
@example((FLAT, {"layers": "0", "start": 0, "seed": 10**30}), 2)
@example((FLAT, {"layers": "0", "initial_labels": make_labels((), 2)}), 2)
@settings(max_examples=15, derandomize=True, **RELAXED)
@given(configurations(), st.integers(1, 3))
def test_configurations(configuration, batch_size):
    check(*configuration, batch_size)


@pytest.mark.long
@settings(max_examples=500, print_blob=True, **RELAXED)
@given(configurations(), st.integers(1, 3))
def test_many_configurations(configuration, batch_size):
    check(*configuration, batch_size)


@pytest.mark.parametrize("clusterer", [Ward(), ReNA()], ids=["Ward", "ReNA"])
def test_connected_clusters_of_flat_layers(clusterer):
    options = {"layers": "5", "layer_types": nn.Linear, "start": 0, "num_samples": 2, "clusterer": clusterer}
    check(FLAT, options, 2)
