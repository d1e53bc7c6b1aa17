"""What the methods share: draw numbers, drop features, rescale what is kept."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

_LAST = 1.0 - 2.0**-24  # the largest number that torch.rand draws in float32


class Draw(Protocol):
    """Draws numbers uniform in [0, 1); `draw_uniform` is the usual one."""

    def __call__(self, shape: Sequence[int], *, device: torch.device | None = None) -> Tensor:
        """Draw a float32 tensor."""
        ...


def draw_uniform(
    shape: Sequence[int],
    *,
    device: torch.device | None = None,
    shift: float = 0.0,
    paired: bool = False,
) -> Tensor:
    """Draw numbers uniform in [0, 1).

    The draw comes from the default generator of the device, so that activation checkpointing repeats it.

    Args:
        shape: the batch first.
        device: where to draw.
        shift: in [0, 1), added to the draw modulo 1, so that ranks which are seeded alike draw apart.
        paired: whether the second half of the batch gets 1 - u where the first half gets u. What is dropped
            where u < p then differs between the halves as much as p allows: for p up to 1/2, nothing is
            dropped in both.

    Returns:
        A float32 tensor of that shape.

    Raises:
        ValueError: if pairs are asked for of an odd batch.

    Example:
        >>> first, second = draw_uniform((2, 100), paired=True) < 0.4
        >>> (first & second).any().item()
        False
    """
    if paired and shape[0] % 2:
        raise ValueError(f"paired=True: must have an even batch, its halves being the pairs, not {shape[0]}")
    drawn = (shape[0] // 2, *shape[1:]) if paired else tuple(shape)
    uniform = torch.rand(drawn, dtype=torch.float32, device=device)
    if shift:
        uniform = (uniform + shift) % 1.0
    return torch.cat([uniform, _LAST - uniform]) if paired else uniform


def draw_keep_table(
    shape: tuple[int, int, int],
    drop_prob: Tensor | float,
    *,
    device: torch.device | None = None,
    draw: Draw = draw_uniform,
) -> Tensor:
    """Draw which clusters stay.

    Args:
        shape: (samples, maps, clusters).
        drop_prob: probability in [0, 1) that a cluster is dropped; a 0-d tensor avoids recompilation.
        device: where to draw.
        draw: where the uniform numbers come from; `draw_uniform` can also draw apart on ranks that are seeded
            alike, and pairs that drop different clusters.

    Returns:
        A bool table of that shape, True where the cluster stays.

    Example:
        >>> draw_keep_table((2, 3, 4), 0.0).all().item()
        True
    """
    return draw(shape, device=device) >= drop_prob


def drop(x: Tensor, dropped: Tensor, scale: Tensor | float) -> Tensor:
    """Set features to zero and rescale the others.

    Backward saves the mask and the scale, never a product of the activation's size; second derivatives work.

    Example:
        >>> drop(torch.ones(4), torch.tensor([True, False, False, False]), 1.5)
        tensor([0.0000, 1.5000, 1.5000, 1.5000])
    """
    if not isinstance(scale, Tensor):
        scale = torch.full((), scale, dtype=torch.float32, device=x.device)
    return _drop(x, dropped, scale)


def is_transformed() -> bool:
    """Whether a transform of torch.func or forward mode is on, which ask more of a function."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def expected_scale(drop_prob: Tensor | float) -> Tensor | float:
    """Return 1 / (1 - drop_prob), which keeps the mean where each feature is dropped with that probability.

    Example:
        >>> expected_scale(0.5)
        2.0
    """
    return 1.0 / (1.0 - (drop_prob.float() if isinstance(drop_prob, Tensor) else drop_prob))


def kept_ratio(dropped: Tensor) -> Tensor:
    """Return (number of features) / (number kept) over the batch.

    Example:
        >>> kept_ratio(torch.tensor([True, False, False, False]))
        tensor(1.3333)
    """
    # A quotient of integers would take torch's default type, in which Lightning's true half precision
    # counts no further than 65,504. As a sum the ratio is exactly 1 where nothing is dropped: torch divides
    # a number by a tensor by way of its reciprocal.
    count = dropped.count_nonzero()
    kept = (dropped.numel() - count).float()
    return torch.where(kept > 0, 1.0 + count.float() / kept, 1.0)


def _drop(x: Tensor, dropped: Tensor, scale: Tensor) -> Tensor:
    # Dynamo traces no function that defines jvp.
    function = _Drop if torch.compiler.is_compiling() else _TransformableDrop
    return function.apply(x, dropped, scale)  # pyright: ignore[reportReturnType]


class _Drop(torch.autograd.Function):
    """The product with a fixed factor is its own adjoint, so backward applies the function again."""

    @staticmethod
    def forward(x: Tensor, dropped: Tensor, scale: Tensor) -> Tensor:
        return x * torch.where(dropped, 0.0, scale).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _drop(grads[0], *ctx.saved_tensors), None, None


class _TransformableDrop(_Drop):
    """The same for forward mode and for torch.func."""

    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return _drop(tangents[0], *ctx.saved_tensors)
