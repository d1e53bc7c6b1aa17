"""See what is there: packages, the GPU, and what FAISS's first call on it takes of time and memory."""

from __future__ import annotations

import argparse
import importlib
import sys
import time

import torch

from benchmarks.common.record import provenance, write_line
from benchmarks.cost.timing import clock, usual_device

NEEDED = (
    "faiss pytorch_lightning torchmetrics timm triton jsonargparse docstring_parser fsspec flash_kmeans "
    "pytest hypothesis sklearn PIL rich"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default=None, help="file to which the record is appended as well")
    out = parser.parse_args(sys.argv[1:]).out
    torch.zeros(1, device=usual_device())  # first of all: torch brings the libraries that FAISS looks for
    seconds = {name: import_seconds(name) for name in NEEDED.split()}
    missing = [name for name, took in seconds.items() if took is None]
    what = {"missing": missing, "number_missing": len(missing), "import_faiss_s": seconds["faiss"]}
    write_line({"benchmark": "start", **what, **first_call(), **provenance()}, out)


def import_seconds(name: str) -> float | None:
    """Import a package; None where it fails, and the log says how."""
    started = time.monotonic()
    try:
        importlib.import_module(name)
    except Exception as error:
        print(f"{name}: {error!r}")
        return None
    return round(time.monotonic() - started, 2)


def first_call() -> dict[str, float]:
    """Cluster once, and say how much memory the GPU lost to others than torch."""
    import faiss

    from lightning_dropcluster import FaissKMeans

    device = usual_device()
    points = torch.randn(4, 3136, 64, device=device)
    before = foreign_bytes(device)
    _, took = clock(lambda: FaissKMeans().fit(points, 196, grid=(56, 56)), device)
    held = foreign_bytes(device) - before
    return {
        "faiss_gpus": faiss.get_num_gpus(),
        "first_fit_s": round(took.seconds, 3),
        "faiss_mib": held / 2**20,
    }


def foreign_bytes(device: torch.device) -> int:
    """Bytes of the GPU that are in use, but not by torch."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)


if __name__ == "__main__":
    main()
