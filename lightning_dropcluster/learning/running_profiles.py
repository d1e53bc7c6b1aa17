"""Running profiles: the response profiles of earlier gathering windows, fading."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F


class RunningProfiles:
    """Blend the response profiles of each window with those of the windows before it.

    Small windows then suffice: many small updates of the clusters, each warm-started, in place of few large
    ones. The scheme is the samples memory of Online Deep Clustering, https://arxiv.org/abs/2006.10645, which
    blends features as (1 - m) old + m new and normalises them. Where we differ: sketches of two windows have
    independent signs, so it is the square roots of the shares that weigh profiles, and what is blended is
    in effect the correlations between features: momentum x old + (1 - momentum) x new. At a momentum of 0
    nothing is kept.
    """

    def __init__(self, momentum: float) -> None:
        self.momentum = momentum
        self._profiles: dict[str, tuple[int, Tensor]] = {}

    def clear(self) -> None:
        """Forget all windows."""
        self._profiles.clear()

    def blend(self, name: str, profiles: Tensor, *, observations: int, first: int = 0) -> Tensor:
        """Add a window's profiles (B, *grid, D), and return those of all windows so far of that shape.

        Fewer observations than D fill the first columns alone, and what was kept moves out of their way.
        ``first`` is the first of these problems in the layer; what was kept of others is forgotten. An item
        is zero as long as it has never changed.
        """
        if not self.momentum:
            return profiles
        where, before = self._profiles.get(name, (first, None))
        if before is not None and where == first and before.shape == profiles.shape:
            blended = before.to(profiles.device).roll(observations, dims=-1) * self.momentum**0.5
            profiles = F.normalize(blended.add_(profiles, alpha=(1.0 - self.momentum) ** 0.5), dim=-1)
        self._profiles[name] = (first, profiles)
        return profiles

    def state_dict(self) -> dict[str, Any]:
        """Return the profiles on the CPU; of a single process, which has all problems."""
        return {name: profiles.cpu() for name, (_, profiles) in self._profiles.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on with the profiles of a checkpoint, unless nothing is to be kept."""
        kept = state if self.momentum else {}
        self._profiles = {name: (0, profiles) for name, profiles in kept.items()}
