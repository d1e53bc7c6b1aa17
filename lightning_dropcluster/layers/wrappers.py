"""What wraps a model or a layer: users write the names of the model they know."""

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

CONV_LAYERS: tuple[type[nn.Module], ...] = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
"""The layer types that patterns pick where they match any (subclasses included)."""

LEARNED_CHILD = "structured_dropout"
"""What a learned regulariser is called inside its layer."""


class LearnedChild(nn.Module):
    """Holds a regulariser where optimiser, device and strategy find it, and the model's state_dict does not.

    So a checkpoint fits the model with and without it. It is no layer of the model, and nothing happens where
    a Sequential calls it.
    """

    def __init__(self, regularizer: nn.Module) -> None:
        super().__init__()
        self.regularizer = regularizer
        self.register_load_state_dict_post_hook(_miss_nothing)

    def forward(self, x: Any) -> Any:
        """Hand it on."""
        return x

    def state_dict(self, *args: Any, destination: Any = None, **kwargs: Any) -> Any:
        """Add nothing."""
        return {} if destination is None else destination


# Of torch.compile, FSDP, activation checkpointing and Opacus.
_SEGMENTS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_module"}
_PEFT_SEGMENTS = {"base_model", "model"}
_PEFT_LAYERS = ("base_layer", "original_module")


def name_modules(root: nn.Module) -> dict[str, nn.Module]:
    """Name every module as `named_modules` does, but for what wrappers insert.

    An adapter of PEFT has the name of the layer that it adapts; what is inside it has none.
    """
    return dict(_walk("", root))


def has_forward(module: nn.Module) -> bool:
    """Whether a module can run: a list of others cannot, unless its class says how, as DenseNet's blocks."""
    return getattr(module.forward, "__func__", module.forward) is not nn.Module.forward


def adapted_layer(module: nn.Module) -> nn.Module:
    """Return the layer that an adapter of PEFT stands for, else the module itself."""
    while _is_of_peft(module):
        inner = next((module._modules[name] for name in _PEFT_LAYERS if name in module._modules), None)
        if inner is None:
            break
        module = inner
    return module


def _miss_nothing(_module: nn.Module, keys: Any) -> None:
    keys.missing_keys[:] = [key for key in keys.missing_keys if LEARNED_CHILD not in key.split(".")]


def _walk(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    yield name, module
    if adapted_layer(module) is not module:
        return
    for child, inner in module._modules.items():
        if inner is not None and not isinstance(inner, LearnedChild):
            yield from _walk(name if _is_wrapping(module, child) else f"{name}.{child}".lstrip("."), inner)


def _is_wrapping(module: nn.Module, child: str) -> bool:
    """Whether a segment of a name is a wrapper's."""
    if child == "module":
        return isinstance(module, DataParallel | DistributedDataParallel)
    return child in _SEGMENTS or (child in _PEFT_SEGMENTS and _is_of_peft(module))


def _is_of_peft(module: nn.Module) -> bool:
    return any(kind.__module__.partition(".")[0] == "peft" for kind in type(module).__mro__)
