"""The sketch: a layer's response profiles in memory that does not grow with the number of samples."""

import math
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from lightning_dropcluster import ranks
from lightning_dropcluster.checks import MAX_INT, check_number
from lightning_dropcluster.learning.scopes import SCOPES, Shape

_WORD = 0xFFFFFFFF
_HUGE = 1e18  # squares of larger values overflow
_SLICE = 2**21  # values that stay in the cache of a CPU while they are added
_TINY = 1e-18  # squares of smaller values underflow
_Number = TypeVar("_Number", int, Tensor)


@dataclass
class SketchSettings:
    """How sketches are made, whatever the layer and the window; the samples are those of all ranks."""

    scope: str = "map"
    num_samples: int = 1024
    sketch_dim: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("num_samples", 1), ("sketch_dim", 1), ("seed", 0)):
            setattr(self, name, check_number(name, getattr(self, name), least, MAX_INT, integer=True))

    @property
    def num_samples_here(self) -> int:
        """This rank's share of the samples."""
        return -(-self.num_samples // ranks.world_size())

    def num_bytes(self, shape: Shape) -> int:
        """Return the size of a layer's sketch: moments, sums and origin, all float32."""
        return 4 * math.prod(SCOPES[self.scope].problems(shape)) * (self.sketch_dim + 2)

    def make(self, shape: Shape, window: int, device: torch.device, *, any_size: bool = False) -> "Sketch":
        """Make this rank's sketch of a layer in the window of that number."""
        return Sketch(
            shape,
            scope=self.scope,
            num_samples=self.num_samples_here,
            sketch_dim=self.sketch_dim,
            seed=self.seed,
            window=window,
            rank=ranks.rank(),
            world_size=ranks.world_size(),
            any_size=any_size,
            device=device,
        )


class Sketch(nn.Module):
    """A random projection of all response profiles of a layer, added up batch by batch.

    Clustering by correlation needs only inner products of centred profiles, and a random projection keeps
    those. Here each observation is added, with a random sign, to one of D columns: the count sketch
    (Charikar et al. 2002; "Feature hashing", https://arxiv.org/abs/0902.2206), whose inner products have the
    variance of dense random signs at 1 / D of the work. In each round of D observations all columns take
    their turn, so that up to D observations each have a column of their own and the sketch is then exact. A
    round begins at a column drawn by a hash, the first at 0: else observations that come round again, as the
    channels of a sample, would fill few columns. The sums of the values are kept beside it; with the columns'
    own sums the centring is exact. Sketches of batches and of ranks add up.

    Values are held relative to the first observation: an item that never changes is then zero to the last
    bit, and large means cost no precision.

    Only the first ``num_samples`` samples count. The i-th of them on this rank has the index
    ``i * world_size + rank`` in the window, and each window has signs of its own. With ``any_size`` maps of
    other sizes are taken too, resized by nearest neighbour, as labels are where they are looked up.

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
        any_size: bool = False,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.scope = SCOPES[scope]
        self.num_samples, self.sketch_dim = num_samples, sketch_dim
        self.rank, self.world_size, self.any_size = rank, world_size, any_size
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

    def takes(self, shape: Shape) -> bool:
        """Whether it takes activations of that shape."""
        alike = shape[0] == self.shape[0] and len(shape) == len(self.shape)
        return shape == self.shape or (self.any_size and alike)

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Add a batch of activations of a shape and of any floating type, which are not changed.

        Tensor operations alone, without a look at values from the host, so that compiled code can hold it.
        """
        with torch.autocast(x.device.type, enabled=False):
            x = self._resized(x.detach().to(self.key.device))
            if _host_may_look(x):
                x = x[: self.num_samples - int(self.count)]
            if len(x):
                self._add(x)

    def _resized(self, x: Tensor) -> Tensor:
        for axis, (size, wanted) in enumerate(zip(x.shape[1:], self.shape, strict=True), start=1):
            if size != wanted:
                x = x.index_select(axis, torch.arange(wanted, device=x.device) * size // wanted)
        return x

    def _add(self, x: Tensor) -> None:
        """Add some samples, in parts, so that little of them is in memory a second time."""
        self.origin.copy_(torch.where(self.count == 0, self._rows(x[:1])[0].float(), self.origin))
        samples, places = self._part_size(x), self._places(len(x))
        parts = zip(*(one.split(samples * self.observations) for one in places), strict=True)
        for part, place in zip(x.split(samples), parts, strict=True):
            self._add_part(part, *place)
        self.count.copy_((self.count + len(x)).clamp(max=self.num_samples))

    def _add_part(self, x: Tensor, wanted: Tensor, columns: Tensor, signs: Tensor) -> None:
        rows = (self._rows(x) - self.origin).float()
        if not _host_may_look(x):
            rows.masked_fill_(wanted[:, None] == 0, 0.0)  # surplus samples, as 0 x inf is NaN
        self.sums.addmv_(rows.T, wanted)
        if _adds_in_order(x):
            self.moments.index_add_(0, columns, rows.mul_(signs[:, None]))
            self.column_sums.index_add_(0, columns, signs)
        else:
            spread = rows.new_zeros(len(rows), self.sketch_dim).scatter_(1, columns[:, None], signs[:, None])
            self.moments.addmm_(spread.T, rows)
            self.column_sums.add_(spread.sum(0))

    def _rows(self, x: Tensor) -> Tensor:
        """Lay samples out as observations (N * observations, items)."""
        return self.scope.rows(x.reshape(len(x), self.shape[0], math.prod(self.shape[1:])))

    def _part_size(self, x: Tensor) -> int:
        """How many samples to add at a time: on a CPU, what fits its cache; elsewhere a quarter.

        Compiled code makes no copies to save.
        """
        if torch.compiler.is_compiling():
            return len(x)
        if x.device.type == "cpu":
            return max(1, _SLICE // math.prod(self.shape))
        return -(-len(x) // 4)

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
        """Hold the values relative to another origin (items,); sketches of one origin add up."""
        delta = self.origin - origin
        self.moments.addr_(self.column_sums, delta)
        self.sums.add_(self.count * self.observations * delta)
        self.origin.copy_(origin)

    def is_finite(self) -> bool:
        """Whether no NaN or infinity, and no value whose square overflows, was gathered."""
        largest = torch.stack([torch.linalg.vector_norm(x, torch.inf) for x in (self.moments, self.sums)])
        return bool((largest < _HUGE).all())  # a norm makes no copy, and is NaN where any value is

    def profiles(self, problems: slice = slice(None)) -> Tensor:
        """Return the centred profiles (B, F, D) of some problems: squared distances are 2 - 2 x correlation.

        They have unit length, but for items that never changed, which are zero, and those that hardly did.
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
        columns = (row + _mix((row // self.sketch_dim) & _WORD)) % self.sketch_dim
        return wanted, columns, _signs(row, self.key) * wanted


def _host_may_look(x: Tensor) -> bool:
    """Whether values are at hand, so that nothing waits for them."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _adds_in_order(x: Tensor) -> bool:
    """Whether additions by index come in order, so that sums are the same each time."""
    return x.device.type == "cpu"


def _signs(index: Tensor, key: Tensor) -> Tensor:
    """Hash each index to a random sign, float32."""
    mixed = _mix(_mix((index & _WORD) ^ key) ^ (index >> 32))
    return (mixed & 1).float() * 2.0 - 1.0


def _mix(value: _Number) -> _Number:
    """Mix 32 bits (Mueller's integer hash); 64-bit integers hold every product without overflow."""
    for _ in range(2):
        value = (((value >> 16) ^ value) * 0x45D9F3B) & _WORD
    return (value >> 16) ^ value
