"""The networks that are trained: timm's, and a small variant of its ResNet."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from lightning_dropcluster.layers.selection import count_channels

SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "small_resnet": ("resnet18", {"layers": (1, 1, 1, 1), "channels": (32, 64, 128, 256)}),
    "small_vit": (
        "vit_tiny_patch16_224",
        {"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 4},
    ),
}
"""Variants of timm's models, by their own names: timm's name, and how they differ."""
OWN_RATES = {"drop_path": "drop_path_rate", "patch_dropout": "patch_drop_rate"}
"""What timm drops by itself: its name here, and timm's for the rate."""


def build_model(
    name: str,
    stem: str,
    num_classes: int,
    *,
    weights: str | None = None,
    own: tuple[str, float] | None = None,
) -> nn.Module:
    """Create a model, on request with trained weights or with the small-image stem of ResNets.

    Args:
        name: a name that timm knows, or "small_resnet": four stages of one basic block with 32, 64, 128 and
            256 channels, after ResNet's stem of 64; or "small_vit", for images of 32 pixels: four blocks of
            64 channels on patches of 4 pixels.
        stem: "timm" keeps the stem; "cifar" gives a ResNet a 3x3 convolution of stride 1 without pooling.
        num_classes: outputs.
        weights: "timm" loads the weights that timm has for the model, downloaded once, and a file those in
            it; None draws random ones. A classifier of another number of classes stays random.
        own: one of `OWN_RATES` and its probability in [0, 1): that timm drops the last residual branch, and
            less before it, or a patch.

    Returns:
        The model.

    Raises:
        ValueError: if timm does not know the model or has no weights for it, `weights` is no file, or there
            is no ResNet stem to replace.
    """
    timm_name, shape = SMALL.get(name, (name, {}))
    if not timm.is_model(timm_name):
        near = get_close_matches(name, [*SMALL, *timm.list_models()], n=3)
        raise ValueError(f"model must be a name that timm knows, got {name!r}; nearest: {', '.join(near)}")
    options = {**shape, OWN_RATES[own[0]]: own[1]} if own else shape
    if weights is not None:
        options = {**options, **_trained(name, weights)}
    model = timm.create_model(timm_name, num_classes=num_classes, **options)
    if name == "small_vit":
        _unfuse_attention(model)
    if stem == "cifar":
        _replace_stem(model, name)
    return model


def _unfuse_attention(model: nn.Module) -> None:
    """Compute attention in parts, which on a CPU in bfloat16 is faster than PyTorch's fused attention."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # pyright: ignore[reportArgumentType]


def _trained(name: str, weights: str) -> dict[str, Any]:
    if weights == "timm":
        if not timm.is_model_pretrained(name):
            raise ValueError(f"weights must be None or a file for {name}, which timm has no weights for")
        return {"pretrained": True}
    if not Path(weights).is_file():
        raise ValueError(f"weights must be 'timm' or an existing file, got {weights!r}")
    return {"pretrained": True, "pretrained_cfg_overlay": {"file": weights}}


def trained_moments(name: str) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, (3, 1, 1), by which timm's weights for a model want images normalised."""
    known: Any = timm.get_pretrained_cfg(SMALL.get(name, (name,))[0])
    return torch.tensor(known.mean).reshape(-1, 1, 1), torch.tensor(known.std).reshape(-1, 1, 1)


@torch.no_grad()
def tell_channels(model: nn.Module) -> None:
    """Let modules that do not tell their number of channels, such as activations, tell it as out_channels.

    Args:
        model: for images of three channels; it is run once on one.
    """

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if count_channels(module) is None and output.ndim > 1:
            module.out_channels = output.shape[1]  # pyright: ignore[reportArgumentType]

    handles = [module.register_forward_hook(note) for module in model.modules()]
    was_training = model.training
    model.eval()(torch.zeros(1, 3, 32, 32))
    model.train(was_training)
    for handle in handles:
        handle.remove()


def _replace_stem(model: nn.Module, name: str) -> None:
    stems = [m for m in getattr(model, "conv1", nn.Identity()).modules() if isinstance(m, nn.Conv2d)]
    if not stems or not hasattr(model, "maxpool"):
        raise ValueError(f"stem='cifar' needs a ResNet with conv1 and maxpool, got model={name!r}")
    model.conv1 = nn.Conv2d(3, stems[-1].out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
