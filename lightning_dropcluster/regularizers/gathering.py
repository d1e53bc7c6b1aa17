"""Gathering: a sketch in front of a regulariser."""

from torch import Tensor, nn

from lightning_dropcluster.sketch import Sketch


class Gathering(nn.Module):
    """Show activations to a sketch while a gathering window is open, then hand them to a regulariser.

    The attributes are for the owner to set between steps; a forward pass changes ``first_call``, ``shape``
    and ``other_channels`` alone. That makes three variants of it for ``torch.compile``: idle, dropping,
    gathering and dropping.

    Args:
        regularizer: module x -> x, or ``None`` as long as there is nothing to apply.

    Attributes:
        active: whether to regularise.
        sketch: where to gather, ``None`` while no window is open. Activations of another shape are left out.
        first_call: whether the next call is the first of its step. Only that one is gathered: a layer may run
            several times in a step, and activation checkpointing runs it again in the backward pass.
        shape: shape without the batch of the last first call, ``None`` before any.
        other_channels: number of channels of a later call, where it was another; ``None`` otherwise.
    """

    def __init__(self, regularizer: nn.Module | None = None) -> None:
        super().__init__()
        self.regularizer = regularizer
        self.sketch: Sketch | None = None
        self.active = False
        self.first_call = True
        self.shape: tuple[int, ...] | None = None
        self.other_channels: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Gather and regularise an activation.

        Args:
            x: (N, C, *spatial).

        Returns:
            What the regulariser makes of ``x``; gathering does not touch it.
        """
        if self.first_call:
            self.first_call = False
            self.shape = tuple(x.shape[1:])
            if self.sketch is not None and self.sketch.shape == self.shape:
                self.sketch.update(x)
        elif self.shape is not None and x.shape[1] != self.shape[0]:
            self.other_channels = x.shape[1]
        return self.regularizer(x) if self.active and self.regularizer is not None else x
