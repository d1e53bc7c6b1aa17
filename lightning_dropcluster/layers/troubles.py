"""What is wrong with hooked layers, in words."""

from collections.abc import Iterator, Mapping

from torch import nn
from torch.nn.modules import module as _globals


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


def unused_layers_error(names: list[str]) -> RuntimeError | None:
    """Return an error that names layers which never ran in training, ``None`` where there are none."""
    if not names:
        return None
    return RuntimeError(
        f"layers: {', '.join(map(repr, names))} did not run in any training step so far; "
        "choose layers whose forward the training step calls. A stage is not called where its blocks or "
        "layers are called one by one: by gradient checkpointing in some of timm's models (ResNets among "
        "them), by feature extractors and others that trace with torch.fx, by code that loops over its "
        "children; pick the layers inside it. Leave out a model that training does not run, such as an "
        "average of the weights, by naming the child that trains in the pattern"
    )


def backward_hook_warning(layers: Mapping[str, nn.Module]) -> str | None:
    """Say which layers have parameters and backward hooks, which see the gradient behind what is dropped."""
    every = bool(_globals._global_backward_hooks or _globals._global_backward_pre_hooks)
    names = [
        name
        for name, layer in layers.items()
        if (every or layer._backward_hooks or layer._backward_pre_hooks)
        and next(layer.parameters(), None) is not None
    ]
    if not names:
        return None
    return (
        f"layers {', '.join(names)} have backward hooks. torch hands these the gradient of what is left "
        "after dropping, not that of the layer's own output, so per-sample gradients and the like that are "
        "made from it are wrong. Drop behind the layer instead: pick the activation that follows it, for "
        "example with layer_types=torch.nn.ReLU"
    )


def _is_frozen(root: nn.Module, name: str, layer: nn.Module) -> bool:
    """Whether nothing of a layer is learned; an activation, of its own, has nothing: its child's count."""
    child = getattr(root, name.partition(".")[0], layer)
    weights = list(layer.parameters()) or list(child.parameters() if isinstance(child, nn.Module) else ())
    return bool(weights) and not any(weight.requires_grad for weight in weights)
