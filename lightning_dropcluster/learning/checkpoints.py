"""Reading the clusters in a checkpoint, from wherever Lightning reads one."""

import io
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pickle import UnpicklingError
from typing import Any, BinaryIO

import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from lightning_dropcluster.checks import describe
from lightning_dropcluster.learning.clusters import Clusters, clusters_from_labels, clusters_from_state
from lightning_dropcluster.learning.scopes import SCOPES, Scope

_METADATA = (
    "meta.pt"  # all but weights and optimiser, beside the shards of Lightning's FSDP and ModelParallel
)


@dataclass(frozen=True)
class SavedClusters:
    """What a checkpoint holds of all its DropClusters, by name of layer, and when it was written."""

    epoch: int
    step: int
    clusters: dict[str, Clusters]
    scopes: dict[str, Scope]


def read_checkpoint(path: str | os.PathLike[str]) -> SavedClusters:
    """Read the clusters that a Lightning checkpoint holds, of all its DropClusters."""
    with _open(os.fspath(path)) as file:
        checkpoint = _load(file)
    checkpoint = checkpoint if isinstance(checkpoint, Mapping) else {}
    saved = SavedClusters(checkpoint.get("epoch", 0), checkpoint.get("global_step", 0), {}, {})
    callbacks = checkpoint.get("callbacks")
    for state in callbacks.values() if isinstance(callbacks, Mapping) else ():
        # By what it holds, since a subclass files it under its own name.
        scope = SCOPES.get(str(state.get("scope"))) if isinstance(state, Mapping) else None
        if scope is not None and isinstance(state.get("clusters"), Mapping):
            for name, entry in state["clusters"].items():
                saved.clusters[str(name)] = clusters_from_state(entry, scope, str(name))
                saved.scopes[str(name)] = scope
    return saved


def read_initial_labels(source: Any, scope: Scope) -> dict[str, Clusters]:
    """Read clusters to start from: labels as ``DropCluster.labels`` gives them, or a checkpoint's."""
    if isinstance(source, str | os.PathLike):
        return _clusters_in(source, scope)
    if not isinstance(source, Mapping):
        raise TypeError(
            f"initial_labels={describe(source)}: must be a mapping of layer names to labels, or the path of "
            f"a checkpoint, not {type(source).__name__}"
        )
    if not source:
        raise ValueError("initial_labels={}: must hold the labels of at least one layer")
    try:
        return {str(name): clusters_from_labels(labels, scope, str(name)) for name, labels in source.items()}
    except (TypeError, ValueError) as error:
        raise type(error)(f"initial_labels: {error}") from error


def find_checkpoints(folder: str | os.PathLike[str]) -> list[str]:
    """List the checkpoints (``*.ckpt``) in a folder, sharded ones among them."""
    folder = os.fspath(folder).rstrip("/")
    files, inside = url_to_fs(folder)
    names = (path.rstrip("/").rpartition("/")[2] for path in files.ls(inside, detail=False))
    return [f"{folder}/{name}" for name in sorted(names) if name.endswith(".ckpt")]


def _clusters_in(path: str | os.PathLike[str], scope: Scope) -> dict[str, Clusters]:
    try:
        saved = read_checkpoint(path)
    except (OSError, ImportError, TypeError, ValueError) as error:
        raise type(error)(f"initial_labels={str(path)!r}: {error}") from error
    found = {name: clusters for name, clusters in saved.clusters.items() if saved.scopes[name] is scope}
    if not found:
        raise ValueError(
            f"initial_labels={str(path)!r}: the checkpoint holds no labels of a DropCluster with "
            f"scope={scope.name!r}"
        )
    return found


def _open(path: str) -> BinaryIO:
    """Open a file as Lightning does; of a sharded checkpoint the file that holds what callbacks saved."""
    files, inside = url_to_fs(path)
    try:
        file = _open_in(files, inside)
        if isinstance(files, LocalFileSystem):
            return file
        with file:  # over a network it may not be seekable, and torch seeks
            return io.BytesIO(file.read())
    except FileNotFoundError as error:
        raise FileNotFoundError("No such file or directory") from error
    except (IsADirectoryError, PermissionError):
        raise
    except OSError as error:  # libraries raise subclasses of their own
        raise OSError(str(error) or type(error).__name__) from error


def _open_in(files: Any, path: str) -> BinaryIO:
    try:
        return files.open(path, "rb")
    except OSError:  # which one a folder gives differs
        if not files.isdir(path):
            raise
    if not files.isfile(f"{path}/{_METADATA}"):
        raise IsADirectoryError(
            f"a folder without {_METADATA}, where a sharded checkpoint keeps what callbacks saved"
        )
    return files.open(f"{path}/{_METADATA}", "rb")


def _load(file: BinaryIO) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        refused = _refused_globals(file, error)
        if refused:
            raise ValueError(
                "torch refuses some of its classes with weights_only=True; if you trust the file, allow them "
                f"first: torch.serialization.add_safe_globals([{refused}])"
            ) from error
        raise ValueError(
            f"no checkpoint that torch loads with weights_only=True ({_reason(error)})"
        ) from error


def _refused_globals(file: BinaryIO, error: Exception) -> str:
    """Name the classes and functions that torch would load once they are allowed."""
    if "add_safe_globals" not in str(error):
        return ""
    file.seek(0)
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except (RuntimeError, ValueError):  # no zip file: torch's message names the first
        names = re.findall(r"GLOBAL (\S+) was not", str(error))
    return ", ".join(sorted(re.sub(r"^(__builtin__|builtins)\.", "", name) for name in names))


def _reason(error: Exception) -> str:
    """Find the line that says why, between torch's advice before and after it."""
    lines = str(error).partition("\n\nCheck the documentation")[0].strip().splitlines()
    if not isinstance(error, UnpicklingError):
        lines = [f"{type(error).__name__}: {line.partition('. ')[0]}" for line in lines[:1]]
    return lines[-1].strip() if lines else type(error).__name__
