"""Time a training step with and without regularisers, and each regulariser alone; a JSON line per case."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from random import Random
from statistics import median, quantiles
from typing import Any

import timm
import torch
from jsonargparse import auto_cli
from timm.layers.drop import DropBlock2d
from torch import Tensor, nn
from torch.profiler import profile

from benchmarks.common.record import provenance, write_line
from benchmarks.cost.timing import clock, usual_device
from lightning_dropcluster import ClusterDrop, FaissKMeans, select_layers
from lightning_dropcluster.layers.injection import Injection
from lightning_dropcluster.learning.learner import ClusterLearner
from lightning_dropcluster.learning.scopes import Grouping
from lightning_dropcluster.learning.sketch import Sketch, SketchSettings

MODELS = (
    ("resnet50", "layer*.*.conv2"),
    ("resnet50", "layer[1-3]"),
    ("resnet50", "conv1"),
    ("convnext_tiny", "**.conv_dw"),
    ("efficientnet_b0", "**.conv_dw"),
)
SHAPES = ((32, 256, 56, 56), (128, 64, 32, 32))
DROP_PROB = 0.15
CLUSTER_SIZE = 16
Step = Callable[[], None]


@dataclass(frozen=True)
class Settings:
    """What to time.

    Args:
        quick: the first model and the smaller shape only, few repeats: a check that takes a minute.
        layers: only the steps of the model with this pattern in `MODELS`; by default all, and the operations.
        repeats: timed runs of each case.
        batch_size: images per training step.
        size: of the images in pixels; by default 224 on a GPU and 96 elsewhere.
        profile: instead of timing, show what a step of the first model with and without dropping is made of.
        out: file to which the records are appended as well.
    """

    quick: bool = False
    layers: str | None = None
    profile: bool = False
    repeats: int = 15
    batch_size: int = 16
    size: int | None = None
    out: str | None = None

    def __post_init__(self) -> None:
        patterns = [pattern for _, pattern in MODELS]
        if self.layers is not None and self.layers not in patterns:
            raise ValueError(f"layers must be one of {patterns}, got {self.layers!r}")


class Naive(nn.Module):
    """What one would write first: a float mask of the activation's size, looked up through the labels."""

    def __init__(self, drop: ClusterDrop) -> None:
        super().__init__()
        self.drop, self.labels = drop, drop.labels.flatten(1).long()

    def forward(self, x: Tensor) -> Tensor:
        keep = (
            torch.rand(len(x), len(self.labels), self.drop.num_clusters, device=x.device) >= DROP_PROB
        ).float()
        mask = keep.gather(2, self.labels.expand(len(x), -1, -1)).reshape(x.shape)
        return x * mask * (mask.numel() / mask.sum())


def peers() -> dict[str, Callable[[], nn.Module]]:
    """The other dropouts, made afresh for each layer."""
    return {
        "timm DropBlock2d per map": partial(DropBlock2d, DROP_PROB, couple_channels=False),
        "timm DropBlock2d shared": partial(DropBlock2d, DROP_PROB, couple_channels=True),
        "nn.Dropout2d": partial(nn.Dropout2d, DROP_PROB),
        "nn.Dropout": partial(nn.Dropout, DROP_PROB),
    }


def time_alternating(cases: dict[str, Step], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Run the cases in turn, so that what slows the machine slows all of them alike.

    Each turn has another order, since what a case leaves in the caches and in freed memory serves the next.

    Args:
        cases: name to what is timed.
        repeats: timed runs of each, after two that warm up.
        device: whose work is waited for.

    Returns:
        Name to seconds of each run.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for run in range(repeats + 2):
        for name in Random(run).sample(list(cases), len(cases)):
            _, took = clock(cases[name], device)
            if run >= 2:
                seconds[name].append(took.seconds)
    return seconds


def report(
    kind: str, seconds: dict[str, list[float]], base: str, device: torch.device, **what: Any
) -> Iterator[dict[str, Any]]:
    """Make a record of each case: median, quartiles, and the ratio of medians to the base case."""
    for name, runs in seconds.items():
        low, _, high = quantiles(runs, n=4)
        yield {
            "benchmark": kind,
            **what,
            "case": name,
            "median_ms": round(1e3 * median(runs), 3),
            "quartiles_ms": [round(1e3 * low, 3), round(1e3 * high, 3)],
            "ratio": round(median(runs) / median(seconds[base]), 4),
            "base": base,
            "repeats": len(runs),
            # A passive thread is slow to wake, which costs most where operations are many and small.
            "wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
            **provenance(device),
        }


def clustered(
    model: nn.Module, modules: dict[str, nn.Module], step: Step, device: torch.device
) -> ClusterLearner:
    """Learn clusters in a few steps, as the callback would."""
    layers = ClusterLearner(
        Grouping(cluster_size=CLUSTER_SIZE), FaissKMeans(), SketchSettings(num_samples=32)
    )
    layers.attach(modules, device)
    layers.begin_step(0.0)
    step()
    layers.open_window()
    while not layers.clusters:
        layers.begin_step(0.0)
        step()
        layers.end_step()
    return layers


def open_sketches(layers: ClusterLearner) -> dict[str, Sketch]:
    """Make the sketches of a window so large that no step fills it."""
    layers.sketches = replace(layers.sketches, num_samples=2**30)
    layers.open_window()
    assert layers.window is not None
    layers.window.arm()
    sketches, layers.window = layers.window.close(), None
    return sketches


@contextmanager
def dropping(layers: ClusterLearner, sketches: Mapping[str, Sketch] | None = None) -> Iterator[None]:
    """A step in which the clusters of attached layers are dropped.

    Args:
        layers: with clusters.
        sketches: those of an open window, which go on from step to step as in training; none where it is
            ``None``.
    """
    for name, sketch in (sketches or {}).items():
        layers.hooks[name].sketch = sketch
    layers.begin_step(DROP_PROB)
    yield
    for hook in layers.hooks.values():
        hook.sketch = None
    layers.begin_step(0.0)


def step_cases(name: str, pattern: str, settings: Settings, device: torch.device) -> dict[str, Step]:
    """Training steps (forward and backward) of a model under every regulariser.

    In all but those of DropCluster its hooks are on and idle.
    """
    torch.manual_seed(0)
    model = timm.create_model(name).to(device)
    size = settings.size or (224 if device.type == "cuda" else 96)
    images = torch.randn(settings.batch_size, 3, size, size, device=device)
    modules = select_layers(model, pattern, nn.Module)

    def plain() -> None:
        model.zero_grad()
        model(images).mean().backward()

    layers = clustered(model, modules, plain, device)

    def with_clusters(sketches: Mapping[str, Sketch] | None) -> None:
        with dropping(layers, sketches):
            plain()

    def with_others(make: Callable[[str], nn.Module]) -> None:
        with Injection(modules, {layer: make(layer) for layer in modules}):
            plain()

    drops = {layer: hook.regularizer for layer, hook in layers.hooks.items()}
    naive: dict[str, nn.Module] = {
        layer: Naive(drop) for layer, drop in drops.items() if isinstance(drop, ClusterDrop)
    }
    made: dict[str, dict[str, nn.Module]] = {"naive x * mask * scale": naive}
    made |= {case: {layer: make() for layer in modules} for case, make in peers().items()}
    return {
        "no callback": plain,
        "DropCluster": partial(with_clusters, None),
        "DropCluster, gathering": partial(with_clusters, open_sketches(layers)),
        **{case: partial(with_others, ready.__getitem__) for case, ready in made.items()},
    }


def op_cases(
    shape: tuple[int, ...], memory_format: torch.memory_format, device: torch.device
) -> dict[str, Step]:
    """Forward and backward of each regulariser alone on one activation."""
    torch.manual_seed(0)
    x = torch.randn(shape, device=device).to(memory_format=memory_format)
    grad = torch.randn_like(x)
    clusters = shape[2] * shape[3] // CLUSTER_SIZE
    drop = ClusterDrop(torch.randint(clusters, shape[1:], device=device), DROP_PROB, num_clusters=clusters)
    overwriting = ClusterDrop(drop.labels, DROP_PROB, num_clusters=clusters, inplace=True)

    def run(module: Callable[[Tensor], Tensor]) -> None:
        leaf = x.detach().requires_grad_()
        module(leaf).backward(grad)

    return {
        "x * 2.0": partial(run, lambda leaf: leaf * 2.0),
        "ClusterDrop": partial(run, drop),
        # The product stands for a conv: its output may be overwritten, which a leaf's values may not.
        "x * 2.0, then ClusterDrop in place": partial(run, lambda leaf: overwriting(leaf * 2.0)),
        "naive x * mask * scale": partial(run, Naive(drop)),
        **{name: partial(run, make()) for name, make in peers().items()},
    }


def show_profile(cases: dict[str, Step], repeats: int) -> None:
    """Print torch's profile of some steps without the callback, and of as many that drop clusters."""
    for name in ("no callback", "DropCluster"):
        cases[name]()
        with profile() as profiled:
            for _ in range(repeats):
                cases[name]()
        print(f"{repeats} steps, {name}")
        print(profiled.key_averages().table(sort_by="self_cpu_time_total", row_limit=20))


def models(settings: Settings) -> Sequence[tuple[str, str]]:
    """List what to time the training steps of."""
    chosen = [(name, pattern) for name, pattern in MODELS if settings.layers in (None, pattern)]
    return chosen[:1] if settings.quick else chosen


def shapes(settings: Settings) -> Sequence[tuple[int, ...]]:
    """List the activations to time the operations on."""
    if settings.layers is not None:
        return ()
    return SHAPES[-1:] if settings.quick else SHAPES


def main(settings: Settings) -> None:
    """Time the models' steps and the operations, and write a line for each case."""
    device = usual_device()
    if settings.profile:
        show_profile(step_cases(*MODELS[0], settings, device), settings.repeats)
        return
    repeats = min(settings.repeats, 3) if settings.quick else settings.repeats
    for name, pattern in models(settings):
        seconds = time_alternating(step_cases(name, pattern, settings, device), repeats, device)
        for record in report("step", seconds, "no callback", device, model=name, layers=pattern):
            write_line(record, settings.out)
    for shape in shapes(settings):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            seconds = time_alternating(op_cases(shape, memory_format, device), repeats, device)
            what = {"shape": list(shape), "memory_format": str(memory_format).removeprefix("torch.")}
            for record in report("op", seconds, "x * 2.0", device, **what):
                write_line(record, settings.out)


if __name__ == "__main__":
    main(auto_cli(Settings, as_positional=False))
