"""The sketch: a layer's response profiles in memory that does not grow with the number of samples."""

import math
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dropcluster.scopes import SCOPES, Shape

_WORD = 0xFFFFFFFF
_Number = TypeVar("_Number", int, Tensor)


class Sketch(nn.Module):
    """A random projection of all response profiles of a layer, added up batch by batch.

    Clustering by correlation needs only inner products of centred profiles, and a projection on random signs
    keeps those (Achlioptas 2003, "Database-friendly random projections"). For each item the sketch holds the
    sum of its values times ``sketch_dim`` sign columns, and the plain sum and sum of squares; with the
    columns' own sums the centring is exact. Sketches of batches and of ranks add up. Where no more
    observations are asked for than ``sketch_dim``, each gets a column of its own and the sketch is the
    profile itself.

    Values are held relative to the first observation: an item that never changes is then zero to the last
    bit, and large means cost no precision.

    Args:
        shape: the layer's output shape without the batch, (C, *spatial).
        scope: a name of `SCOPES`; it says what an item and an observation are.
        num_samples: samples to gather; further ones are left out.
        sketch_dim: columns D.
        seed: of the signs.
        window: number of the gathering window; each has signs of its own.
        rank: of this process; the i-th sample here has the index ``i * world_size + rank`` in the window.
        world_size: number of processes.
        device: where the sketch lives.

    Example:
        >>> sketch = Sketch((2, 4, 4), num_samples=8, sketch_dim=16)
        >>> sketch.update(torch.randn(8, 2, 4, 4))
        >>> sketch.profiles().shape
        torch.Size([2, 16, 16])
    """

    moments: Tensor
    squares: Tensor
    origin: Tensor
    column_sums: Tensor
    count: Tensor
    key: Tensor

    def __init__(
        self,
        shape: Shape,
        *,
        scope: str = "map",
        num_samples: int = 1024,
        sketch_dim: int = 64,
        seed: int = 0,
        window: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.scope = SCOPES[scope]
        self.num_samples, self.sketch_dim = num_samples, sketch_dim
        self.rank, self.world_size = rank, world_size
        self.observations = self.scope.observations(self.shape)
        self.is_exact = num_samples * world_size * self.observations <= sketch_dim
        problems, items = self.scope.problems(self.shape)
        num_items = problems * items
        single = {"dtype": torch.float32, "device": device}
        buffers = {
            "moments": torch.zeros(num_items, sketch_dim + 1, **single),  # D projections, then the sum
            "squares": torch.zeros(num_items, **single),
            "origin": torch.zeros(num_items, **single),
            "column_sums": torch.zeros(sketch_dim, **single),
            "count": torch.zeros((), dtype=torch.int64, device=device),
            "key": torch.tensor(_mix(_mix(seed & _WORD) ^ (window & _WORD)), device=device),
        }
        for name, value in buffers.items():
            self.register_buffer(name, value)

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Add a batch of activations.

        Tensor operations alone, without a look at values from the host, so that compiled code can hold it.

        Args:
            x: (N, C, *spatial) of the sketch's shape, any floating type; it is not changed.
        """
        if not len(x):
            return
        with torch.autocast(x.device.type, enabled=False):
            maps = x.detach().float().reshape(len(x), self.shape[0], math.prod(self.shape[1:]))
            rows = self.scope.rows(maps)
            self.origin.copy_(torch.where(self.count == 0, rows[0], self.origin))
            weights = self._weights(len(x))
            # Not left to the zero weights: 0 x inf is NaN.
            rows = (rows - self.origin).masked_fill_(weights[:, -1:] == 0, 0.0)
            self.moments.addmm_(rows.T, weights)
            self.column_sums.add_(weights[:, :-1].sum(0))
            self.squares.addmv_(rows.square_().T, weights[:, -1])
            self.count.copy_((self.count + len(x)).clamp(max=self.num_samples))

    def rebase(self, origin: Tensor) -> None:
        """Hold the values relative to another origin.

        Args:
            origin: (items,) float32.
        """
        delta = self.origin - origin
        rows = self.count * self.observations
        sums = self.moments[:, -1]
        self.squares.add_(2.0 * delta * sums + rows * delta.square())
        self.moments[:, :-1].addr_(delta, self.column_sums)
        sums.add_(rows * delta)
        self.origin.copy_(origin)

    def merge(self, other: "Sketch") -> None:
        """Add another sketch of the same layer and window, as if its samples had been seen here.

        Args:
            other: a sketch of the same settings but for the rank; it is rebased to this one's origin.
        """
        if not self.count:
            self.rebase(other.origin)
        other.rebase(self.origin)
        for name in ("moments", "squares", "column_sums", "count"):
            getattr(self, name).add_(getattr(other, name))

    def is_finite(self) -> bool:
        """Whether no NaN or infinity, and no value whose square overflows, was gathered.

        Returns:
            True where the profiles can be used.
        """
        return bool(torch.isfinite(self.moments).all() & torch.isfinite(self.squares).all())

    def profiles(self) -> Tensor:
        """Return the centred profiles at unit length: squared distances are 2 - 2 x correlation.

        Returns:
            (B, F, D) float32 with the problems B and items F of the scope; all zero for items that never
            changed.
        """
        rows = max(1, int(self.count) * self.observations)
        sums = self.moments[:, -1]
        centred = self.moments[:, :-1].addr(sums / rows, self.column_sums, alpha=-1.0)
        # One of the values is the origin, so the variance of an item that changes at all is at least
        # 1 / (rows + 1) of its mean square: anything far below is rounding.
        variance = self.squares - sums.square() / rows
        alive = variance > 0.1 / (rows + 1) * self.squares
        unit = F.normalize(centred, eps=torch.finfo(torch.float32).tiny) * alive.unsqueeze(1)
        return unit.reshape(*self.scope.problems(self.shape), self.sketch_dim)

    def _weights(self, num_samples: int) -> Tensor:
        """What each new row counts in each column, and in the sums: (N * observations, D + 1)."""
        device = self.key.device
        local = self.count + torch.arange(num_samples, device=device)
        sample = local * self.world_size + self.rank
        row = (sample[:, None] * self.observations + torch.arange(self.observations, device=device)).flatten()
        wanted = (local < self.num_samples).float().repeat_interleave(self.observations)
        if self.is_exact:
            columns = (row[:, None] == torch.arange(self.sketch_dim, device=device)).float()
        else:
            columns = _signs(row, self.sketch_dim, self.key)
        return torch.cat([columns, torch.ones_like(wanted)[:, None]], dim=1) * wanted[:, None]


def _signs(index: Tensor, num_columns: int, key: Tensor) -> Tensor:
    """Hash each index to a row of random signs, (len(index), num_columns) float32."""
    word = torch.arange(-(-num_columns // 32), device=index.device)
    mixed = _mix(_mix((index & _WORD) ^ key) ^ (index >> 32))
    words = _mix((mixed[:, None] + word * 0x9E3779B1) & _WORD)
    bits = (words[:, :, None] >> torch.arange(32, device=index.device)) & 1
    return bits.flatten(1)[:, :num_columns].float() * 2.0 - 1.0


def _mix(value: _Number) -> _Number:
    """Mix 32 bits (Mueller's integer hash); 64-bit integers hold every product without overflow."""
    for _ in range(2):
        value = (((value >> 16) ^ value) * 0x45D9F3B) & _WORD
    return (value >> 16) ^ value
