"""What the Trainer knows of training, as the callbacks ask for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_dropcluster.callbacks.schedule import TrainingPosition

if TYPE_CHECKING:
    from pytorch_lightning import Trainer


def position(trainer: Trainer, batch_idx: int) -> TrainingPosition:
    """Where training is now."""
    return TrainingPosition(
        epoch=trainer.current_epoch,
        step=trainer.global_step,
        batch=batch_idx,
        batches_per_epoch=trainer.num_training_batches,
        max_epochs=_epochs_that_train(trainer),
        max_steps=trainer.max_steps,
        batches_per_step=_batches_per_step(trainer),
    )


def _epochs_that_train(trainer: Trainer) -> int:
    """The limit of epochs, or -1; weight averaging adds one in which nothing is trained."""
    if trainer.max_epochs in (None, -1):
        return -1
    every: list[Any] = list(trainer.callbacks)  # pyright: ignore[reportAttributeAccessIssue]
    return min([trainer.max_epochs, *(one.swa_end + 1 for one in every if hasattr(one, "swa_end"))])


def _batches_per_step(trainer: Trainer) -> float:
    """Batches to a step of an optimiser; with several by hand, as it has been so far."""
    if trainer.lightning_module.automatic_optimization:
        whole, each = trainer.num_training_batches, trainer.accumulate_grad_batches
        # The last step of an epoch takes what is left.
        return whole / math.ceil(whole / each) if 0 < whole < math.inf else each
    return batch_of_all(trainer) / trainer.global_step if trainer.global_step else 1


def batch_of_all(trainer: Trainer) -> int:
    """The number of the batch in all of training, from 0; checkpoints keep it."""
    return trainer.fit_loop.epoch_loop.total_batch_idx


def training_loss(trainer: Trainer, outputs: Any) -> Tensor | None:
    """The loss in what a training step has returned, ``None`` where there is none."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    if not isinstance(loss, Tensor):
        return None
    # Lightning has divided it where it adds gradients up itself.
    return loss * trainer.accumulate_grad_batches if trainer.lightning_module.automatic_optimization else loss


def is_trial(trainer: Trainer) -> bool:
    """Whether training is too short on purpose."""
    return bool(getattr(trainer, "fast_dev_run", False))


def logger_step(trainer: Trainer) -> int:
    """The step under which Lightning sends a batch's values to loggers: batches that have stepped."""
    return getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", trainer.global_step)


def only_updates_statistics(trainer: Trainer) -> bool:
    """Whether this is the epoch in which weight averaging trains nothing but BatchNorm's averages."""
    return bool(getattr(trainer.fit_loop, "_skip_backward", False))
