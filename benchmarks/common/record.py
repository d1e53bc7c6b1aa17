"""What benchmarks share: quiet runs, and records of where numbers come from."""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
CODE = ("lightning_dropcluster", "benchmarks", ":!benchmarks/results", ":!*.md")
PACKAGES = ("timm", "pytorch-lightning", "torchmetrics", "lightning-dropcluster")
HINTS = (
    ".*have no `val_dataloader`",
    ".*does not have many workers",  # the images are in memory: nothing to load
    ".*LeafSpec",  # Lightning 2.6 with torch 2.15
)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Lightning's hints out of sight and everything that it prints out of standard output."""
    disabled = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        with redirect_stdout(sys.stderr), warnings.catch_warnings():
            for message in HINTS:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        logging.disable(disabled)


def provenance(device: torch.device | None = None) -> dict[str, Any]:
    """Say what produced a number: versions, commit and device, and nothing that names the machine.

    Args:
        device: that did the work; the one that a Lightning trainer takes where it is ``None``.

    Returns:
        Entries of a record.
    """
    return {"versions": versions(), "commit": commit(), "device": device_name(device)}


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that matter; None for one that is not installed."""
    found = {name.replace("-", "_"): _version(name) for name in PACKAGES}
    faiss = _version("faiss-gpu") or _version("faiss-cpu")
    return {"python": platform.python_version(), "torch": torch.__version__, **found, "faiss": faiss}


def commit(root: Path = ROOT) -> str | None:
    """Name the commit checked out in `root`, marked "-dirty" if the code differs.

    Outside of git it is what the environment says, BENCHMARK_COMMIT, or None.
    """
    head = _git(root, "rev-parse", "HEAD")
    if head is None:
        return os.environ.get("BENCHMARK_COMMIT")
    return head + ("-dirty" if _git(root, "status", "--porcelain", "--", *CODE) else "")


def device_name(device: torch.device | None = None) -> str:
    """Name the kind of GPU, or of processor with its threads in use, but no single machine.

    Args:
        device: that is meant; the accelerator where it is ``None`` and there is one.

    Returns:
        The name.
    """
    device = device or torch.accelerator.current_accelerator(check_available=True)
    if device is not None and device.type != "cpu":
        return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"cpu, {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}"


def write_line(record: dict[str, Any], out: str | None = None) -> None:
    """Print a record as one line of JSON and append it to the file `out`, if given."""
    if out is not None:
        append_line(record, out)
    print(json.dumps(record, allow_nan=False), flush=True)


def append_line(record: dict[str, Any], out: str) -> None:
    """Append a record to the file `out` as one line of JSON."""
    line = json.dumps(record, allow_nan=False)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    with Path(out).open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _git(root: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
