"""The operations of the fused drop, as torch and its compilers know them."""

from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton

from lightning_dropcluster.methods import triton_kernels as kernels
from lightning_dropcluster.methods.memory_order import is_dense

_BLOCK = 512
_SAMPLES = 32  # in a word


@triton_op("lightning_dropcluster::pack", mutates_args={})
def pack(uniform: Tensor, prob: Tensor, sizes: Tensor, samples: int, counts: bool) -> tuple[Tensor, Tensor]:
    """Pack what is dropped into words (N / 32, G * K), and count its features where asked to."""
    cells, rows = sizes.numel(), -(-samples // _SAMPLES)
    words = torch.empty(rows, cells, dtype=torch.int32, device=uniform.device)
    dropped = (torch.zeros if counts else torch.empty)((), dtype=torch.int64, device=uniform.device)
    stride = cells if len(uniform) > 1 else 0
    wrap_triton(kernels.pack_kernel)[(-(-cells // _BLOCK), rows)](
        uniform.contiguous(),
        prob,
        sizes,
        words,
        dropped,
        samples,
        cells,
        stride,
        COUNT=counts,
        BLOCK=_BLOCK,
    )
    return words, dropped


@triton_op("lightning_dropcluster::apply", mutates_args={})
def apply(
    x: Tensor,
    labels: Tensor,
    words: Tensor,
    dropped: Tensor,
    prob: Tensor,
    clusters: int,
    per_map: bool,
    by_batch: bool,
    mean: bool,
) -> Tensor:
    """Scale what is kept, and replace what is dropped."""
    if not is_dense(x):
        x = x.contiguous()
    samples, maps, positions = len(x), x.shape[1], x.shape[2:].numel()
    last, wide = not x.is_contiguous(), x.dtype == torch.float64
    labels = labels.contiguous()
    label_position = int(labels.shape[1:].numel() > 1)
    label_map = (positions if label_position else 1) if len(labels) > 1 else 0
    kind = kernels.tl.float64 if wide else kernels.tl.float32
    means = dropped  # stands in where there are none
    if mean:
        means = _means(x, labels, clusters, label_map, label_position)
    out = torch.empty_like(x)
    wrap_triton(kernels.drop_kernel)[(-(-maps * positions // _BLOCK), len(words))](
        x, out, labels, words, dropped, prob, means, samples, maps, positions, clusters, words.shape[1],
        label_map, label_position, float(labels.numel() * samples), LAST=last, PER_MAP=per_map,
        BY_BATCH=by_batch, MEAN=mean, TYPE=kind, BLOCK=_BLOCK,
    )  # fmt: skip
    return out


def _means(x: Tensor, labels: Tensor, clusters: int, label_map: int, label_position: int) -> Tensor:
    """Means (N, C, K): sums are in float32 for types of 16 bits, and in float64 for others."""
    samples, maps, positions, last = len(x), x.shape[1], x.shape[2:].numel(), not x.is_contiguous()
    wide = x.element_size() > 2
    means = torch.empty(
        samples, maps, clusters, dtype=torch.float64 if wide else torch.float32, device=x.device
    )
    tile = 16 if last else 1
    step_map, step_position = (1, maps) if last else (positions, 1)
    wrap_triton(kernels.means_kernel)[(-(-maps // tile), samples)](
        x, labels, means, maps, positions, clusters, maps * positions, step_map, step_position, label_map,
        label_position, TYPE=kernels.tl.float64 if wide else kernels.tl.float32, MAPS=tile,
        POSITIONS=8 if last else 128, CLUSTERS=16,
    )  # fmt: skip
    return means


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *tensors = inputs[:5]
    ctx.save_for_backward(*tensors)
    ctx.rest = inputs[5:]


def _backward(ctx: Any, grad: Tensor) -> Any:
    """For fixed clusters the map is linear and its own adjoint."""
    return apply(grad, *ctx.saved_tensors, *ctx.rest), *[None] * 8


def _map(info: Any, in_dims: Any, *inputs: Any) -> tuple[Tensor, int]:
    """One after the other: whoever maps over batches has words of his own for each."""
    each = [
        [value if dim is None else value.select(dim, i) for value, dim in zip(inputs, in_dims, strict=True)]
        for i in range(info.batch_size)
    ]
    return torch.stack([apply(*one) for one in each]), 0


apply.register_autograd(_backward, setup_context=_save)  # pyright: ignore[reportFunctionMemberAccess]
apply.register_vmap(_map)  # pyright: ignore[reportFunctionMemberAccess]
