"""Checking a callback's state: a checkpoint is input like any other."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_dropcluster.checks import describe
from lightning_dropcluster.learning.clusters import Clusters, check_shape, clusters_from_state
from lightning_dropcluster.learning.scopes import SCOPES

_ENTRIES = ("scope", "progress", "clusters", "shapes", "windows_opened", "window", "memory")
_PROGRESS = ("origin", "passed", "began", "every", "counts_steps")


def read_state(state: Any, scope: str, channel_dim: int = 1) -> dict[str, Clusters]:
    """Check a whole state, perhaps of another version and place, and unpack the clusters in it, by name."""
    _require_entries("state_dict", state, _ENTRIES)
    for name, value, written in (
        ("scope", scope, state["scope"]),
        ("channel_dim", channel_dim, state.get("channel_dim", 1)),  # of later versions only
    ):
        if written != value:
            raise ValueError(f"state_dict: it was written with {name}={written!r}, not {name}={value!r}")
    _check_progress(state["progress"])
    _check_count("windows_opened", state["windows_opened"])
    _check_count("samples_left_out", state.get("samples_left_out", 0))
    _require_mapping("state_dict['clusters']", state["clusters"])
    _check_shapes("shapes", state["shapes"])
    _check_shapes("resized_to", state.get("resized_to", {}))
    _check_window(state["window"])
    _check_running_profiles(state["memory"])
    return {
        str(name): clusters_from_state(entry, SCOPES[scope], str(name))
        for name, entry in state["clusters"].items()
    }


def check_regularizers(state: Any) -> None:
    """Check a whole state of a StructuredDropout."""
    _require_entries("state_dict", state, ("progress", "regularizers"))
    _check_progress(state["progress"])
    _require_mapping("state_dict['regularizers']", state["regularizers"])
    for name, tensors in state["regularizers"].items():
        _require_mapping(f"state_dict['regularizers'][{name!r}]", tensors)


def check_clean_steps(state: Mapping[str, Any]) -> None:
    """Check what a callback's state says of its clean steps; those of older versions say nothing."""
    _check_count("left_out", state.get("left_out", 0))
    auto = state.get("auto")
    if auto is None:
        return
    _require_entries("state_dict['auto']", auto, ("drop_prob", "first", "sum", "count"))
    _check_count("count", auto["count"])
    for name in ("drop_prob", "first", "sum", "ceiling"):
        value = auto.get(name)
        if not (isinstance(value, int | float) or (name in ("first", "ceiling") and value is None)):
            raise ValueError(f"state_dict['auto']: {name}={value!r} must be a number")
    if not 0.0 <= auto["drop_prob"] < 1.0:
        raise ValueError(f"state_dict['auto']: drop_prob={auto['drop_prob']!r} must be in [0, 1)")


def _check_progress(progress: Any) -> None:
    _require_entries("state_dict['progress']", progress, _PROGRESS)
    if type(progress["counts_steps"]) is not bool:
        raise TypeError(f"state_dict: counts_steps={progress['counts_steps']!r} must be a bool")
    for name in ("passed", "every", "origin"):
        if name != "origin" or progress[name] is not None:
            _check_count(name, progress[name])
    began = progress["began"]
    if began is not None and not (
        isinstance(began, list) and len(began) == 3 and all(type(n) is int and n >= 0 for n in began)
    ):
        raise ValueError(f"state_dict: began={began!r} must be None or epoch, step and batch, of at least 0")


def _check_count(name: str, count: Any) -> None:
    if type(count) is not int or count < 0:
        raise ValueError(f"state_dict: {name}={count!r} must be an integer of at least 0")


def _check_shapes(entry: str, shapes: Any) -> None:
    _require_mapping(f"state_dict[{entry!r}]", shapes)
    for name, shape in shapes.items():
        check_shape(shape, f"state_dict[{entry!r}][{name!r}]")


def _check_window(window: Any) -> None:
    if window is not None:
        _require_mapping("state_dict['window']", window)
        for name, sketch in window.items():
            _require_entries(f"state_dict['window'][{name!r}]", sketch, ("shape", "moments", "count"))
            check_shape(sketch["shape"], f"state_dict['window'][{name!r}]['shape']")
            _check_passed(sketch.get("passed", []), f"state_dict['window'][{name!r}]['passed']")


def _check_passed(passed: Any, what: str) -> None:
    if not isinstance(passed, list) or not all(isinstance(one, list) and len(one) == 2 for one in passed):
        raise ValueError(f"{what}={describe(passed)}: must be a list of shapes and counts")
    for shape, count in passed:
        check_shape(shape, what)
        _check_count(what, count)


def _check_running_profiles(memory: Any) -> None:
    what = "state_dict['memory']"
    _require_mapping(what, memory)
    for name, profiles in memory.items():
        is_table = isinstance(profiles, Tensor) and profiles.dtype == torch.float32 and profiles.ndim >= 3
        if not is_table or not profiles.isfinite().all():
            raise ValueError(f"{what}: profiles of layer {name!r} must be finite float32 numbers (B, *, D)")


def _require_entries(what: str, value: Any, entries: tuple[str, ...]) -> None:
    _require_mapping(what, value)
    missing = [entry for entry in entries if entry not in value]
    if missing:
        raise ValueError(f"{what}: {', '.join(missing)} missing; it was not written by this callback")


def _require_mapping(what: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise TypeError(f"{what}: must be a mapping, not {type(value).__name__}")
