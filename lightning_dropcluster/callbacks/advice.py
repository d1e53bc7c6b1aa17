"""Advice: what is said of a training that does not fit the settings, ``None`` where all is well."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lightning_dropcluster.callbacks.training import is_trial
from lightning_dropcluster.layers.troubles import unused_layers_error

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

    from lightning_dropcluster.callbacks.auto_drop_prob import AutoDropProb
    from lightning_dropcluster.callbacks.schedule import Schedule
    from lightning_dropcluster.learning.learner import ClusterLearner


def check_validation(trainer: Trainer) -> None:
    """Raise where ``drop_prob="auto"`` would have no validation to follow."""
    if not trainer.enable_validation:
        raise ValueError(
            "drop_prob='auto': needs validation, so give fit validation data, define validation_step and "
            "leave limit_val_batches above 0; or give drop_prob as a number"
        )


def late_start(trainer: Trainer, schedule: Schedule) -> str | None:
    """Say that training will end before the start."""
    if not schedule.is_late or is_trial(trainer):
        return None
    return (
        f"start={schedule.start!r}: training ends after max_epochs={trainer.max_epochs}, so nothing will be "
        "dropped"
    )


def unknown_length(trainer: Trainer, schedule: Schedule) -> str | None:
    """Say that the schedule cannot move."""
    is_one_epoch = trainer.max_epochs == 1 and trainer.max_steps == -1
    if not (is_one_epoch and math.isinf(trainer.num_training_batches) and schedule.follows_length):
        return None
    return (
        "max_epochs=1 with data of unknown length: how far training is cannot be told, so the schedule stays "
        "at its beginning; set max_steps or limit_train_batches in the Trainer"
    )


def unreached_start(trainer: Trainer, schedule: Schedule, auto: AutoDropProb | None) -> str | None:
    """Say, after training, that it ended before the start or before the first validation."""
    if is_trial(trainer):
        return None
    if not (schedule.has_begun or schedule.is_late):
        return f"start={schedule.start!r} was not reached before training ended, so nothing was dropped"
    if auto is not None and not auto.has_compared:
        return "drop_prob='auto': training ended before a validation did, so nothing was dropped"
    return None


def no_clusters(trainer: Trainer, schedule: Schedule, learner: ClusterLearner) -> str | None:
    """Say, after training, why it made no clusters."""
    if learner.clusters or not schedule.has_begun or is_trial(trainer):
        return None
    what = "no clusters were made and nothing was dropped"
    if (error := unused_layers_error(learner.never_ran())) is not None:
        return f"{what}: {error}"
    if learner.labels_pending:
        num_samples = learner.sketches.num_samples
        reason = f"training ended before num_samples={num_samples} samples of one size were gathered"
        return f"{reason}, so {what}; lower num_samples, or start earlier"
    return what
