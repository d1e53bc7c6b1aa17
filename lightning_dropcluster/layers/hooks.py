"""What is hung on a layer: gather its output, then regularise it."""

from contextlib import suppress
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_dropcluster.layers.channels import Layout
from lightning_dropcluster.layers.plain import NotSeen, apply_plainly, see
from lightning_dropcluster.memory import is_out_of_memory


class Gatherer(Protocol):
    """Takes the outputs of a layer while a gathering window is open; `Sketch` is the one in use."""

    shape: tuple[int, ...]

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Whether it takes outputs of that shape."""
        ...

    def update(self, x: Tensor) -> None:
        """Add a batch (N, *shape)."""
        ...


class LayerHook:
    """A forward hook that shows the output of a layer to a sketch, then hands it to a regulariser.

    It acts only while the layer is in training mode. The owner sets some attributes between steps, and a call
    sets those that tell what it saw. So ``torch.compile`` sees three variants: idle, dropping, gathering and
    dropping. Sketch and regulariser get plain tensors with the channels first; the hook returns the type and
    the layout that the layer gave.
    """

    def __init__(
        self, name: str, layer: nn.Module, regularizer: nn.Module | None, *, in_eval: bool = False
    ) -> None:
        self.name, self.regularizer, self.in_eval = name, regularizer, in_eval
        # Set by the owner between steps. DDP waits for the gradient of every parameter in every step: with
        # `touches`, those of a regulariser that is not active take part with gradients of zero. Only the
        # first call of a step is gathered: a layer may run twice, and checkpointing runs it again.
        self.sketch: Gatherer | None = None
        self.active, self.touches, self.suspended, self.first_call = True, False, False, False
        self.layout = Layout()
        self.table_shape: tuple[int, ...] | None = None  # of labels: (C or 1, *spatial)
        # Acts once, on a copy of the first output, so that what refuses its shape does so at once.
        self.trial: nn.Module | None = None
        # Set by a call: what it saw.
        self.fired = False
        self.shape: tuple[int, ...] | None = None
        self.batch_size = 0
        self.gather_error: Exception | None = None
        self.other_channels: int | None = None  # of a later call
        # A conv says how many dimensions a batch has; of other layers anything with a batch will do.
        self.num_dims = len(layer.kernel_size) + 2 if isinstance(layer, _ConvNd) else None

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Tensor | None:
        """Look at the output of the layer, as torch calls a forward hook."""
        if not (module.training or self.in_eval) or self.suspended:
            return None
        self._check(module, output)
        self.fired = True
        features, prefix = self.layout.split(output)
        if not torch.compiler.is_compiling():  # it would be compiled anew with the first labels
            self._check_labels(features)
        self._gather(features)
        if self.regularizer is None:
            return None
        if self.active:
            return self.layout.join(apply_plainly(self._regularize, features), prefix, output)
        if not torch.compiler.is_compiling() and self.trial is not None:
            self._try(features)
        return self._touch(output) if self.touches else None

    def _check(self, module: nn.Module, output: Any) -> None:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            what = f"the output of {self.name!r} ({type(module).__name__}) is {_describe(output)}"
            if self.layout.channel_dim is None:
                raise TypeError(
                    f"layers=None: takes {self.name!r} for a stage, but {what}; name other layers"
                )
            raise TypeError(f"layers: {what}; it must be one floating-point tensor")
        if output.ndim != self.num_dims if self.num_dims else output.ndim < 2:
            raise ValueError(
                f"layers: the output of {self.name!r} has shape {tuple(output.shape)}; "
                f"it must be a batch, of {self.num_dims or 'at least 2'} dimensions"
            )
        self.layout.check(self.name, output.shape)

    def _check_labels(self, x: Tensor) -> None:
        table = self.table_shape
        if table is not None and (len(table) != x.ndim - 1 or table[0] not in (1, x.shape[1])):
            raise ValueError(
                f"labels of layer {self.name!r}, a table of shape {table}, do not fit its features of shape "
                f"{tuple(x.shape[1:])}"
            )

    def _gather(self, x: Tensor) -> None:
        if torch.compiler.is_compiling() and self.sketch is None:
            # To look at `first_call` would make two variants of each where a layer runs twice.
            self.shape, self.batch_size = tuple(x.shape[1:]), x.shape[0]
        elif self.first_call:
            self.first_call = False
            self.shape, self.batch_size = tuple(x.shape[1:]), x.shape[0]
            if self.sketch is not None and self.sketch.takes(self.shape):
                self._show(x, self.sketch)
        elif self.shape is not None and x.shape[1] != self.shape[0]:
            self.other_channels = x.shape[1]

    def _show(self, x: Tensor, sketch: Gatherer) -> None:
        """Let a sketch see the output; training goes on where it cannot, and the owner will see to that."""
        if torch.compiler.is_compiling():
            return sketch.update(x)
        try:
            see(x, sketch.update)
        except Exception as error:
            if not (isinstance(error, NotSeen) or is_out_of_memory(error)):
                raise
            self.sketch = None
            self.gather_error = error.with_traceback(None)  # which would hold activations
        return None

    def _try(self, x: Tensor) -> None:
        trial: Any = self.trial
        self.trial = None

        def check(seen: Tensor) -> None:
            _check_made(trial, seen, trial.to(seen.device)(seen.clone()))

        with suppress(NotSeen), torch.no_grad(), torch.random.fork_rng([x.device] if x.is_cuda else []):
            see(x, check)

    def _regularize(self, x: Tensor) -> Tensor:
        regularizer: Any = self.regularizer
        if not torch.compiler.is_compiling() and _device(regularizer) not in (None, x.device):
            regularizer.to(x.device)  # a model may be spread over devices, and be so after it was hooked
        return _check_made(regularizer, x, regularizer(x)).to(x.dtype)

    def _touch(self, x: Tensor) -> Tensor:
        parameters = self.regularizer.parameters()  # pyright: ignore[reportOptionalMemberAccess]
        return sum((0.0 * parameter.sum().to(x.dtype) for parameter in parameters), start=x)


def _check_made(regularizer: Any, x: Tensor, made: Any) -> Tensor:
    if not isinstance(made, Tensor) or made.shape != x.shape:
        raise ValueError(
            f"regularizer: {type(regularizer).__name__} must return a tensor of shape {tuple(x.shape)} as it "
            f"was given, but returned {_describe(made)}"
        )
    return made


def _device(module: nn.Module) -> torch.device | None:
    return next((tensor.device for tensor in chain(module.parameters(), module.buffers())), None)


def _describe(output: Any) -> str:
    if not isinstance(output, Tensor):
        return f"a {type(output).__name__}"
    return f"a {output.dtype} tensor of shape {tuple(output.shape)}"
