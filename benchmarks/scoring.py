"""Score a trained classifier on images as they are, and on corrupted ones."""

from __future__ import annotations

import math
from typing import Any

import pytorch_lightning as pl
from corruptions import CORRUPTIONS, SEVERITIES, corrupt
from data import ImageDataModule, Split, balanced_subset

SCORES = ("accuracy", "nll", "ece")
Scores = dict[str, float | None]


def score(trainer: pl.Trainer, classifier: pl.LightningModule, loader: Any) -> Scores:
    """Return accuracy, NLL and ECE on the images of a loader; None where one is not finite."""
    found = trainer.test(classifier, dataloaders=loader, verbose=False)[0]
    return {name: round(found[name], 6) if math.isfinite(found[name]) else None for name in SCORES}


def score_corrupted(
    trainer: pl.Trainer, classifier: pl.LightningModule, batches: ImageDataModule, count: int
) -> dict[str, dict[str, list[float | None]]]:
    """Score some of the images to score on under each corruption of `corruptions.py`.

    Args:
        trainer: runs the classifier.
        classifier: a trained one.
        batches: whose `test` split holds the images.
        count: how many of them to take, class-balanced and always the same; none for 0.

    Returns:
        Corruption to score to its values, a list over severities.
    """
    if count == 0:
        return {}
    clean = batches.data.test
    images, labels = clean[balanced_subset(clean.labels, count, seed=0)]
    found: dict[str, dict[str, list[float | None]]] = {}
    for name in CORRUPTIONS:
        splits = [Split(corrupt(images, name, severity), labels) for severity in SEVERITIES]
        scores = [score(trainer, classifier, batches.loader(split)) for split in splits]
        found[name] = {key: [each[key] for each in scores] for key in SCORES}
    return found
