"""Hooked layers of which nothing comes, in words."""

from collections.abc import Iterator, Mapping

from torch import nn


def idle_warnings(root: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[str]:
    """Say which layers are not in the model any more, or are in eval mode, in a training step."""
    there = {id(module) for module in root.modules()}
    gone = [name for name, module in layers.items() if id(module) not in there]
    idle = {name: module for name, module in layers.items() if not module.training}
    frozen = [name for name, module in idle.items() if _is_frozen(root, name, module)]
    if gone:
        yield (
            f"layers {', '.join(gone)} are no longer part of the model, so nothing is dropped or gathered "
            "there; replace or fuse layers before fit, or fit again"
        )
    if frozen:
        yield (
            f"layers {', '.join(frozen)} are frozen and in eval mode in a training step, so nothing is "
            "dropped or gathered there; leave them out by naming the child that trains in the pattern"
        )
    if others := [name for name in idle if name not in frozen]:
        yield (
            f"layers {', '.join(others)} are in eval mode in a training step, so nothing is dropped or "
            "gathered there; call .train() on them, or leave them out"
        )


def _is_frozen(root: nn.Module, name: str, layer: nn.Module) -> bool:
    """Whether nothing of a layer is learned; an activation, of its own, has nothing: its child's count."""
    child = getattr(root, name.partition(".")[0], layer)
    weights = list(layer.parameters()) or list(child.parameters() if isinstance(child, nn.Module) else ())
    return bool(weights) and not any(weight.requires_grad for weight in weights)
