"""What a training run depends on."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.common.data import DataName

RegularizerName = Literal[
    "none",
    "dropcluster",
    "dropout",
    "spatial_dropout",
    "drop_block",
    "prob_drop_block",
    "corr_drop",
    "advanced_dropout",
    "drop_path",
    "patch_dropout",
]
ClustersName = Literal["learned", "shuffled", "blocks"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that a run depends on.

    Args:
        model: any timm model name, "small_resnet" or "small_vit", see `build_model`.
        weights: start from those that timm downloads ("timm") or from those in a file, and normalise images
            as timm says for the model; from random ones by default.
        stem: "timm" keeps the stem; "cifar" gives a ResNet a 3x3 convolution of stride 1 without pooling.
        data: "digits" (scikit-learn's, in the package), "noisy_digits", "cifar10", "folder" (any images, in
            `data_dir`) or "fake" (noise, for tests).
        data_dir: a folder with train/CLASS/*.jpg and test/CLASS/*.jpg, or a tar file of it; by default
            torchvision downloads CIFAR-10.
        image_size: side in pixels that the middle of each image in `data_dir` is scaled to; by default images
            are taken as they are, and must have one size.
        train_samples: size of a class-balanced training subset chosen by the seed; all by default.
        validation_samples: score on that many other training images, class-balanced too, and leave the test
            images alone; by default the test images are what is scored.
        corrupted_samples: how many of the scored images, class-balanced and the same for every seed, are
            scored once more under each corruption.
        calibration_samples: how many other training images, class-balanced too, a temperature is fitted on,
            with which NLL and ECE are scored once more; none by default.
        augment: shift training images and mirror them where that keeps their class.
        regularizer: "none", "dropcluster", the name of another of the package's regularisers, which is
            attached by StructuredDropout, or one of timm's own: "drop_path", at a rate that grows from block
            to block up to `drop_prob`, or "patch_dropout", of a transformer's tokens; their rates stay as
            they are in training, and the options from `layers` to `schedule` are not for them.
        layers: pattern or list of patterns of layer names; the first convolution by default.
        any_layer: let `layers` name modules of any type, such as activations, not convolutions only.
        channel_dim: -1 for layers with channels last, such as the blocks of transformers.
        drop_prob: drop probability at the end of training, in [0, 1), or "auto", which follows the loss on
            the images to calibrate on and needs no `schedule`.
        start: fraction of training (0.25) or epoch (40) from which something is dropped.
        schedule: how the drop probability grows from there to the end.
        end: fraction of training from which nothing is dropped any more, above a `start` that is a fraction;
            the schedule reaches its full value there. Needs a drop_prob that is a number.
        clean_statistics: let BatchNorm's running averages follow steps that drop nothing; off by default, as
            in all runs from before there was a choice.
        old_averages: where something is dropped, score once more with BatchNorm's running averages as the
            steps that drop would have left them.
        block_size: side of the blocks of "drop_block", "prob_drop_block" and "corr_drop".
        pair_weight: above 0, train by R-Block: on each batch and a copy of it from which other features are
            dropped, with this weight of their disagreement.
        clusters: of "dropcluster": "learned"; as controls "shuffled", sizes as learned but members drawn at
            random, and "blocks", fixed squares; see `controls.py`.
        fill: what "dropcluster" puts in the place of a dropped cluster: "zero", or its "mean".
        cluster_size: mean number of features per cluster.
        scope: what is grouped: features within each "map", "position"s, whole "channel"s, or the "layer".
        every_n_epochs: epochs between two clusterings; 0 to keep the first.
        num_samples: training images seen by each clustering.
        per_sample: draw what "dropcluster" drops for each image, or once for the whole batch.
        beside: settings in which a second callback differs, such as its regularizer and its layers, which
            must be others than those of the first; none by default.
        epochs: passes over the training images, at least 1.
        batch_size: images per step, at least 1.
        lr: peak of the one-cycle learning rate, above 0.
        regularizer_lr: peak for the parameters of a regulariser that is learned, above 0; by default `lr`.
        weight_decay: at least 0.
        optimizer: "sgd", with Nesterov momentum, or "adamw".
        precision: of the arithmetic, in Lightning's words.
        channels_last: store images and weights with the channels last, often faster.
        seed: of weights, batches, subset and clustering.
        out: file to which the record is appended as well.
        plot: PNG file for the clusters of the first selected layer.
        progress_bar: show Lightning's progress bar (on standard error).
    """

    model: str = "resnet18"
    weights: str | None = None
    stem: Literal["timm", "cifar"] = "timm"
    data: DataName = "digits"
    data_dir: str | None = None
    image_size: int | None = None
    train_samples: int | None = None
    validation_samples: int | None = None
    corrupted_samples: int = 0
    calibration_samples: int = 0
    augment: bool = False
    regularizer: RegularizerName = "none"
    layers: str | list[str] | None = None
    any_layer: bool = False
    channel_dim: Literal[1, -1] = 1
    drop_prob: float | Literal["auto"] = 0.15
    start: int | float = 0.25
    schedule: Literal["linear", "constant", "cosine"] = "linear"
    end: float = 1.0
    clean_statistics: bool = False
    old_averages: bool = False
    block_size: int = 7
    pair_weight: float = 0.0
    clusters: ClustersName = "learned"
    fill: Literal["zero", "mean"] = "zero"
    cluster_size: int | float | None = None
    scope: Literal["map", "position", "layer", "channel"] = "map"
    every_n_epochs: int = 5
    num_samples: int = 1024
    per_sample: bool = True
    beside: dict[str, Any] | None = None
    epochs: int = 10
    batch_size: int = 128
    lr: float = 0.1
    regularizer_lr: float | None = None
    weight_decay: float = 5e-4
    optimizer: Literal["sgd", "adamw"] = "sgd"
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    channels_last: bool = False
    seed: int = 0
    out: str | None = None
    plot: str | None = None
    progress_bar: bool = True

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            _check(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("lr", "regularizer_lr"):
            value = getattr(self, name)
            _check(self, name, value is None or 0 < value < math.inf, "above 0")
        for name in ("pair_weight", "corrupted_samples", "calibration_samples"):
            _check(self, name, 0 <= getattr(self, name) < math.inf, "at least 0")
        starts_before = isinstance(self.start, float) and self.start < self.end
        _check(self, "end", self.end == 1 or (starts_before and self.end < 1), "1, or in (start, 1)")
        if self.end < 1 and self.drop_prob == "auto":
            raise ValueError(f"end must be 1 with drop_prob 'auto', got {self.end}")
        if self.drop_prob == "auto" and not self.calibration_samples:
            raise ValueError("drop_prob 'auto' needs calibration_samples above 0, got 0")
        if self.plot is not None and self.regularizer != "dropcluster":
            raise ValueError(f"plot must be None unless regularizer is 'dropcluster', got {self.plot!r}")


def _check(settings: Settings, name: str, holds: bool, rule: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {rule}, got {getattr(settings, name)}")


def arguments(settings: Settings) -> dict[str, Any]:
    """List the settings with paths cut to their last part, so that no record names a place on a machine."""
    listed = asdict(settings)
    for name in ("data_dir", "weights", "out", "plot"):
        listed[name] = None if listed[name] is None else Path(listed[name]).name
    return listed
