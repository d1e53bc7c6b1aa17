"""Plain tensors: what is inside the tensor types of other libraries and of torch.func."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function


class NotSeen(RuntimeError):
    """A transform of torch.func does not let anyone see the values behind it."""


def has_own_arithmetic(x: Tensor) -> bool:
    """Whether torch's functions run Python code of the tensor's class, as MONAI's or fastai's."""
    return type(x) is not Tensor and type(x).__torch_function__ is not torch._C._disabled_torch_function_impl


def as_plain(x: Tensor) -> Tensor:
    """Return the same tensor without a class that has its own arithmetic."""
    return Tensor.as_subclass(x, Tensor) if has_own_arithmetic(x) else x


def apply_plainly(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a function to plain values; its result is of the user's class, as if torch had made it."""

    def on_plain(x: Tensor) -> Tensor:
        return function(as_plain(x))

    return handle_torch_function(on_plain, (x,), x) if has_own_arithmetic(x) else function(x)


def see(x: Tensor, look: Callable[[Tensor], None]) -> None:
    """Show plain values (N, ...), without their history, to a function that only looks at them.

    Under the transforms of torch.func the batch is all that they map over, and what they trace is let be.
    """
    shown = False

    def note_and_look(x: Tensor) -> None:
        nonlocal shown
        shown = True
        look(x)

    try:
        _See.apply(as_plain(x).detach(), note_and_look)
    except Exception as error:
        if shown:
            raise
        raise NotSeen(str(error)) from error


class _See(torch.autograd.Function):
    """torch.func unwraps the inputs of such a function, level by level, and leaves the rule of vmap to it."""

    @staticmethod
    def forward(x: Tensor, look: Callable[[Tensor], None]) -> Tensor:
        look(x)
        return x.new_empty(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, None], *args: Any) -> Any:
        x, look = args
        return _See.apply(x.movedim(in_dims[0], 0).flatten(0, 1), look), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        return None

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, None
