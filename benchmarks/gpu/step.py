"""Time a training step as GPUs run it, in half precision and channels last, and see its peak of memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import timm
import torch
from jsonargparse import auto_cli
from torch import nn

from benchmarks.common.record import write_line
from benchmarks.cost.latency import clustered, dropping, open_sketches, peers, report, time_alternating
from benchmarks.cost.memory import peak_bytes
from benchmarks.cost.timing import usual_device
from lightning_dropcluster import select_layers
from lightning_dropcluster.layers.injection import Injection

BASE = "no dropping"
OTHERS = ("nn.Dropout2d", "timm DropBlock2d per map")
Step = Callable[[], None]


@dataclass(frozen=True)
class Settings:
    """What to time.

    Args:
        model: any timm model.
        layers: pattern of the layers that drop.
        batch_size: images per step.
        size: of the images in pixels.
        compile: backend for torch.compile; without one steps are eager, and those of other dropouts and of
            gathering are timed too, each of which would have to be compiled anew.
        repeats: timed runs of each case, by turns.
        out: file to which the records are appended as well.
    """

    model: str = "resnet50"
    layers: str = "layer*.*.conv2"
    batch_size: int = 256
    size: int = 224
    compile: str | None = None
    repeats: int = 15
    out: str | None = None


def step_cases(settings: Settings, device: torch.device) -> dict[str, Step]:
    """Forward and backward of one model, whose hooks are always on: with each kind acting, or none."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(settings.model).to(device)
    model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    images = torch.randn(settings.batch_size, 3, settings.size, settings.size, device=device)
    images = images.to(memory_format=torch.channels_last)
    modules = select_layers(model, settings.layers)
    forward: nn.Module = model

    def step(around: Callable[[], AbstractContextManager[object]] = nullcontext) -> None:
        with around():
            with torch.autocast(device.type, torch.bfloat16):
                loss = forward(images).float().mean()
            loss.backward()
        model.zero_grad()

    learner = clustered(model, modules, step, device)

    def plain() -> None:
        learner.begin_step(0.0)  # as the callback does before it begins; compiled code is then the same
        step()

    cases = {BASE: plain, "DropCluster": partial(step, partial(dropping, learner))}
    if settings.compile is not None:
        forward = torch.compile(model, backend=settings.compile)  # pyright: ignore[reportAssignmentType]
        return cases
    made: Mapping[str, Mapping[str, nn.Module]] = {
        name: {layer: peers()[name]() for layer in modules} for name in OTHERS
    }
    gathering = partial(dropping, learner, open_sketches(learner))
    others = {name: partial(step, partial(Injection, modules, ready)) for name, ready in made.items()}
    return {**cases, "DropCluster, gathering": partial(step, gathering), **others}


def main(settings: Settings) -> None:
    """Write a line for each case; ratios of time and of the peak are to a step in which nothing drops."""
    device = usual_device()
    torch.backends.cudnn.benchmark = True
    cases = step_cases(settings, device)
    seconds = time_alternating(cases, settings.repeats, device)
    peaks = {name: peak_bytes(step, device) for name, step in cases.items()}
    what = {"batch_size": settings.batch_size, "size": settings.size, "compiled": settings.compile}
    for record in report("step", seconds, BASE, device, model=settings.model, layers=settings.layers, **what):
        peak = peaks[record["case"]]
        ratio = round(peak / peaks[BASE], 4)
        write_line({**record, "peak_bytes": peak, "peak_ratio": ratio}, settings.out)


if __name__ == "__main__":
    main(auto_cli(Settings, as_positional=False))
