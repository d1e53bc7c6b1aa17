"""Score a trained classifier: on images as they are, on corrupted ones, and with a fitted temperature."""

from __future__ import annotations

import math
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

from benchmarks.common.data import ImageDataModule, Split, balanced_subset
from benchmarks.gain.corruptions import CORRUPTIONS, SEVERITIES, corrupt

SCORES = ("accuracy", "nll", "ece")
Scores = dict[str, float | None]


def score(
    trainer: pl.Trainer, classifier: pl.LightningModule, batches: ImageDataModule, corrupted_samples: int = 0
) -> dict[str, Any]:
    """Score a classifier in one pass over the images.

    Args:
        trainer: runs the classifier.
        classifier: a trained one, whose `predict_step` gives logits and labels.
        batches: whose `test` split is scored; where there is a `calibration` split, a temperature is fitted
            on it, and NLL and ECE are scored with that as well.
        corrupted_samples: how many of the images to score once more under each corruption of
            `corruptions.py`, class-balanced and always the same.

    Returns:
        Accuracy, nll and ece, None where one is not finite; corrupted, corruption to score to its values, a
        list over severities; and scaled, the scores after temperature scaling and the temperature, where one
        was fitted.
    """
    data = batches.data
    damaged = corrupt_some(data.test, corrupted_samples)
    splits = [data.test, *damaged.values(), *([data.calibration] if data.calibration else [])]
    logits = predict(trainer, classifier, batches, splits)
    rated = {key: rate(*pair) for key, pair in zip(damaged, logits[1:], strict=False)}
    found = {**rate(*logits[0]), "corrupted": _by_corruption(rated)}
    if data.calibration:
        temperature = fit_temperature(*logits[-1])
        scaled = rate(logits[0][0] / temperature, logits[0][1])
        found["scaled"] = {**scaled, "temperature": round(temperature, 6)}
    return found


def predict(
    trainer: pl.Trainer, classifier: pl.LightningModule, batches: ImageDataModule, splits: list[Split]
) -> list[tuple[Tensor, Tensor]]:
    """Run a classifier once over some images.

    Returns:
        For each split logits (N, classes) in float32 and labels (N,).
    """
    found: Any = trainer.predict(classifier, [batches.loader(split) for split in splits])
    found = [found] if len(splits) == 1 else found
    joined = [[torch.cat(parts).cpu() for parts in zip(*each, strict=True)] for each in found]
    return [(logits.float(), labels) for logits, labels in joined]


def rate(logits: Tensor, labels: Tensor) -> Scores:
    """Return accuracy, NLL and ECE in 15 bins; None where one is not finite.

    Args:
        logits: (N, classes).
        labels: (N,).
    """
    probabilities, classes = logits.softmax(1), logits.shape[1]
    found = {
        "accuracy": (logits.argmax(1) == labels).float().mean().item(),
        "nll": F.cross_entropy(logits, labels).item(),
        "ece": multiclass_calibration_error(probabilities, labels, classes, n_bins=15, norm="l1").item(),
    }
    return {name: round(value, 6) if math.isfinite(value) else None for name, value in found.items()}


def corrupt_some(clean: Split, count: int) -> dict[tuple[str, int], Split]:
    """Corrupt some of the images in every way: (name, severity) to images; nothing for a count of 0."""
    if count == 0:
        return {}
    images, labels = clean[balanced_subset(clean.labels, count, seed=0)]
    ways = [(name, severity) for name in CORRUPTIONS for severity in SEVERITIES]
    return {(name, severity): Split(corrupt(images, name, severity), labels) for name, severity in ways}


def _by_corruption(rated: dict[tuple[str, int], Scores]) -> dict[str, dict[str, list[float | None]]]:
    names = dict.fromkeys(name for name, _ in rated)
    return {name: {key: [rated[name, s][key] for s in SEVERITIES] for key in SCORES} for name in names}


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the temperature, in 0.05 to 20, that lowers NLL most (https://arxiv.org/abs/1706.04599).

    Args:
        logits: (N, classes), finite.
        labels: (N,).
    """

    def loss(log_temperature: float) -> float:
        return F.cross_entropy(logits.double() / math.exp(log_temperature), labels).item()

    found: Any = minimize_scalar(loss, bounds=(math.log(0.05), math.log(20)), method="bounded")
    return math.exp(found.x)
