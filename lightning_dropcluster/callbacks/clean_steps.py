"""Clean steps: they drop nothing, for running averages and for a drop_prob that follows a loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_dropcluster.callbacks import training
from lightning_dropcluster.callbacks.auto_drop_prob import AutoDropProb
from lightning_dropcluster.layers.norm_statistics import NormStatistics, is_clean_step

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer


class CleanSteps:
    """Says which steps are clean, and sees to what they are for."""

    def __init__(self, keeps_statistics: bool, auto: AutoDropProb | None) -> None:
        self.keeps_statistics, self.auto = keeps_statistics, auto
        self.statistics = NormStatistics()
        self._follows_loss = self._drops = self._is_clean = False
        self._is_alone = True

    def reset(self) -> None:
        """Forget an earlier training."""
        self.statistics.left_out = 0
        if self.auto is not None:
            self.auto.reset()

    def attach(self, model: nn.Module, others: Iterable[CleanSteps]) -> None:
        """Look for running averages, after which all callbacks of a Trainer look together."""
        others = list(others)
        self._follows_loss, self._is_alone = self.auto is not None, not others
        for other in others:
            other._is_alone = False
            self.statistics = other.statistics  # one that keeps them makes steps clean for all
            if self.auto is not None or other.auto is not None:  # no loss counts in which another drops
                self._follows_loss = other._follows_loss = True
        self.look_at(model)

    def look_at(self, model: nn.Module) -> None:
        """Look for running averages anew; layers may have been exchanged."""
        if self.keeps_statistics:
            self.statistics.attach(model)

    def detach(self) -> None:
        """Undo what an unfinished step has changed, and let go of the model."""
        self.statistics.cancel_step()
        self.statistics = NormStatistics(self.statistics.left_out)

    def is_due(self, trainer: Trainer, batches_left: float) -> bool:
        """Whether the coming step is to be clean."""
        is_clean = is_clean_step(training.batch_of_all(trainer), batches_left)
        return is_clean and (self._follows_loss or self.statistics.are_moving())

    def begin_step(self, drop_prob: float, is_clean: bool) -> None:
        """Say whether a step drops; with a drop_prob of NaN it does, nobody knows how much."""
        self._drops, self._is_clean = drop_prob != 0.0 and not is_clean, is_clean
        self.statistics.begin_step(self._drops)

    def end_step(self, trainer: Trainer, outputs: Any) -> None:
        """Count a step that dropped, and take in the loss of others."""
        self.statistics.end_step()
        if self.auto is not None and not self._drops and (self._is_clean or self._is_alone):
            loss = training.training_loss(trainer, outputs)
            if loss is not None:
                self.auto.add(loss)

    def cancel_step(self) -> None:
        """Leave no trace of a step that never ended."""
        self.statistics.cancel_step()

    def follow(self, trainer: Trainer, pl_module: LightningModule, monitor: str) -> str | None:
        """Let the drop probability follow the validation loss; every rank must call this.

        Returns:
            A warning where the trial validation lacks it: some modules log nothing there.
        """
        if self.auto is None or trainer.state.fn != "fit":
            return None
        loss = trainer.callback_metrics.get(monitor)
        logged = ", ".join(map(repr, sorted(trainer.callback_metrics))) or "nothing"
        lack = (
            f"monitor={monitor!r}: drop_prob='auto' needs it, but validation did not log it; logged: {logged}"
        )
        if trainer.sanity_checking:
            return lack if loss is None else None
        if not self.auto.compare(None if loss is None else float(loss), pl_module.device):
            raise ValueError(lack)
        if not self.auto.has_losses:
            raise ValueError(
                "drop_prob='auto': needs the training loss; let training_step return it, also with manual "
                "optimisation"
            )
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return plain scalars, for `load_state_dict`."""
        auto = None if self.auto is None else self.auto.state_dict()
        return {"left_out": self.statistics.left_out, "auto": auto}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; one of an older version says nothing of clean steps."""
        self.statistics.left_out = state.get("left_out", 0)
        if self.auto is not None and state.get("auto") is not None:
            self.auto.load_state_dict(state["auto"])
