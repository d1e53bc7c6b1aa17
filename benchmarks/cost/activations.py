"""Activations to cluster: of a briefly trained network, and random fields in the sizes of ResNet-50."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from benchmarks.common.data import DataName, ImageDataModule, load
from benchmarks.common.models import build_model
from lightning_dropcluster.learning.scopes import SCOPES, Grouping
from lightning_dropcluster.learning.sketch import Sketch

BATCH = 64
LAYERS = ("conv1", "layer1.0.conv1", "layer2.0.conv2")
SIZES = ((64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7))
CLUSTER_SIZE = 16
RANDOM = "random fields"
SPARSE = 1.5  # a strict ReLU leaves what is above so many standard deviations
RESNET50 = ((64, 56, 3), (128, 28, 4), (256, 14, 6), (512, 7, 3))  # conv2 at 224 px: channels, side, layers
MODEL = {"data": RANDOM, "model": "resnet50", "layers": "layer*.*.conv2", "size": 224}


@dataclass(frozen=True)
class Activations:
    """A layer's outputs (N, C, H, W) in two gathering windows, between which the network has moved.

    Args:
        data: where they come from.
        layer: name of the layer, or of its size.
        channels: of the whole layer, of which C may be a part.
        before: outputs in the earlier window.
        now: outputs in the later one.
    """

    data: str
    layer: str
    channels: int
    before: Tensor
    now: Tensor

    @property
    def grid(self) -> tuple[int, ...]:
        """The sides of a map."""
        return tuple(self.now.shape[2:])

    def num_clusters(self, scope: str = "map") -> int:
        """Clusters of a map, or of whatever else is clustered at once."""
        return Grouping(scope, cluster_size=CLUSTER_SIZE).clusters_for(tuple(self.now.shape[1:]))

    def first(self, maps: int) -> Activations:
        """Leave out all but the first maps."""
        return replace(self, before=self.before[:, :maps], now=self.now[:, :maps])

    def to(self, device: torch.device) -> Activations:
        """Move the outputs to a device."""
        return replace(self, before=self.before.to(device), now=self.now.to(device))


def sketch_of(
    outputs: Tensor,
    sketch_dim: int,
    seed: int = 0,
    window: int = 0,
    *,
    scope: str = "map",
    dtype: torch.dtype = torch.float32,
) -> Sketch:
    """Gather outputs (N, C, H, W) as the callback does, in batches.

    Args:
        outputs: of a layer.
        sketch_dim: columns.
        seed: of the signs.
        window: number of the window.
        scope: what is clustered, see `DropCluster`.
        dtype: in which the moments are kept from batch to batch.

    Returns:
        The sketch.
    """
    sketch = Sketch(
        tuple(outputs.shape[1:]),
        scope=scope,
        num_samples=len(outputs),
        sketch_dim=sketch_dim,
        seed=seed,
        window=window,
        device=outputs.device,
    )
    for batch in outputs.split(BATCH):
        sketch.update(batch)
        sketch.moments.copy_(sketch.moments.to(dtype))
    return sketch


def exact_profiles(outputs: Tensor, scope: str = "map") -> Tensor:
    """Centre each feature of outputs (N, C, H, W) and scale it: (C, H * W, N), unit length or all zero.

    In other scopes than "map" the first two sizes are those of the problems and of their items.
    """
    layout = SCOPES[scope]
    rows = layout.rows(outputs.flatten(2)).T.reshape(*layout.problems(tuple(outputs.shape[1:])), -1)
    return F.normalize(rows - rows.mean(2, keepdim=True), dim=2)


def trained(
    name: str,
    data: DataName,
    data_dir: str | None,
    *,
    train_samples: int | None,
    epochs: int,
    samples: int,
) -> Iterator[Activations]:
    """Train a small ResNet and look at it before and after its last epoch.

    Args:
        name: of the model.
        data: a name that `data.load` knows.
        data_dir: see `data.load`.
        train_samples: training images.
        epochs: passes over them, at least 2.
        samples: images to look at in each window.

    Yields:
        The activations of each of `LAYERS`.
    """
    torch.manual_seed(0)
    images = load(data, data_dir=data_dir, train_samples=train_samples)
    batches = ImageDataModule(images, BATCH, augment=True).train_dataloader()
    model = build_model(name, "cifar", len(images.classes))
    sgd = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, nesterov=True)
    windows = []
    for epoch in range(epochs):
        for inputs, labels in batches:
            sgd.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            sgd.step()
        if epoch >= epochs - 2:
            windows.append(look(model, torch.cat([x for x, _ in batches])[:samples]))
    for layer in LAYERS:
        before, now = (window[layer] for window in windows)
        yield Activations(f"{data}, {name} after {epochs} epochs", layer, now.shape[1], before, now)


@torch.no_grad()
def look(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Take down what `LAYERS` put out for images, in training mode."""
    seen: dict[str, list[Tensor]] = {name: [] for name in LAYERS}

    def note(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        seen[name].append(output.clone())

    hooks = [model.get_submodule(name).register_forward_hook(partial(note, name)) for name in LAYERS]
    for batch in images.split(BATCH):
        model(batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(outputs) for name, outputs in seen.items()}


def random_fields(
    channels: int, side: int, *, maps: int, samples: int, device: torch.device | None = None
) -> Activations:
    """Make fields that are smooth on every scale, as features of images are.

    Each map mixes noise of all scales in weights of its own, which change by a tenth between the windows.

    Args:
        channels: of the whole layer.
        side: of a map.
        maps: how many to make.
        samples: in each window.
        device: where; the CPU by default.

    Returns:
        The activations.
    """
    generator = Generator(device or "cpu").manual_seed(side)
    where: Any = {"generator": generator, "device": device}
    scales = [2**power for power in range(1, max(2, side.bit_length()))]
    weights = 0.5 + torch.rand(len(scales), maps, 1, 1, **where)
    moved = weights * (1 + 0.1 * torch.randn(weights.shape, **where))
    windows = []
    for mix in (weights, moved):
        fields = 0.3 * torch.randn(samples, maps, side, side, **where)
        for scale, weight in zip(scales, mix, strict=True):
            noise = torch.randn(samples, maps, scale, scale, **where)
            smooth = F.interpolate(noise, size=(side, side), mode="bilinear")
            fields += smooth * weight * (2 / scale) ** 0.5
        windows.append(fields)
    return Activations(RANDOM, f"{channels} x {side} x {side}", channels, windows[0], windows[1])


def strict_relu(outputs: Tensor) -> Tensor:
    """Leave one feature in fifteen; most maps then need repair."""
    return F.relu(outputs - SPARSE * outputs.std())


def resnet50_windows(
    device: torch.device,
    *,
    samples: int,
    sketch_dim: int,
    sizes: tuple[tuple[int, int, int], ...] = RESNET50,
    maps: int | None = None,
    through: Callable[[Tensor], Tensor] | None = None,
) -> tuple[dict[str, Sketch], dict[str, Sketch]]:
    """Sketch all conv2 layers of a ResNet-50 at 224 px in two windows; layers of one size share a sketch.

    Args:
        device: where the sketches are.
        samples: in each window.
        sketch_dim: columns.
        sizes: which layers, as in `RESNET50`.
        maps: of each layer, at most; all by default.
        through: what is done with the outputs first.

    Returns:
        Name to sketch, in the earlier and in the later window.
    """
    windows: tuple[dict[str, Sketch], dict[str, Sketch]] = ({}, {})
    for channels, side, layers in sizes:
        some = min(channels, maps or channels)
        acts = random_fields(channels, side, maps=some, samples=samples, device=device)
        for window, outputs in zip(windows, (acts.before, acts.now), strict=True):
            seen = outputs if through is None else through(outputs)
            sketch = sketch_of(seen, sketch_dim, window=len(window))
            window |= {f"{side}.{layer}": sketch for layer in range(layers)}
    return windows
