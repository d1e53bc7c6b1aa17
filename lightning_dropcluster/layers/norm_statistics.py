"""Running averages of normalisation layers, taken from the training steps that drop nothing."""

import math
from collections.abc import Iterable
from random import Random

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_dropcluster import ranks

_AVERAGES = ("running_mean", "running_var", "running_std")
_COUNT = "num_batches_tracked"
_OTHER_COUNT = "count"  # of normalisers that weigh all of the past alike
CLEAN_EVERY = 8
"""One training step in so many drops nothing."""
_LAST = 20


def is_clean_step(batch: int, left: float = math.inf) -> bool:
    """Tell whether a training step is one that drops nothing, alike for all callbacks and ranks.

    One batch in each block of `CLEAN_EVERY` is, at a place drawn anew for each block: at a fixed place, data
    that come in turns would always show the same turn. The first batch of all is clean, so that averages
    never start from what was dropped, and so are the last `_LAST`, or the last tenth of a short training:
    they leave the trained network with averages of as many batches as any other.
    """
    if left <= min(_LAST, (batch + left) / 10):
        return True
    block, place = divmod(batch, CLEAN_EVERY)
    return place == (Random(block).randrange(CLEAN_EVERY) if block else 0)


class NormStatistics:
    """Keeps the running averages of BatchNorm and its like free of what dropping does to activations.

    Behind a layer that drops, sums over features vary more than in evaluation, where nothing is dropped
    (https://arxiv.org/abs/1801.05134). So one step in `CLEAN_EVERY` drops nothing, and running averages
    follow these clean steps alone: after every other step they are put back. A clean step counts for
    the steps left out before it too, so that averages forget what they began with as fast as ever; later for
    half of them, which lets averages lag a little and makes them less noisy. Nothing is computed twice, and
    averages are right at any moment between two steps.

    It takes all modules that own such buffers and are in training mode, and looks at them before the first
    pass of a step and at the end of each: what is written outside of passes, such as weights that are loaded
    between two steps, or into a copy that follows the model, stays as it is.
    """

    def __init__(self, left_out: int = 0) -> None:
        self.left_out = left_out  # steps since the last that counted
        self._norms: list[nn.Module] = []
        self._moving: list[nn.Module] = []
        self._before: list[Tensor] = []
        self._is_open = self._is_noted = self._drops = False
        self._depth = 0  # of passes: with manual optimisation backward runs within the training step

    def attach(self, model: nn.Module) -> None:
        """Look for running averages in a model."""
        self._norms = [module for module in model.modules() if _has_averages(module)]

    def are_moving(self) -> bool:
        """Whether any layer takes new averages in training."""
        return any(_moves(norm) for norm in self._norms)

    def begin_step(self, drops: bool) -> None:
        """Let a step begin; every callback says whether it drops in it."""
        if not self._is_open:
            self._is_open, self._is_noted, self._drops, self._depth = True, False, False, 0
        self._drops |= drops

    def begin_pass(self) -> None:
        """Note the averages before the first pass of a step."""
        self._depth += 1
        if not self._is_open or self._is_noted:
            return
        self._moving = [norm for norm in self._norms if _moves(norm) and not _is_lazy(norm)]
        now = self._buffers()
        if self._drops and not self.left_out:
            _make_equal(now)
        if [_kind(b) for b in now] != [_kind(b) for b in self._before]:
            self._before = [torch.empty_like(buffer) for buffer in now]
        _copy(now, self._before)
        self._is_noted = True

    def end_pass(self) -> None:
        """Put the averages back after a pass that dropped; let a clean step count for those left out.

        Backward is such a pass too: where activations are recomputed, averages move again.
        """
        self._depth -= 1
        if self._drops:
            self._put_back()
        elif self._is_open and self._is_noted and self.left_out and self._depth == 0:
            self._catch_up()
            self.left_out = 0

    def end_step(self) -> None:
        """Count a step that dropped while averages moved; its passes have ended."""
        if self._is_open and self._is_noted and self._drops and self._moving:
            self.left_out += 1
        self._is_open = False

    def cancel_step(self) -> None:
        """Undo what an unfinished step has changed, if it drops, and count it for nothing."""
        if self._drops:
            self._put_back()
        self._is_open = False

    def _put_back(self) -> None:
        if self._is_open and self._is_noted:
            _copy(self._before, self._buffers())

    def _buffers(self) -> list[Tensor]:
        """Looked up each time, since modules may be given new ones."""
        return [buffer for norm in self._moving for buffer in _averages(norm).values()]

    def _catch_up(self) -> None:
        """Move averages as far as if the steps left out, later half of them, had been like this one.

        A layer that runs n times in a step moves by 1 - (1 - momentum)^n of the way; this goes on along the
        same way, and never past its end.
        """
        now = self._buffers()
        pairs = [(old, new) for old, new in zip(self._before, now, strict=True) if new.is_floating_point()]
        if not pairs:
            return
        old, new = (_flat(side, self._before[0].device) for side in zip(*pairs, strict=True))
        moved = ranks.average_over_ranks(torch.lerp(old, new, self._factors(old != new).to(old.dtype)))
        _write(moved, [target for _, target in pairs])

    def _factors(self, has_moved: Tensor) -> Tensor:
        """How much farther each value of each average is to go; 1 where all steps weigh alike.

        InstanceNorm and others do not count their runs: where they have moved, it was one.
        """
        before, device, counts_before, counts, sizes = iter(self._before), has_moved.device, [], [], []
        zero = torch.zeros((), dtype=torch.int64, device=device)
        for norm in self._moving:
            old, new = {name: next(before) for name in _averages(norm)}, _averages(norm)
            counts_before.append(old.get(_COUNT, zero).to(device))
            counts.append(new.get(_COUNT, zero).to(device))
            sizes.append(sum(value.numel() for value in new.values() if value.is_floating_point()))
        counted = torch.stack(counts_before)
        momenta = [getattr(norm, "momentum", None) or math.nan for norm in self._moving]
        momentum, repeats = (
            torch.tensor(values, dtype=kind).to(device, non_blocking=True)  # the host goes on
            for values, kind in ((momenta, torch.float32), (sizes, torch.int64))
        )
        share = (1.0 / (momentum * counted)).clamp(0.5, 1.0)
        each = torch.stack([momentum, share, torch.stack(counts) - counted])
        momentum, share, run = each.repeat_interleave(repeats, dim=1, output_size=len(has_moved))
        kept = (1.0 - momentum) ** torch.maximum(run, has_moved.float())
        return ((1.0 - kept ** (1.0 + share * self.left_out)) / (1.0 - kept)).nan_to_num(1.0)


def _has_averages(module: nn.Module) -> bool:
    is_frozen = type(module).__name__.startswith("Frozen")  # as torchvision's and timm's BatchNorm
    return not is_frozen and any(module._buffers.get(name) is not None for name in _AVERAGES)


def _moves(norm: nn.Module) -> bool:
    """Whether a layer takes new averages; Lightning's BaseFinetuning freezes them in training mode."""
    return norm.training and getattr(norm, "track_running_stats", True)


def _is_lazy(norm: nn.Module) -> bool:
    return any(buffer is not None and is_lazy(buffer) for buffer in norm._buffers.values())


def _averages(norm: nn.Module) -> dict[str, Tensor]:
    """The running averages of a layer, and the count that goes with them."""
    return {
        name: buffer
        for name, buffer in norm._buffers.items()
        if name in (*_AVERAGES, _COUNT, _OTHER_COUNT) and buffer is not None
    }


def _make_equal(averages: list[Tensor]) -> None:
    """Let ranks go on from the same averages.

    Where each kept its own, DDP would still run every step from those of the first rank, and a clean step
    would not move from what was noted.
    """
    floating = [average for average in averages if average.is_floating_point()]
    if floating and ranks.world_size() > 1:
        _write(ranks.average_over_ranks(_flat(floating, floating[0].device)), floating)


def _write(flat: Tensor, targets: list[Tensor]) -> None:
    parts = flat.split([target.numel() for target in targets])
    _copy([part.view_as(target) for target, part in zip(targets, parts, strict=True)], targets)


def _flat(averages: Iterable[Tensor], device: torch.device) -> Tensor:
    flat = torch.cat([average.flatten().to(device) for average in averages])
    return flat.to(torch.promote_types(flat.dtype, torch.float32))


def _copy(source: list[Tensor], target: list[Tensor]) -> None:
    """Copy all of one type at once, which on a GPU takes a few launches.

    Past autograd: a graph that is still to be run backward may have saved the target.
    """
    for kind in {buffer.dtype for buffer in source}:
        pairs = [pair for pair in zip(target, source, strict=True) if pair[1].dtype == kind]
        into, values = [target.data for target, _ in pairs], [value for _, value in pairs]
        torch._foreach_copy_(into, values)  # pyright: ignore[reportPrivateImportUsage]


def _kind(buffer: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return buffer.shape, buffer.dtype, buffer.device
