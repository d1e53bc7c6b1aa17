"""How methods are compared: equally many tuning runs on validation images, then fresh seeds on the test."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import yaml

from benchmarks.gain.settings import Settings, arguments

Record = dict[str, Any]
STAGES = Path(__file__).with_name("stages")
NO_MATTER = ("out", "plot", "progress_bar", "data_dir")
"""Settings that do not change what a run finds."""


@dataclass(frozen=True)
class Method:
    """One method of a comparison.

    Args:
        name: what tables call it.
        fixed: the settings in which it differs from the stage's.
        grid: changes of settings to choose from, with a tuning run each; empty where there is nothing to
            choose.
        like: take over what was chosen for the method of this name, as a control does.
    """

    name: str
    fixed: dict[str, Any] = field(default_factory=dict)
    grid: Sequence[dict[str, Any]] = ()
    like: str | None = None


@dataclass(frozen=True)
class Stage:
    """A comparison of methods that share all other settings.

    Args:
        base: the settings shared by all runs.
        methods: what is compared, the reference of paired differences first.
        tuning_seeds: of the tuning runs, each setting once with each; none of the final ones.
        validation_samples: how many training images, not trained on, tuning runs are scored on.
        rounds: (seeds, names of methods) of the final runs, in the order in which they are to be run.
        tuning_samples: training images of the tuning runs; as many as in the final ones by default.
        explores: whether the final runs too are scored on validation images: to look around, and to leave the
            test images to a later stage.
        tuned_by: "nll", or "scaled nll" after a temperature fitted on images apart.

    Raises:
        ValueError: if grids differ in length, a seed serves twice, a name is unknown, or there are no images
            to fit a temperature on.
    """

    base: Settings
    methods: Sequence[Method]
    tuning_seeds: Sequence[int]
    validation_samples: int
    rounds: Sequence[tuple[Sequence[int], Sequence[str]]]
    tuning_samples: int | None = None
    explores: bool = False
    tuned_by: Literal["nll", "scaled nll"] = "nll"

    def __post_init__(self) -> None:
        lengths = {len(method.grid) for method in self.methods if method.grid}
        if len(lengths) > 1:
            raise ValueError(f"methods must have grids of one length, got {sorted(lengths)}")
        final = [(seed, name) for seeds, names in self.rounds for seed in seeds for name in names]
        if len(set(final)) < len(final) or {*self.tuning_seeds} & {seed for seed, _ in final}:
            raise ValueError(f"rounds must name a method and seed once and leave out {self.tuning_seeds}")
        named = {name for _, name in final} | {method.like for method in self.methods if method.like}
        if unknown := named - {method.name for method in self.methods}:
            raise ValueError(f"methods must have the names in rounds and like, got none for {unknown}")
        if self.tuned_by == "scaled nll" and not self.base.calibration_samples:
            raise ValueError("tuned_by 'scaled nll' needs calibration_samples above 0, got 0")


def load_stage(name: str) -> Stage:
    """Read a stage from its YAML file.

    The file holds the fields of `Stage`, those of another stage that it `extends` (of `base` key by key), and
    `dropping`: settings of every method that names a regularizer. A method's settings stand beside its
    `grid` and `like`.

    Args:
        name: of a file in `stages/`, or the path of another one that ends in ".yaml".

    Raises:
        ValueError: if there is no such stage, or it contradicts itself.
    """
    listed = _read(name)
    dropping = listed.pop("dropping", {})
    methods = [_method(name, dict(given), dropping) for name, given in listed.pop("methods").items()]
    rounds = [(part["seeds"], part["methods"]) for part in listed.pop("rounds")]
    return Stage(base=Settings(**listed.pop("base")), methods=methods, rounds=rounds, **listed)


def _read(name: str) -> dict[str, Any]:
    path = Path(name) if name.endswith(".yaml") else STAGES / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in STAGES.glob("*.yaml")))
        raise ValueError(f"stage must be a YAML file or one of {known}, got {name!r}")
    listed = yaml.safe_load(path.read_text(encoding="utf-8"))
    if "extends" not in listed:
        return listed
    parent = _read(listed.pop("extends"))
    return {**parent, **listed, "base": {**parent["base"], **listed.get("base", {})}}


def _method(name: str, given: dict[str, Any], dropping: dict[str, Any]) -> Method:
    grid, like = given.pop("grid", ()), given.pop("like", None)
    return Method(name, {**dropping, **given} if "regularizer" in given else given, grid, like)


@dataclass(frozen=True)
class Run:
    """One training run of a comparison, "tuning" or "final"."""

    method: str
    settings: Settings
    phase: str

    @property
    def key(self) -> str:
        """What tells this run from others: all settings that matter."""
        return key(arguments(self.settings))


def key(listed: dict[str, Any]) -> str:
    """Spell the settings in a record that matter, but for those left as they were.

    A record stays good when a setting is added whose default does what was done before.
    """
    usual = arguments(Settings())
    unusual = {k: v for k, v in listed.items() if k not in NO_MATTER and not (k in usual and usual[k] == v)}
    if "weights" in unusual:
        unusual["weights"] = "trained"  # the same ones, downloaded or from a file
    return json.dumps(unusual, sort_keys=True)


def tuning_runs(stage: Stage) -> list[Run]:
    """List the tuning runs: with one seed after the other those of all methods in turn."""
    most = max((len(method.grid) for method in stage.methods), default=0)
    return [
        _tuning_run(stage, method, change, seed)
        for seed in stage.tuning_seeds
        for position in range(most)
        for method in stage.methods
        for change in method.grid[position : position + 1]
    ]


def choose(stage: Stage, records: Iterable[Record]) -> dict[str, dict[str, Any]]:
    """Choose the changes of each method whose tuning runs had the lowest mean NLL on validation images.

    Args:
        stage: the comparison.
        records: of finished runs, among them all tuning runs.

    Returns:
        Method to chosen changes.

    Raises:
        ValueError: if a tuning run has no record.
    """
    nll = {key(record["arguments"]): tuning_loss(stage, record) for record in records}
    if missing := [run.method for run in tuning_runs(stage) if run.key not in nll]:
        raise ValueError(f"records must hold all tuning runs, got none for {len(missing)} of {set(missing)}")

    def loss(method: Method, change: dict[str, Any]) -> float:
        return fmean(nll[_tuning_run(stage, method, change, seed).key] for seed in stage.tuning_seeds)

    chosen = {
        method.name: min(method.grid, key=lambda change, method=method: loss(method, change), default={})
        for method in stage.methods
    }
    return {method.name: chosen[method.like or method.name] for method in stage.methods}


def tuning_loss(stage: Stage, record: Record) -> float:
    """What a tuning run is judged by; infinite where it diverged."""
    found = record.get("scaled", {"nll": None}) if stage.tuned_by == "scaled nll" else record
    return float("inf") if found["nll"] is None else found["nll"]


def final_runs(stage: Stage, records: Iterable[Record]) -> list[Run]:
    """List the runs with the chosen settings and fresh seeds, in the order of the rounds."""
    chosen, methods = choose(stage, records), {method.name: method for method in stage.methods}
    base = replace(stage.base, **aside(stage)) if stage.explores else stage.base
    return [
        Run(name, replace(base, **{**methods[name].fixed, **chosen[name]}, seed=seed), "final")
        for seeds, names in stage.rounds
        for seed in seeds
        for name in names
    ]


def _tuning_run(stage: Stage, method: Method, change: dict[str, Any], seed: int) -> Run:
    samples = stage.base.train_samples if stage.tuning_samples is None else stage.tuning_samples
    apart = {**aside(stage), "train_samples": samples, "seed": seed}
    changes = {**method.fixed, **change, **apart}
    return Run(method.name, replace(stage.base, **changes), "tuning")


def aside(stage: Stage) -> dict[str, Any]:
    """List the settings that leave the test images alone."""
    apart = {"validation_samples": stage.validation_samples, "corrupted_samples": 0, "old_averages": False}
    return apart if stage.tuned_by == "scaled nll" else {**apart, "calibration_samples": 0}
