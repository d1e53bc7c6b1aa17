"""Score a trained classifier: on images as they are, on corrupted ones, and with a fitted temperature."""

from __future__ import annotations

import math
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor

from benchmarks.common.data import ImageDataModule, Split, balanced_subset
from benchmarks.gain.corruptions import CORRUPTIONS, SEVERITIES, corrupt

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


def score_scaled(trainer: pl.Trainer, classifier: Any, batches: ImageDataModule) -> Scores:
    """Fit a temperature on the images to calibrate on, and score with it.

    Source: Guo et al. 2017, https://arxiv.org/abs/1706.04599.

    Args:
        trainer: runs the classifier.
        classifier: a trained one, which divides its logits by its `temperature` where it is scored.
        batches: whose `calibration` split the temperature is fitted on.

    Returns:
        The scores and the temperature; empty where there is no such split.
    """
    if batches.data.calibration is None:
        return {}
    pairs: Any = trainer.predict(classifier, batches.loader(batches.data.calibration))
    logits, labels = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    classifier.temperature = fit_temperature(logits, labels)
    scores = score(trainer, classifier, batches.test_dataloader())
    return {**scores, "temperature": round(classifier.temperature, 6)}


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the temperature, in 0.05 to 20, that lowers NLL most.

    Args:
        logits: (N, classes), finite.
        labels: (N,).
    """

    def loss(log_temperature: float) -> float:
        return F.cross_entropy(logits.double() / math.exp(log_temperature), labels).item()

    found: Any = minimize_scalar(loss, bounds=(math.log(0.05), math.log(20)), method="bounded")
    return math.exp(found.x)
