"""What the regularisers have in common."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_dropcluster.checks import check_bool, check_number
from lightning_dropcluster.methods.masking import draw_uniform


class Regularizer(nn.Module, ABC):
    """A module x -> x that acts at random in training and is the identity in eval mode.

    Args:
        paired: whether the two halves of each batch are to be treated as differently as possible; see
            `draw_uniform`. For the two passes of R-Block.

    Attributes:
        shift: see `draw_uniform`; for ranks that are seeded alike.

    Raises:
        TypeError: if an argument has the wrong type.
    """

    def __init__(self, *, paired: bool = False) -> None:
        super().__init__()
        check_bool("paired", paired)
        self.paired, self.shift = paired, 0.0

    def forward(self, x: Tensor) -> Tensor:
        """Regularise an activation.

        Args:
            x: (N, C, *spatial), floating point.

        Returns:
            A tensor like ``x``; in eval mode ``x`` itself.
        """
        return self.regularize(x) if self.training else x

    @abstractmethod
    def regularize(self, x: Tensor) -> Tensor:
        """Do what `forward` does in training.

        Args:
            x: (N, C, *spatial), floating point.

        Returns:
            A tensor like ``x``.
        """

    def draw(self, shape: Sequence[int], *, device: torch.device | None = None) -> Tensor:
        """Draw uniform numbers with the module's shift and pairing.

        Args:
            shape: the batch first.
            device: where to draw.

        Returns:
            Numbers in [0, 1) of that shape.
        """
        return draw_uniform(shape, device=device, shift=self.shift, paired=self.paired)

    def extra_repr(self) -> str:
        """Return the settings, as `repr` shows them."""
        return ", ".join(f"{name}={value!r}" for name, value in self._settings().items())

    def _settings(self) -> dict[str, object]:
        return {"paired": True} if self.paired else {}


class DropRegularizer(Regularizer):
    """A regulariser with a drop probability; the identity where that is 0.

    The probability is a tensor, so that it may change without recompilation. It is no part of the state_dict,
    like that of torch's own dropout.

    Args:
        drop_prob: probability in [0, 1) that a feature is dropped.
        paired: see `Regularizer`.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if it is out of range.
    """

    drop_prob: Tensor

    def __init__(self, drop_prob: float = 0.1, *, paired: bool = False) -> None:
        super().__init__(paired=paired)
        self.register_buffer("drop_prob", torch.zeros(()), persistent=False)
        self.set_drop_prob(drop_prob)

    def set_drop_prob(self, drop_prob: float) -> None:
        """Set the drop probability in place.

        Args:
            drop_prob: in [0, 1).

        Raises:
            TypeError: if it is no number.
            ValueError: if it is out of range.
        """
        drop_prob = check_number("drop_prob", drop_prob, 0, 1, high_open=True)
        # At 1, to which its type or float32 may round, what is kept would be scaled without end.
        eps = max(torch.finfo(kind).eps for kind in (self.drop_prob.dtype, torch.float32))
        self.drop_prob.fill_(min(drop_prob, 1.0 - eps / 2.0))

    def _settings(self) -> dict[str, object]:
        return {"drop_prob": float(f"{self.drop_prob.item():.4g}"), **super()._settings()}
