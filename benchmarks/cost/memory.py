"""Measure what the callback keeps in memory: for the backward pass, for labels, and for an open sketch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate, product
from typing import Any

import timm
import torch
from jsonargparse import auto_cli
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from benchmarks.common.record import provenance, write_line
from benchmarks.cost.latency import clustered, dropping
from benchmarks.cost.peak import LiveMemory, added_gpu_memory
from benchmarks.cost.timing import usual_device
from lightning_dropcluster import select_layers
from lightning_dropcluster.learning.sketch import Sketch

GOAL = 0.05
GATHERING_GOAL = 1.5
GATHERED = ((64, 112, 112), (64, 56, 56), (128, 28, 28), (256, 14, 14), (512, 7, 7))  # of ResNet-50
SAMPLES = (256, 1024, 4096, 16384)


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Args:
        quick: a small model at a small size, to see that it runs.
        model: any timm model.
        layers: pattern of the layers that drop.
        batch_size: images per training step.
        size: of the images in pixels.
        out: file to which the records are appended as well.
    """

    quick: bool = False
    model: str = "resnet50"
    layers: str = "layer*.*.conv2"
    batch_size: int = 32
    size: int = 96
    out: str | None = None


def saved_bytes(step: Callable[[], None]) -> int:
    """Count what a training step keeps for its backward pass; shared memory counts once."""
    storages: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor  # kept, so that no address is used twice
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


def peak_bytes(step: Callable[[], None], device: torch.device) -> int:
    """Return the most memory that a step holds at a time, above what is held before it."""
    if device.type == "cuda":
        return added_gpu_memory(step)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    results: Any = profiled.profiler and profiled.profiler.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def step_records(settings: Settings, device: torch.device) -> list[dict[str, Any]]:
    """What dropping adds to a training step, as a share of the activations that are masked."""
    torch.manual_seed(0)
    model = timm.create_model(settings.model).to(device)
    images = torch.randn(settings.batch_size, 3, settings.size, settings.size, device=device)
    modules = select_layers(model, settings.layers)

    def step() -> None:
        model(images).mean().backward()
        model.zero_grad()  # here, as a step that frees what was there before it would look smaller

    layers = clustered(model, modules, step, device)
    features = sum(clusters.labels.numel() for clusters in layers.clusters.values())
    activations = 4 * settings.batch_size * features
    plain = {"saved for backward": saved_bytes(step), "peak": peak_bytes(step, device)}
    with dropping(layers):
        with_clusters = {"saved for backward": saved_bytes(step), "peak": peak_bytes(step, device)}
    tables = sum(
        buffer_bytes(hook.regularizer) for hook in layers.hooks.values() if hook.regularizer is not None
    )
    records = [{"case": "labels and sizes", "bytes": tables, "ratio": tables / activations}]
    for case, before in plain.items():
        added = with_clusters[case] - before
        records.append({"case": case, "bytes": added, "ratio": added / activations})
    what = {"model": settings.model, "layers": settings.layers, "batch_size": settings.batch_size}
    return [{**what, "masked_bytes": activations, "goal": GOAL, **record} for record in records]


def sketch_records() -> list[dict[str, Any]]:
    """How large an open sketch is, for growing numbers of samples and for all 3 x 3 convs of ResNet-50."""
    records = []
    for samples in SAMPLES:
        size = buffer_bytes(Sketch((64, 56, 56), num_samples=samples, device=torch.device("meta")))
        records.append({"case": "open sketch", "shape": [64, 56, 56], "samples": samples, "bytes": size})
    with torch.device("meta"):
        model, images = timm.create_model("resnet50"), torch.empty(1, 3, 224, 224)
        total = sum(
            buffer_bytes(Sketch(shape, device=torch.device("meta")))
            for shape in output_shapes(model, "layer*.*.conv2", images)
        )
    records.append({"case": "open sketch", "model": "resnet50", "layers": "layer*.*.conv2", "bytes": total})
    return records


def gathering_records(batch_size: int = 256) -> Iterator[dict[str, Any]]:
    """What a gathering step adds on a GPU at its peak, by layer, counted with tensors that have no values."""
    for shape, memory_format in product(GATHERED, (torch.contiguous_format, torch.channels_last)):
        with FakeTensorMode():
            sketch = Sketch(shape, device=torch.device("cuda"))
            outputs = torch.empty(batch_size, *shape, dtype=torch.bfloat16, device="cuda")
            outputs = outputs.to(memory_format=memory_format)
            with LiveMemory() as memory:
                sketch.update(outputs)
        yield {
            "case": "gathering, peak",
            "shape": shape,
            "batch_size": batch_size,
            "dtype": "bfloat16",
            "format": str(memory_format).removeprefix("torch."),
            "bytes": memory.peak,
            "ratio": memory.peak / (2 * outputs.numel()),
            "goal": GATHERING_GOAL,
        }


def output_shapes(model: nn.Module, pattern: str, images: Tensor) -> list[tuple[int, ...]]:
    """Run a model and note the output shapes of the layers that a pattern picks."""
    shapes: list[tuple[int, ...]] = []
    for layer in select_layers(model, pattern).values():
        layer.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape[1:])))
    model(images)
    return shapes


def buffer_bytes(module: nn.Module) -> int:
    """Add up the buffers of a module."""
    return sum(buffer.numel() * buffer.element_size() for buffer in module.buffers())


def main(settings: Settings) -> None:
    """Measure, and write a line for each case."""
    device = usual_device()
    if settings.quick:
        settings = Settings(model="resnet10t", batch_size=8, size=64, out=settings.out)
    for record in (*step_records(settings, device), *sketch_records(), *gathering_records()):
        write_line({"benchmark": "memory", **record, **provenance(device)}, settings.out)


if __name__ == "__main__":
    main(auto_cli(Settings, as_positional=False))
