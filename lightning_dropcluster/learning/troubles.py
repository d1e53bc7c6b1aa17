"""What keeps layers from being gathered, in words; training goes on all the same."""

from collections.abc import Iterable, Mapping

import torch

from lightning_dropcluster import ranks
from lightning_dropcluster.layers.hooks import LayerHook
from lightning_dropcluster.layers.plain import NotSeen
from lightning_dropcluster.learning.sketch import SketchSettings
from lightning_dropcluster.memory import check_available


def lack_of_memory(
    hooks: Mapping[str, LayerHook], settings: SketchSettings, device: torch.device
) -> str | None:
    """Say whether sketches will not fit into memory, as soon as shapes are known; every rank must ask."""
    shapes = [hook.shape for hook in hooks.values() if hook.shape is not None]
    error: MemoryError | None = None
    try:
        check_available(sum(map(settings.num_bytes, shapes)), device)
    except MemoryError as caught:
        error = caught
    return _of_memory(hooks, hooks, settings, error) if ranks.any_rank(error is not None, device) else None


def trouble(
    failed: Mapping[str, Exception | None], hooks: Mapping[str, LayerHook], settings: SketchSettings
) -> str:
    """Say why these layers were not gathered, and what to do; causes on other ranks are not known here."""
    error = next(filter(None, failed.values()), None)
    if not isinstance(error, NotSeen):
        return _of_memory(failed, hooks, settings, error)
    return (
        f"layer {', '.join(map(repr, failed))}: a transform of torch.func hides the outputs ({error}), so "
        "there are no new clusters; call the model in the training step once before it is transformed"
    )


def sizes_warning(num_samples: int) -> str:
    """Say that maps are of too many sizes to wait for one of them."""
    return (
        f"sizes of maps changed before num_samples={num_samples} samples of one size were gathered, so maps "
        "are resized for clustering from now on; for clusters of maps as they are lower num_samples, or "
        "train with fewer sizes"
    )


def few_samples_warning(name: str, count: int, num_samples: int) -> str:
    """Say that a layer was clustered from much less than was asked for."""
    return (
        f"layer {name!r} ran in few of the steps, so it is clustered from {count} samples instead of "
        f"num_samples={num_samples}; raise num_samples if that is too few"
    )


def _of_memory(
    names: Iterable[str],
    hooks: Mapping[str, LayerHook],
    settings: SketchSettings,
    error: Exception | None,
) -> str:
    sizes = {name: settings.num_bytes(hooks[name].shape or (0,)) for name in names}
    largest = max(sizes, key=sizes.__getitem__)
    others = f" and {len(sizes) - 1} more" if len(sizes) > 1 else ""
    cause = str(error).partition("\n")[0] if error else "on another rank"
    return (
        f"out of memory for gathering layer {largest!r}{others}: with sketch_dim={settings.sketch_dim} the "
        f"sketch of {largest!r} takes {sizes[largest]:,} bytes, of {sum(sizes.values()):,} in all ({cause}). "
        "Training goes on with the labels that there are; lower sketch_dim, or choose fewer layers"
    )
