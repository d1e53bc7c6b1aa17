"""Nearest centroids by FAISS, of many problems in one search."""

from threading import Lock

import faiss
import torch
from torch import Tensor

from lightning_dropcluster.clustering.torch_kmeans import TorchKMeans
from lightning_dropcluster.memory import make_room_beside_torch

_CENTROIDS = 1024  # in a search; more would be more work for a GPU than more searches are
_POINTS = 2**17  # likewise, to bound memory
_SCRATCH = 128 * 2**20  # bytes; FAISS would take 1.5 GiB beside torch's allocator
_HANDLES = 128 * 2**20  # bytes that cuBLAS may take for FAISS, which ends the process where they are missing
_LOCK = Lock()  # FAISS's resources serve one thread at a time
_resources: dict[int, "faiss.StandardGpuResources"] = {}


class FaissLloyd(TorchKMeans):
    """The loop of `TorchKMeans` with FAISS's search in it; for a GPU, but it runs anywhere."""

    def _assign(self, points: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
        return search_nearest(points, means)


def search_nearest(points: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
    """Let FAISS do what `assign_nearest` does, for as many problems in one search as pays.

    A few more columns spell the number of each problem: they keep the centroids of other problems further
    away than any of its own can be.
    """
    items, clusters = points.shape[1], means.shape[1]
    radius = torch.linalg.vector_norm(points, dim=2).max()
    together = max(1, min(_CENTROIDS // clusters, _POINTS // items, len(points)))
    codes = _codes(together, points.shape[2], points.device) * (1.1 * radius)
    found = []
    for some, centres in zip(points.split(together), means.split(together), strict=True):
        both = (_append(part, codes[: len(some)]).flatten(0, 1) for part in (some, centres))
        found.append([one.view(len(some), items) for one in _search(*both)])
    labels, distances = map(torch.cat, zip(*found, strict=True))
    first = torch.arange(len(points), device=points.device) % together * clusters
    # Where nothing lives all centroids are far away, those of other problems too.
    return (labels - first[:, None]).clamp_(0, clusters - 1), distances.clamp_(min=0.0)


def _codes(problems: int, width: int, device: torch.device) -> Tensor:
    """Spell the numbers of problems in signs, (B, columns): two differ by 2 in one column at least.

    Columns of zeros fill the rows up to 16 bytes, which a GPU reads at once.
    """
    bits = (problems - 1).bit_length()
    digits = torch.arange(problems, device=device)[:, None] >> torch.arange(bits, device=device) & 1
    return torch.nn.functional.pad(2.0 * digits.float() - 1.0, (0, -(width + bits) % 4))


def _append(points: Tensor, codes: Tensor) -> Tensor:
    return torch.cat([points, codes[:, None].expand(-1, points.shape[1], -1)], dim=2)


def _search(points: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Return which of the centres (K, D) is nearest to each point (F, D), and the squared distance."""
    if points.is_cuda:
        distances, labels = _search_on_gpu(points, centres)
    else:
        distances, labels = map(torch.from_numpy, faiss.knn(points.numpy(), centres.numpy(), 1))
    return labels[:, 0], distances[:, 0]


def _search_on_gpu(points: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    device = points.device.index
    with _LOCK, torch.cuda.device(device):
        try:
            if device not in _resources:
                _resources[device] = _make_resources(points.device)
            return faiss.knn_gpu(_resources[device], points, centres, 1, device=device)
        except Exception:
            _resources.pop(device, None)  # half made, they would crash the process at the next search
            raise


def _make_resources(device: torch.device) -> "faiss.StandardGpuResources":
    import faiss.contrib.torch_utils  # lets knn_gpu take tensors, on torch's current stream

    make_room_beside_torch(_SCRATCH + _HANDLES, device)
    resources = faiss.StandardGpuResources()
    resources.setTempMemory(_SCRATCH)
    resources.setPinnedMemory(0)
    return resources
