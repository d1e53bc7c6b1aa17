"""Dropping in few launches on a GPU: draw, pack, one pass over the activation; where there is Triton."""

import os
import warnings
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from lightning_dropcluster.methods.dropping.memory_order import is_channels_last, is_dense
from lightning_dropcluster.methods.masking import is_transformed

_IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # as Triton read it when it was imported
_HAS_TRITON = find_spec("triton") is not None


def can_fuse(x: Tensor, labels: Tensor, clusters: int, mean: bool) -> bool:
    """Whether `drop_fused` can treat an activation."""
    if not (x.is_cuda or _IS_INTERPRETED) or not _HAS_TRITON or not x.numel():
        return False
    if not (torch.compiler.is_compiling() or _can_start(x)):
        return False
    positions = x.shape[2:].numel()
    fits = labels.shape[1:] in (x.shape[2:], (1,) * (x.ndim - 2)) and x[0].numel() < 2**31
    # A table of means, of all clusters in each map, is to be small beside the activation.
    return fits and (is_dense(x) or is_channels_last(x)) and (not mean or 4 * clusters <= positions)


def drop_fused(
    x: Tensor, labels: Tensor, sizes: Tensor, uniform: Tensor, prob: Tensor, *, by_batch: bool, mean: bool
) -> Tensor:
    """Do what `cluster_drop` does where ``uniform`` (N or 1, G, K) is at least ``prob``.

    ``by_batch`` scales by the ratio of features to those kept, otherwise by 1 / (1 - prob). ``sizes`` (G, K)
    are integers. For backward the words and the labels are kept.
    """
    # Imported when used: with the compilers of torch it takes a second.
    from lightning_dropcluster.methods.dropping.triton_ops import apply, pack

    if not torch.compiler.is_compiling() and _is_elsewhere(x.device):
        with torch.cuda.device(x.device):  # Triton starts kernels on the current one
            return drop_fused(x, labels, sizes, uniform, prob, by_batch=by_batch, mean=mean)
    if not is_dense(x):  # tokens behind a class token: every sample has a gap before it
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    words, amount = pack(uniform, prob, sizes, x.shape[0], by_batch)
    return apply(x, labels, words, amount, uniform.shape[2], uniform.shape[1] > 1, by_batch, mean)


def _can_start(x: Tensor) -> bool:
    """Whether kernels may be started here and now; for fake tensors none are."""
    return not is_transformed() and (_IS_INTERPRETED or type(x) is not Tensor or _triton_works())


@cache
def _triton_works() -> bool:
    """Whether Triton finds what it needs: with the first kernel it compiles a piece of C."""
    try:
        from triton.runtime import driver

        driver.active.get_current_target()
    except Exception as error:
        warnings.warn(
            f"dropping takes more launches on the GPU, since Triton does not run: {error}", stacklevel=2
        )
        return False
    return True


def _is_elsewhere(device: torch.device) -> bool:
    return torch.cuda.is_initialized() and device.index not in (None, torch.cuda.current_device())
