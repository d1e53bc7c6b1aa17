"""The drop probability that follows how much the network overfits."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_dropcluster import ranks

MARGIN = 0.1
"""A gap of so much of the first loss is no overfitting yet."""

_NEGLIGIBLE = 0.02  # what drops less is not worth its clean steps


class AutoDropProb:
    """Sets drop_prob by the gap between validation and training loss, as a share of the first loss.

    After each validation drop_prob moves half the way to (share - MARGIN) / (1 - MARGIN), where the share is
    (validation loss - training loss) / first loss. The training loss is the mean over the steps since the
    validation before that dropped nothing, since what is dropped would raise it; the first loss, that of the
    first step, is the loss of a network that knows nothing. As a share of the validation loss, the gap would
    call a fine-tuned network overfitted as soon as its training loss nears zero. Where losses fall below
    zero, the share is of the way that they have come.

    A validation loss counts for at most the first one. What is above that comes from an unsteady training,
    such as fine-tuning at a high rate, at least as much as from overfitting, and dropping would add to it.
    """

    def __init__(self, max_drop_prob: float) -> None:
        self.max_drop_prob = max_drop_prob
        self.reset()

    def reset(self) -> None:
        """Go back to before the first step."""
        self.drop_prob = 0.0
        self._first: Tensor | float | None = None
        self._ceiling: float | None = None
        self._sum: Tensor | float = 0.0
        self._count = 0
        self.has_losses = self.has_compared = False

    def add(self, loss: Tensor) -> None:
        """Add the loss of a step that dropped nothing, without waiting for its device."""
        self.has_losses = True
        loss = loss.detach().float().mean()
        if self._first is None:
            self._first = loss
        self._sum, self._count = self._sum + loss, self._count + 1

    def compare(self, validation_loss: float | None, device: torch.device) -> bool:
        """Set drop_prob after a validation, and tell if any rank has a loss; all ranks must call this."""
        first = 0.0 if self._first is None else float(self._first)
        known = [first, float(self._sum), self._count, validation_loss or 0.0, validation_loss is not None]
        totals = ranks.sum_over_ranks(torch.tensor(known, dtype=torch.float32, device=device)).tolist()
        first, count, told = totals[0] / ranks.world_size(), totals[2], totals[4]
        if count and told:
            self._first = first if math.isfinite(first) else None
            self._sum, self._count, self.has_compared = 0.0, 0, True
            target = self._target(first, totals[1] / count, totals[3] / told)
            moved = (self.drop_prob + target) / 2
            self.drop_prob = moved if moved >= _NEGLIGIBLE else 0.0
        return bool(told)

    def state_dict(self) -> dict[str, Any]:
        """Return plain scalars, for `load_state_dict`."""
        return {
            "drop_prob": self.drop_prob,
            "first": None if self._first is None else float(self._first),
            "ceiling": self._ceiling,
            "sum": float(self._sum),
            "count": self._count,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; with a lower max_drop_prob than before, from that."""
        self.drop_prob = min(state["drop_prob"], self.max_drop_prob)
        self._first, self._sum, self._count = state["first"], state["sum"], state["count"]
        self._ceiling = state.get("ceiling")  # not in the states of earlier versions
        self.has_losses, self.has_compared = self._first is not None, self.drop_prob > 0.0

    def _target(self, first: float, training: float, validation: float) -> float:
        """Where drop_prob is to go; where it is, if a loss is NaN or infinite."""
        scale = first - min(0.0, training)
        if not all(map(math.isfinite, (scale, training, validation))):
            return self.drop_prob
        if self._ceiling is None:
            self._ceiling = validation
        share = (min(validation, self._ceiling) - training) / scale if scale > 0.0 else 0.0
        return min(max((share - MARGIN) / (1.0 - MARGIN), 0.0), self.max_drop_prob)
