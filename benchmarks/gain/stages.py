"""The stages of the protocol in evidence.md; what they say is fixed before their runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from benchmarks.gain.protocol import Method, Stage
from benchmarks.gain.settings import Settings

StageName = Literal[
    "quick",
    "stem-2000",
    "stem-5000",
    "act-2000",
    "ablation-2000",
    "rest-2000",
    "places-1000",
    "factors-1000",
    "blocks-1000",
    "blocks-rest-1000",
    "blocks-pairs-1000",
    "act-layer-1000",
    "ideas-1000",
    "blocks-2000",
    "blocks-5000",
    "resnet18-1000",
    "augmented-2000",
    "augmented-long-1000",
    "scaled-1000",
    "peers-2000",
    "peers-5000",
    "larger-500",
    "transfer-500",
]

QUICK = Stage(
    base=Settings(
        model="small_resnet",
        stem="cifar",
        data="digits",
        train_samples=200,
        corrupted_samples=20,
        layers="conv1",
        start=0,
        num_samples=200,
        epochs=3,
        batch_size=50,
    ),
    methods=(
        Method("DropCluster", {"regularizer": "dropcluster"}, ({"drop_prob": 0.1}, {"drop_prob": 0.3})),
        Method("none"),
    ),
    tuning_seed=100,
    validation_samples=100,
    rounds=(((0, 1), ("DropCluster", "none")),),
)
"""Shows in a minute that everything runs; its numbers mean nothing."""

STEM = Settings(
    model="small_resnet",
    stem="cifar",
    data="cifar10",
    corrupted_samples=250,
    layers="conv1",
    start=0.1,
    schedule="linear",
    every_n_epochs=3,
    num_samples=1024,
    epochs=10,
    batch_size=32,
    lr=0.1,
    precision="bf16-mixed",
    channels_last=True,
)


def _grid(size: str, small: int, large: int) -> tuple[dict[str, Any], ...]:
    """Four settings of a method that has a size."""
    return tuple({"drop_prob": prob, size: value} for value in (small, large) for prob in (0.3, 0.6))


FIRST_METHODS = (
    Method("DropCluster", {"regularizer": "dropcluster"}, _grid("cluster_size", 16, 64)),
    Method(
        "DropCluster, shuffled", {"regularizer": "dropcluster", "clusters": "shuffled"}, like="DropCluster"
    ),
    Method("none"),
    Method(
        "Dropout",
        {"regularizer": "dropout"},
        tuple({"drop_prob": prob} for prob in (0.2, 0.4, 0.6, 0.8)),
    ),
    Method("DropBlock", {"regularizer": "drop_block"}, _grid("block_size", 3, 7)),
)
LEARNED_AND_SHUFFLED = ("DropCluster", "DropCluster, shuffled")
OTHERS = ("none", "Dropout", "DropBlock")
_FIRST_FOUR = (*LEARNED_AND_SHUFFLED, "none", "Dropout")

STEM_2000 = Stage(
    base=replace(STEM, train_samples=2000),
    methods=FIRST_METHODS,
    tuning_seed=100,
    validation_samples=4000,
    rounds=(
        (range(3), (*LEARNED_AND_SHUFFLED, *OTHERS)),
        (range(3, 10), LEARNED_AND_SHUFFLED),
        (range(3, 10), OTHERS),
    ),
)
STEM_5000 = replace(STEM_2000, base=replace(STEM, train_samples=5000))
ACT_2000 = replace(
    STEM_2000,
    base=replace(STEM, train_samples=2000, layers="act1", any_layer=True),
)
"""Drops after norm and activation of the stem, where features are what the next layer sees."""

ABLATION_2000 = replace(
    STEM_2000,
    methods=(
        *FIRST_METHODS[:2],
        Method(
            "DropCluster, learned once",
            {"regularizer": "dropcluster", "every_n_epochs": 0},
            like="DropCluster",
        ),
        Method("square blocks", {"regularizer": "dropcluster", "clusters": "blocks"}, like="DropCluster"),
        Method("SpatialDropout", {"regularizer": "spatial_dropout"}, FIRST_METHODS[3].grid),
    ),
    rounds=(
        (range(3), LEARNED_AND_SHUFFLED),
        (range(3), ("DropCluster, learned once", "square blocks", "SpatialDropout")),
    ),
)
"""What learning the clusters, updating them, and their shape add."""

REST_2000 = replace(
    STEM_2000,
    methods=(
        FIRST_METHODS[0],
        Method("ProbDropBlock", {"regularizer": "prob_drop_block"}, _grid("block_size", 3, 7)),
        Method("CorrDrop", {"regularizer": "corr_drop"}, _grid("block_size", 3, 7)),
        Method("R-Block", {"regularizer": "drop_block", "pair_weight": 1.0}, _grid("block_size", 3, 7)),
        Method(
            "DropPath", {"regularizer": "drop_path"}, tuple({"drop_prob": p} for p in (0.05, 0.1, 0.2, 0.4))
        ),
        Method("Advanced Dropout", {"regularizer": "advanced_dropout"}),
    ),
    rounds=(
        (
            range(3),
            ("DropCluster", "ProbDropBlock", "CorrDrop", "R-Block", "DropPath", "Advanced Dropout"),
        ),
    ),
)
"""The other peers. Advanced Dropout learns its parameters, at the learning rate of the network."""

PLACES: dict[str, dict[str, Any]] = {
    "stem, before norm": {"layers": "conv1"},
    "stem, after act": {"layers": "act1", "any_layer": True},
    "blocks, before norm": {"layers": "layer[1-3].0.conv2"},
    "blocks, after add and act": {"layers": "layer[1-3].0.act2", "any_layer": True},
}
"""Where to drop. After the addition no shortcut carries past what was dropped."""
GROUPINGS: dict[str, dict[str, Any]] = {
    "map": {"scope": "map", "cluster_size": 16},
    "position": {"scope": "position", "cluster_size": 16},
    "layer": {"scope": "layer", "cluster_size": 128},
    "channel": {"scope": "channel", "cluster_size": 4},
}


OVERFIT = replace(STEM, train_samples=1000, epochs=20, every_n_epochs=5, num_samples=512, drop_prob=0.4)
"""Long enough on few images that a network without dropping is far too sure of itself."""


def _explore(methods: Sequence[Method], seeds: Sequence[int]) -> Stage:
    names = [method.name for method in methods]
    return Stage(
        base=OVERFIT,
        methods=methods,
        tuning_seed=100,
        validation_samples=4000,
        rounds=[((seed,), names) for seed in seeds],
        explores=True,
    )


def _places() -> Stage:
    methods = [Method("none")]
    for place, where in PLACES.items():
        methods.append(Method(f"{place}: Dropout", {"regularizer": "dropout", **where}))
        for grouping, what in GROUPINGS.items():
            name, fixed = f"{place}: {grouping}", {"regularizer": "dropcluster", **where, **what}
            methods.append(Method(name, fixed))
            methods.append(Method(f"{name}, shuffled", {**fixed, "clusters": "shuffled"}, like=name))
    return _explore(methods, seeds=(200, 201))


PLACES_1000 = _places()
"""Looks, on validation images, for the place and the scope at which learned clusters add most."""

FACTORS: dict[str, dict[str, Any]] = {
    "as usual": {},
    "drop_prob 0.2": {"drop_prob": 0.2},
    "drop_prob 0.6": {"drop_prob": 0.6},
    "constant drop_prob": {"schedule": "constant"},
    "cluster_size 4": {"cluster_size": 4},
    "cluster_size 64": {"cluster_size": 64},
    "learned once": {"every_n_epochs": 0},
    "learned every epoch": {"every_n_epochs": 1},
    "one draw per batch": {"per_sample": False},
    "k-means from a random start": {"clusters": "random-start"},
    "Ward": {"clusters": "ward"},
    "square blocks": {"clusters": "blocks"},
    "idea: mixed sizes": {"clusters": "mixed-sizes", "cluster_size": 4, "every_n_epochs": 1},
    "idea: sizes by explained variance": {"clusters": "explained", "cluster_size": 4},
    "idea: agreement of two draws": {"pair_weight": 1.0},
    "idea: agreement of two draws, shuffled": {"pair_weight": 1.0, "clusters": "shuffled"},
    "Dropout, agreement of two draws": {"pair_weight": 1.0, "regularizer": "dropout"},
}


def _one_at_a_time(changes: dict[str, dict[str, Any]]) -> Stage:
    fixed = {"regularizer": "dropcluster", **PLACES["blocks, after add and act"], **GROUPINGS["map"]}
    methods = [Method(name, {**fixed, **change}) for name, change in changes.items()]
    return _explore([*methods, Method("none")], seeds=(200, 201))


FACTORS_1000 = _one_at_a_time(FACTORS)
"""One change at a time, on validation images, where dropping did most in the stage before; and ideas."""

_AFTER_ADD = PLACES["blocks, after add and act"]
_PROBS = (0.35, 0.5)


def _sized(
    name: str, size: str, small: float, large: float, *, probs: Sequence[float] = _PROBS, **fixed: Any
) -> Method:
    """A method after the addition, with the probabilities and sizes to choose from."""
    grid = tuple({"drop_prob": prob, size: value} for value in (small, large) for prob in probs)
    return Method(name, {**_AFTER_ADD, **fixed}, grid)


def _plain(name: str, *probs: float, **fixed: Any) -> Method:
    """A method after the addition that has no size."""
    return Method(name, {**_AFTER_ADD, **fixed}, tuple({"drop_prob": prob} for prob in probs))


_CLUSTERS: dict[str, Any] = {"regularizer": "dropcluster", "scope": "map"}
_IN_LAYER: dict[str, Any] = {"regularizer": "dropcluster", "scope": "layer", "clusters": "shuffled"}
BLOCKS_1000 = Stage(
    base=replace(OVERFIT, corrupted_samples=250),
    methods=(
        _sized("DropCluster", "cluster_size", 4, 16, **_CLUSTERS),
        _sized("DropCluster, shuffled", "cluster_size", 4, 16, **_CLUSTERS, clusters="shuffled"),
        Method("none"),
        _plain("Dropout", 0.3, 0.4, 0.5, 0.6, regularizer="dropout"),
        _sized("DropBlock", "block_size", 3, 5, regularizer="drop_block"),
        _sized("random groups in the layer", "cluster_size", 32, 128, **_IN_LAYER),
    ),
    tuning_seed=100,
    validation_samples=4000,
    rounds=(
        (range(5), (*LEARNED_AND_SHUFFLED, *OTHERS, "random groups in the layer")),
        (range(5, 10), LEARNED_AND_SHUFFLED),
    ),
)
"""Few images, many epochs, and dropping past which no shortcut leads; the control is tuned for itself."""

BLOCKS_REST_1000 = replace(
    BLOCKS_1000,
    methods=(
        BLOCKS_1000.methods[0],
        _plain("SpatialDropout", 0.1, 0.2, 0.3, 0.4, regularizer="spatial_dropout"),
        _sized("ProbDropBlock", "block_size", 3, 5, regularizer="prob_drop_block"),
        _sized("CorrDrop", "block_size", 3, 5, regularizer="corr_drop"),
        _plain("DropPath", 0.1, 0.2, 0.4, 0.6, regularizer="drop_path"),
        Method(
            "Advanced Dropout",
            {**_AFTER_ADD, "regularizer": "advanced_dropout"},
            tuple({"regularizer_lr": lr} for lr in (1e-4, 1e-3, 1e-2, 1e-1)),
        ),
    ),
    rounds=(
        (
            range(3),
            ("DropCluster", "SpatialDropout", "ProbDropBlock", "CorrDrop", "DropPath", "Advanced Dropout"),
        ),
    ),
)
"""The other peers there."""

_FIRST_PAIRED = ("DropCluster", "R-Block", "DropCluster in pairs")
_PAIRED_CONTROLS = ("shuffled in pairs", "Dropout in pairs")
BLOCKS_PAIRS_1000 = replace(
    BLOCKS_1000,
    methods=(
        _sized("DropCluster in pairs", "cluster_size", 4, 16, **_CLUSTERS, pair_weight=1.0),
        _sized("R-Block", "block_size", 3, 5, regularizer="drop_block", pair_weight=1.0),
        BLOCKS_1000.methods[0],
        _sized("shuffled in pairs", "cluster_size", 4, 16, **_CLUSTERS, clusters="shuffled", pair_weight=1.0),
        _plain("Dropout in pairs", 0.3, 0.4, 0.5, 0.6, regularizer="dropout", pair_weight=1.0),
    ),
    rounds=(
        (range(3), _FIRST_PAIRED),
        (range(3), _PAIRED_CONTROLS),
        (range(3, 5), (*_FIRST_PAIRED, *_PAIRED_CONTROLS)),
    ),
)
"""Two draws that agree, at twice the time per step; and whether it takes clusters."""

_AFTER_ACT = {**PLACES["stem, after act"], "regularizer": "dropcluster", "scope": "layer"}
_STRONG = tuple({"cluster_size": size, "drop_prob": prob} for size in (32, 128) for prob in (0.4, 0.6))
ACT_LAYER_1000 = replace(
    BLOCKS_1000,
    methods=(
        Method("DropCluster", _AFTER_ACT, _STRONG),
        Method("DropCluster, shuffled", {**_AFTER_ACT, "clusters": "shuffled"}, _STRONG),
        Method("none"),
        Method(
            "Dropout",
            {**PLACES["stem, after act"], "regularizer": "dropout"},
            tuple({"drop_prob": prob} for prob in (0.3, 0.4, 0.6, 0.8)),
        ),
    ),
    rounds=(
        (range(5), _FIRST_FOUR),
        (range(5, 10), LEARNED_AND_SHUFFLED),
    ),
)
"""Where learned clusters had looked best beside shuffled ones: after the stem, over the layer as a whole."""

IDEAS: dict[str, dict[str, Any]] = {
    "as usual": {},
    "profiles of values": {"variant": "values"},
    "noise for zeros": {"variant": "noise"},
    "noise for zeros, shuffled": {"variant": "noise", "clusters": "shuffled"},
    "another image's features for zeros": {"variant": "other-image"},
    "another image's features for zeros, shuffled": {"variant": "other-image", "clusters": "shuffled"},
    "probability by salience": {"variant": "salience"},
    "probability by salience, shuffled": {"variant": "salience", "clusters": "shuffled"},
}
IDEAS_1000 = _one_at_a_time(IDEAS)
"""More changes of one thing, as in the stage of factors."""

_LESS = (0.2, 0.35)
BLOCKS_2000 = replace(
    BLOCKS_1000,
    base=replace(BLOCKS_1000.base, train_samples=2000),
    methods=(
        _sized("DropCluster", "cluster_size", 4, 16, probs=_LESS, **_CLUSTERS),
        _sized("DropCluster, shuffled", "cluster_size", 4, 16, probs=_LESS, **_CLUSTERS, clusters="shuffled"),
        Method("none"),
        _plain("Dropout", 0.1, 0.2, 0.3, 0.4, regularizer="dropout"),
        _sized("DropBlock", "block_size", 3, 5, regularizer="drop_block"),
    ),
    rounds=((range(5), (*LEARNED_AND_SHUFFLED, *OTHERS)),),
)
"""Twice the images; settings to choose from lie around what was chosen for half as many."""

BLOCKS_5000 = replace(
    BLOCKS_2000,
    base=replace(BLOCKS_2000.base, train_samples=5000),
    tuning_samples=2000,
    rounds=((range(5), _FIRST_FOUR),),
)
"""Five times the images, with what was chosen for 2,000."""

_OUTPUTS: dict[str, Any] = {"layers": "layer[1-3]", "any_layer": True}
_AS_CHOSEN: dict[str, Any] = {**_OUTPUTS, **_CLUSTERS, "drop_prob": 0.35, "cluster_size": 16}
RESNET18_1000 = replace(
    BLOCKS_1000,
    base=replace(BLOCKS_1000.base, model="resnet18", corrupted_samples=0),
    methods=(
        Method("DropCluster", _AS_CHOSEN),
        Method("DropCluster, shuffled", {**_AS_CHOSEN, "clusters": "shuffled"}),
        Method("none"),
        Method("Dropout", {**_OUTPUTS, "regularizer": "dropout", "drop_prob": 0.3}),
    ),
    rounds=((range(5), _FIRST_FOUR),),
)
"""A larger network, timm's own, with what was chosen for the small one."""

AUGMENTED_2000 = replace(
    BLOCKS_2000,
    base=replace(BLOCKS_2000.base, augment=True),
    methods=BLOCKS_2000.methods[:4],
    rounds=((range(5), _FIRST_FOUR),),
)
"""The usual augmentation, which leaves less to be gained."""

AUGMENTED_LONG_1000 = replace(
    BLOCKS_1000,
    base=replace(BLOCKS_1000.base, augment=True, epochs=60, precision="32-true", corrupted_samples=0),
    methods=(
        Method(
            "DropCluster",
            {**_AFTER_ADD, **_CLUSTERS},
            ({"drop_prob": 0.1, "cluster_size": 4}, {"drop_prob": 0.35, "cluster_size": 16}),
        ),
        Method("none"),
        _plain("Dropout", 0.05, 0.4, regularizer="dropout"),
    ),
    rounds=[((seed,), ("none", "DropCluster", "Dropout")) for seed in range(5)],
)
"""With augmentation, but trained for so long that a network can learn its images by heart again."""

SCALED_1000 = replace(
    BLOCKS_1000,
    base=replace(BLOCKS_1000.base, precision="32-true", corrupted_samples=0, calibration_samples=250),
    methods=(
        Method("DropCluster", {**_AFTER_ADD, **_CLUSTERS, "drop_prob": 0.35, "cluster_size": 16}),
        Method("none"),
        Method("Dropout", {**_AFTER_ADD, "regularizer": "dropout", "drop_prob": 0.3}),
    ),
    rounds=[((seed,), ("none", "DropCluster", "Dropout")) for seed in range(5)],
)
"""Whether what dropping gains is gained by temperature scaling as well, which costs nothing."""

_OTHER_PEERS = ("SpatialDropout", "ProbDropBlock", "CorrDrop", "DropPath", "Advanced Dropout")
_CHOSEN_CLUSTERS: dict[str, Any] = {**_AFTER_ADD, **_CLUSTERS, "drop_prob": 0.35, "cluster_size": 16}
_CHOSEN_BLOCKS: dict[str, Any] = {**_AFTER_ADD, "drop_prob": 0.5, "block_size": 5}
_RUN_BEFORE: dict[str, Any] = {"precision": "bf16-mixed", "calibration_samples": 0}
PEERS_2000 = replace(
    BLOCKS_2000,
    base=replace(BLOCKS_2000.base, precision="32-true", calibration_samples=250),
    methods=(
        Method("DropCluster", {**_CHOSEN_CLUSTERS, **_RUN_BEFORE}),
        Method("DropCluster in float32", _CHOSEN_CLUSTERS),
        Method("SpatialDropout", {**_AFTER_ADD, "regularizer": "spatial_dropout", "drop_prob": 0.3}),
        Method("ProbDropBlock", {**_CHOSEN_BLOCKS, "regularizer": "prob_drop_block"}),
        Method("CorrDrop", {**_CHOSEN_BLOCKS, "regularizer": "corr_drop", "drop_prob": 0.35}),
        Method("DropPath", {**_AFTER_ADD, "regularizer": "drop_path", "drop_prob": 0.6}),
        Method("Advanced Dropout", {**_AFTER_ADD, "regularizer": "advanced_dropout", "regularizer_lr": 1e-3}),
        Method("DropBlock", {**_CHOSEN_BLOCKS, "regularizer": "drop_block"}),
    ),
    rounds=(
        ((0,), ("DropCluster in float32", *_OTHER_PEERS)),
        *[((seed,), _OTHER_PEERS) for seed in (1, 2)],
        (range(3), ("DropCluster",)),
    ),
)
"""The other peers on twice the images, all with what was chosen for 1,000, beside runs of `blocks-2000`."""

PEERS_5000 = replace(
    PEERS_2000,
    base=replace(PEERS_2000.base, train_samples=5000),
    rounds=[((seed,), ("DropCluster", "DropBlock")) for seed in range(5)],
)
"""DropBlock with what was chosen for 2,000, beside runs of `blocks-5000`."""

_BY_SEED = [((seed,), _FIRST_FOUR) for seed in range(5)]
LARGER_500 = replace(
    BLOCKS_1000,
    base=replace(
        BLOCKS_1000.base,
        stem="timm",
        data="folder",
        image_size=128,
        train_samples=500,
        epochs=40,
        every_n_epochs=10,
        num_samples=480,
        precision="32-true",
        corrupted_samples=0,
        calibration_samples=250,
    ),
    methods=(
        *SCALED_1000.methods,
        Method("DropCluster, shuffled", {**SCALED_1000.methods[0].fixed, "clusters": "shuffled"}),
    ),
    validation_samples=500,
    rounds=_BY_SEED,
)
"""Photographs of 128 pixels in place of CIFAR-10, ResNet's own stem, and what was chosen in `blocks-1000`."""

_STAGE_OUTPUTS: dict[str, Any] = {"layers": "blocks.[1-4]", "any_layer": True}
_GENTLE = tuple({"cluster_size": size, "drop_prob": prob} for size in (4, 16) for prob in (0.1, 0.3))
TRANSFER_500 = replace(
    LARGER_500,
    base=replace(
        LARGER_500.base,
        model="tf_efficientnet_lite0",
        weights="timm",
        augment=True,
        epochs=10,
        every_n_epochs=5,
        lr=0.03,
    ),
    methods=(
        Method("DropCluster", {**_STAGE_OUTPUTS, **_CLUSTERS}, _GENTLE),
        Method("DropCluster, shuffled", {**_STAGE_OUTPUTS, **_CLUSTERS, "clusters": "shuffled"}, _GENTLE),
        Method(
            "DropCluster as its control",
            {**_STAGE_OUTPUTS, **_CLUSTERS, "drop_prob": 0.1, "cluster_size": 16},
        ),
        Method("none"),
        Method(
            "Dropout",
            {**_STAGE_OUTPUTS, "regularizer": "dropout"},
            tuple({"drop_prob": prob} for prob in (0.05, 0.1, 0.2, 0.4)),
        ),
    ),
    rounds=(*_BY_SEED, (range(5), ("DropCluster as its control",))),
)
"""The same images, seen by a network that was trained on ImageNet: what most users do."""

STAGES: dict[str, Stage] = {
    "quick": QUICK,
    "stem-2000": STEM_2000,
    "stem-5000": STEM_5000,
    "act-2000": ACT_2000,
    "ablation-2000": ABLATION_2000,
    "rest-2000": REST_2000,
    "places-1000": PLACES_1000,
    "factors-1000": FACTORS_1000,
    "blocks-1000": BLOCKS_1000,
    "blocks-rest-1000": BLOCKS_REST_1000,
    "blocks-pairs-1000": BLOCKS_PAIRS_1000,
    "act-layer-1000": ACT_LAYER_1000,
    "ideas-1000": IDEAS_1000,
    "blocks-2000": BLOCKS_2000,
    "blocks-5000": BLOCKS_5000,
    "resnet18-1000": RESNET18_1000,
    "augmented-2000": AUGMENTED_2000,
    "augmented-long-1000": AUGMENTED_LONG_1000,
    "scaled-1000": SCALED_1000,
    "peers-2000": PEERS_2000,
    "peers-5000": PEERS_5000,
    "larger-500": LARGER_500,
    "transfer-500": TRANSFER_500,
}
