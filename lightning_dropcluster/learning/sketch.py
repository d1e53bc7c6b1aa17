"""The sketch: a layer's response profiles in memory that does not grow with the number of samples."""

import math
from typing import TypeVar

import torch
from torch import Tensor, nn

from lightning_dropcluster import ranks
from lightning_dropcluster.learning.scopes import SCOPES, Shape

_WORD = 0xFFFFFFFF
_HUGE = 1e18  # squares of larger values overflow
_SLICE = 2**21  # values that stay in the cache of a CPU while they are added
_TINY = torch.finfo(torch.float32).tiny
_Number = TypeVar("_Number", int, Tensor)


class Sketch(nn.Module):
    """A random projection of all response profiles of a layer, added up batch by batch.

    Clustering by correlation needs only inner products of centred profiles, and a random projection keeps
    those. Here the i-th observation is added, with a random sign, to column ``i mod D``: the count sketch
    (Charikar et al. 2002; "Feature hashing", https://arxiv.org/abs/0902.2206), whose inner products have the
    variance of dense random signs at 1 / D of the work. Columns take turns instead of being drawn, so that
    up to D observations each have a column of their own and the sketch is then exact. The sums of the values
    are kept beside it; with the columns' own sums the centring is exact. Sketches of batches and of ranks
    add up.

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
    sums: Tensor
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
        problems, items = self.scope.problems(self.shape)
        num_items = problems * items
        single = {"dtype": torch.float32, "device": device}
        buffers = {
            "moments": torch.zeros(sketch_dim, num_items, **single),
            "sums": torch.zeros(num_items, **single),
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
        with torch.autocast(x.device.type, enabled=False):
            for part in self._parts(x.detach().to(self.key.device)):
                maps = part.float().reshape(len(part), self.shape[0], math.prod(self.shape[1:]))
                self._add(self.scope.rows(maps), len(part))

    def _parts(self, x: Tensor) -> tuple[Tensor, ...]:
        """Leave out samples beyond those asked for; on a CPU, cut the rest into parts that fit the cache."""
        if not len(x):
            return ()
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            x = x[: self.num_samples - int(self.count)]
            return x.split(max(1, _SLICE // math.prod(self.shape))) if len(x) else ()
        # Where the host must not look, they are zeros beside their weight of 0, as 0 x inf is NaN.
        surplus = self.count + torch.arange(len(x), device=x.device) >= self.num_samples
        return (x.masked_fill(surplus.reshape(-1, *(1 for _ in self.shape)), 0.0),)

    def _add(self, rows: Tensor, num_samples: int) -> None:
        """Add the observations (N * observations, items) of some samples."""
        self.origin.copy_(torch.where(self.count == 0, rows[0], self.origin))
        wanted, columns, signs = self._places(num_samples)
        rows = rows - self.origin
        self.sums.addmv_(rows.T, wanted)
        self.moments.index_add_(0, columns, rows.mul_(signs[:, None]))
        self.column_sums.index_add_(0, columns, signs)
        self.count.copy_((self.count + num_samples).clamp(max=self.num_samples))

    def merge(self) -> None:
        """Add up over all ranks, in place; every rank must call this, for the same layers in order."""
        counts = torch.zeros(ranks.world_size(), dtype=torch.int64, device=self.count.device)
        counts[ranks.rank()] = self.count
        filled = ranks.sum_over_ranks(counts).nonzero().flatten()
        if len(counts) > 1 and len(filled):
            self.rebase(ranks.from_rank(self.origin.clone(), int(filled[0])))
            for sums in (self.moments, self.sums, self.column_sums, self.count):
                ranks.sum_over_ranks(sums)

    def rebase(self, origin: Tensor) -> None:
        """Hold the values relative to another origin; sketches of one origin add up.

        Args:
            origin: (items,) float32.
        """
        delta = self.origin - origin
        self.moments.addr_(self.column_sums, delta)
        self.sums.add_(self.count * self.observations * delta)
        self.origin.copy_(origin)

    def is_finite(self) -> bool:
        """Whether no NaN or infinity, and no value whose square overflows, was gathered.

        Returns:
            True where the profiles can be used.
        """
        return bool((self.moments.abs() < _HUGE).all() & (self.sums.abs() < _HUGE).all())

    def profiles(self, problems: slice = slice(None)) -> Tensor:
        """Return the centred profiles at unit length: squared distances are 2 - 2 x correlation.

        Args:
            problems: which of the problems.

        Returns:
            (B, F, D) float32 with the problems B and items F of the scope; all zero for items that never
            changed.
        """
        num_problems, items = self.scope.problems(self.shape)
        block = slice(*(items * bound for bound in problems.indices(num_problems)[:2]))
        moments, sums = self.moments[:, block], self.sums[block]
        rows = max(1, int(self.count) * self.observations)
        centred = moments.addr(self.column_sums, sums / rows, alpha=-1.0)
        # In place, since fresh memory of this size costs more than the arithmetic.
        centred.div_(torch.linalg.vector_norm(centred, dim=0).clamp_(min=_TINY))
        # Relative to the first observation, an item that never changed is zero to the last bit.
        centred.masked_fill_(~moments.any(0), 0.0)
        return centred.T.reshape(-1, items, self.sketch_dim).contiguous()

    def _places(self, num_samples: int) -> tuple[Tensor, Tensor, Tensor]:
        """Whether each new row counts (1.0 or 0.0), its column, and its sign there (0.0 if it does not)."""
        device = self.key.device
        local = self.count + torch.arange(num_samples, device=device)
        sample = local * self.world_size + self.rank
        row = (sample[:, None] * self.observations + torch.arange(self.observations, device=device)).flatten()
        wanted = (local < self.num_samples).float().repeat_interleave(self.observations)
        return wanted, row % self.sketch_dim, _signs(row, self.key) * wanted


def _signs(index: Tensor, key: Tensor) -> Tensor:
    """Hash each index to a random sign, float32."""
    mixed = _mix(_mix((index & _WORD) ^ key) ^ (index >> 32))
    return (mixed & 1).float() * 2.0 - 1.0


def _mix(value: _Number) -> _Number:
    """Mix 32 bits (Mueller's integer hash); 64-bit integers hold every product without overflow."""
    for _ in range(2):
        value = (((value >> 16) ^ value) * 0x45D9F3B) & _WORD
    return (value >> 16) ^ value
