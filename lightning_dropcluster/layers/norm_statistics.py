"""Running averages of normalisation layers, taken from the training steps that drop nothing."""

from random import Random

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_dropcluster import ranks

CLEAN_EVERY = 8
"""One training step in so many drops nothing."""


def is_clean_step(batch: int) -> bool:
    """Tell whether a training step is one that drops nothing, alike for all callbacks and ranks.

    One batch in each block of `CLEAN_EVERY` is, at a place drawn anew for each block: at a fixed place, data
    that come in turns would always show the same turn. The first batch of all is clean, so that averages
    never start from what was dropped.
    """
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

    It takes all modules that own buffers called ``running_...``.
    """

    def __init__(self, left_out: int = 0) -> None:
        self.left_out = left_out  # steps since the last that counted
        self._norms: list[nn.Module] = []
        self._before: list[Tensor] = []
        self._is_open = self._drops = False

    def attach(self, model: nn.Module) -> bool:
        """Look for running averages in a model, and tell whether there are any."""
        self._norms = [module for module in model.modules() if _has_averages(module)]
        return bool(self._norms)

    def begin_step(self, drops: bool) -> None:
        """Note the averages; every callback says whether it drops in the step."""
        if not self._is_open:
            now = self._buffers()
            if [_kind(b) for b in now] != [_kind(b) for b in self._before]:
                self._before = [torch.empty_like(buffer) for buffer in now]
            _copy(now, self._before)
            self._is_open, self._drops = True, False
        self._drops |= drops

    def put_back(self) -> None:
        """Undo what a step that drops has changed so far."""
        if self._is_open and self._drops:
            _copy(self._before, self._buffers())

    def end_step(self) -> None:
        """Put the averages back after a step that dropped; let a clean one count for those left out."""
        self.put_back()
        if self._is_open and self._drops:
            self.left_out += 1
        elif self._is_open and self.left_out:
            before = iter(self._before)
            for norm in self._norms:
                _catch_up(norm, {name: next(before) for name in _averages(norm)}, self.left_out)
            ranks.average_over_ranks([b for b in self._buffers() if b.is_floating_point()])
            self.left_out = 0
        self._is_open = False

    def cancel_step(self) -> None:
        """Undo what an unfinished step has changed, if it drops, and count it for nothing."""
        self.put_back()
        self._is_open = False

    def _buffers(self) -> list[Tensor]:
        """Looked up each time, since modules may be given new ones."""
        return [buffer for norm in self._norms for buffer in _averages(norm).values()]


def _is_average(name: str) -> bool:
    return name.startswith("running_")


def _has_averages(module: nn.Module) -> bool:
    return any(_is_average(name) and buffer is not None for name, buffer in module._buffers.items())


def _averages(norm: nn.Module) -> dict[str, Tensor]:
    """The running averages of a layer, and the count that goes with them."""
    return {
        name: buffer
        for name, buffer in norm._buffers.items()
        if (_is_average(name) or name == "num_batches_tracked") and buffer is not None and not is_lazy(buffer)
    }


def _catch_up(norm: nn.Module, before: dict[str, Tensor], left_out: int) -> None:
    """Move averages as far as if the steps left out, in the long run half of them, had been like this one.

    A layer that runs n times in a step moves by 1 - (1 - momentum)^n of the way; this goes on along the same
    way, and never past its end.
    """
    momentum, counted = getattr(norm, "momentum", None), before.get("num_batches_tracked")
    if not momentum or counted is None:  # a cumulative average weighs all steps alike
        return
    runs = _averages(norm)["num_batches_tracked"] - counted
    kept = (1.0 - momentum) ** runs.float()
    share = (1.0 / (momentum * counted)).clamp(0.5, 1.0)
    stretch = torch.where(runs > 0, (1.0 - kept ** (1.0 + share * left_out)) / (1.0 - kept), 1.0)
    for name, buffer in _averages(norm).items():
        if _is_average(name):
            buffer.copy_(torch.lerp(before[name], buffer, stretch.to(buffer.dtype)))


def _copy(source: list[Tensor], target: list[Tensor]) -> None:
    if source:
        torch._foreach_copy_(target, source)


def _kind(buffer: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return buffer.shape, buffer.dtype, buffer.device
