"""Where an output has its channels: behind the hook they come first, and tokens of an image lie on a grid."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod, sqrt
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dropcluster.layers.selection import count_channels
from lightning_dropcluster.layers.stages import stage_ends
from lightning_dropcluster.layers.wrappers import name_modules

_OF_IMAGES = ("patch_embed", "num_prefix_tokens", "feature_info")  # models with one of these cut images up


@dataclass(frozen=True)
class Layout:
    """How the output of a layer lies.

    It is (N, C, *spatial) where ``channel_dim`` is 1, and (N, *spatial, C) where it is -1; ``None`` is for
    whichever fits ``num_channels``, which is what the layer or timm tells; where both do, they are first,
    but for tokens and models that tell that theirs are last. Where the spatial dimension is one of an image's
    tokens, the first ``num_prefix_tokens`` are no places of the image, but of a class and the
    like; the others are, in a grid.
    """

    channel_dim: int | None = 1
    num_channels: int | None = None
    has_tokens: bool = False
    num_prefix_tokens: int = 0
    grid_size: tuple[int, ...] = ()
    told_last: bool = False

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Refuse outputs whose channels are known to be elsewhere."""
        dim = self._dim(shape)
        if self.num_channels in (None, shape[dim]):
            return
        if self.channel_dim is None:
            raise ValueError(
                f"layers=None: takes {name!r} for a stage of {self.num_channels} channels, but its output "
                f"has shape {tuple(shape)}, neither (N, C, *spatial) nor (N, *spatial, C); name other layers"
            )
        if self.num_channels == shape[-dim]:
            place, remedy = misreading(dim)
            raise ValueError(
                f"channel_dim={dim}: the output of {name!r} has shape {tuple(shape)} with its "
                f"{self.num_channels} channels {place}; {remedy}"
            )

    def split(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return views: of the features (N, C, *spatial), and of the tokens (N, P, C) before them, if any."""
        if self._dim(x.shape) == 1:
            return x, None
        prefix = None
        if self.has_tokens and x.ndim == 3:
            count, *grid = self._places(x.shape[1])
            if count:
                prefix, x = x.split([count, x.shape[1] - count], dim=1)
            x = x.unflatten(1, grid)
        return x.movedim(-1, 1), prefix

    def join(self, features: Tensor, prefix: Tensor | None, like: Tensor) -> Tensor:
        """Undo `split`; the layer's output tells the shape, and whether memory is to be contiguous."""
        if self._dim(like.shape) == 1:
            return features
        x = features.movedim(1, -1)
        x = x.flatten(1, 2) if x.ndim > like.ndim else x
        if prefix is not None:
            return torch.cat([prefix, x], dim=1)
        return x.contiguous() if like.is_contiguous() else x

    def _dim(self, shape: tuple[int, ...]) -> int:
        if self.channel_dim is not None:
            return self.channel_dim
        is_last = shape[-1] == self.num_channels and (self.told_last or (self.has_tokens and len(shape) == 3))
        return 1 if shape[1] == self.num_channels and not is_last else -1

    def _places(self, tokens: int) -> tuple[int, int, int]:
        """Count the tokens before the grid and the sides of the grid; where none fits, it is one row."""
        counts = (self.num_prefix_tokens, 0)  # in some layers they are not there yet
        for count in counts:
            if self.grid_size and tokens - count == prod(self.grid_size):
                return count, *self.grid_size  # pyright: ignore[reportReturnType]
        for count in counts[:1] if self.grid_size else counts:
            side = int(sqrt(max(tokens - count, 0)))  # torch.compile traces no isqrt
            if side and side * side == tokens - count:
                return count, side, side
        count = self.num_prefix_tokens if self.num_prefix_tokens < tokens else 0
        return count, 1, tokens - count


def misreading(channel_dim: int) -> tuple[str, str]:
    """Say where channels are that are not where ``channel_dim`` says, and what to do."""
    return ("last", "give channel_dim=-1") if channel_dim == 1 else ("first", "leave it out")


def find_layouts(
    root: nn.Module, layers: Mapping[str, nn.Module], channel_dim: int | None
) -> dict[str, Layout]:
    """Find out how the outputs of some layers of a model lie, as far as the model tells."""
    named = name_modules(root)
    channels = {id(named[name]): number for name, number in stage_ends(root).items()}
    inside = {id(inner): model for model in root.modules() if _has(model) for inner in model.modules()}
    return {
        name: Layout(
            channel_dim, channels.get(id(layer), count_channels(layer)), **_tokens(inside.get(id(layer)))
        )
        for name, layer in layers.items()
    }


def _has(model: nn.Module) -> bool:
    # Hiera's tokens are not in the order of the rows.
    return any(hasattr(model, name) for name in _OF_IMAGES) and not hasattr(model, "unroll")


def _tokens(model: nn.Module | None) -> dict[str, Any]:
    """What a model tells of its tokens; parts inside it come last, and tell more."""
    if model is None:
        return {}
    count: Any = getattr(model, "num_prefix_tokens", 0)
    grid: Any = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    is_grid = isinstance(grid, tuple | list) and len(grid) == 2 and all(type(n) is int for n in grid)
    return {
        "has_tokens": True,
        "told_last": str(getattr(model, "output_fmt", "")) in ("NHWC", "NLC"),
        "num_prefix_tokens": count if type(count) is int else 0,
        "grid_size": tuple(grid) if is_grid else (),
    }
