"""The operations of the fused drop, as torch and its compilers know them."""

from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton
from triton import language as tl

from lightning_dropcluster.methods.dropping.memory_order import is_dense
from lightning_dropcluster.methods.dropping.triton_kernels import (
    drop_kernel,
    means_by_product_kernel,
    means_kernel,
    means_of_positions_kernel,
    pack_kernel,
)

# Kernels are named without their module: torch finds them so, and compiles anew where their source changed.
# Sizes come from shapes: len() would fix the batch size in compiled code.
_BLOCK = 512
_SAMPLES = 32  # in a word


@triton_op("lightning_dropcluster::pack", mutates_args={})
def pack(uniform: Tensor, prob: Tensor, sizes: Tensor, samples: int, counts: bool) -> tuple[Tensor, Tensor]:
    """Pack what is dropped into words (N / 32, G * K), and count its features or copy the probability."""
    cells, rows = sizes.numel(), -(-samples // _SAMPLES)
    words = torch.empty(rows, cells, dtype=torch.int32, device=uniform.device)
    amount = torch.zeros_like(prob, dtype=torch.int64) if counts else torch.empty_like(prob)
    stride = cells if uniform.shape[0] > 1 else 0
    wrap_triton(pack_kernel)[(-(-cells // _BLOCK), rows)](
        uniform.contiguous(),
        prob,
        sizes,
        words,
        amount,
        samples,
        cells,
        stride,
        COUNT=counts,
        BLOCK=_BLOCK,
    )
    return words, amount


def _means(x: Tensor, labels: Tensor, clusters: int, label_map: int, label_position: int) -> Tensor:
    """Means of clusters, (N, C, K), or (N, K, C) where the channels are last in memory.

    Sums are in float32 for types of 16 bits, and in float64 for others.
    """
    samples, maps, positions, last = x.shape[0], x.shape[1], x.shape[2:].numel(), not x.is_contiguous()
    wide = x.element_size() > 2
    shape = (samples, clusters, maps) if last else (samples, maps, clusters)
    means = torch.empty(shape, dtype=torch.float64 if wide else torch.float32, device=x.device)
    places = (1, maps, 1, maps) if last else (positions, 1, clusters, 1)
    fixed = x, labels, means, samples, maps, positions, clusters, label_map, label_position, *places
    if wide:
        tile = 16 if last else 1
        wrap_triton(means_kernel)[(samples, -(-maps // tile))](
            *fixed, MAPS=tile, POSITIONS=8 if last else 128, CLUSTERS=16
        )
    elif last and label_position and not label_map:
        grid = samples, -(-maps // 64), -(-clusters // 64)
        wrap_triton(means_of_positions_kernel)[grid](
            x, labels, means, maps, positions, clusters, MAPS=64, POSITIONS=64, CLUSTERS=64
        )
    else:
        wrap_triton(means_by_product_kernel)[(-(-samples // 64), maps, -(-clusters // 128))](
            *fixed, SAMPLES=64, POSITIONS=64, CLUSTERS=128
        )
    return means


@triton_op("lightning_dropcluster::apply", mutates_args={})
def apply(
    x: Tensor,
    labels: Tensor,
    words: Tensor,
    amount: Tensor,
    clusters: int,
    per_map: bool,
    by_batch: bool,
    mean: bool,
) -> Tensor:
    """Scale what is kept, and replace what is dropped; words and amount are from `pack`."""
    if not is_dense(x):
        x = x.contiguous()
    maps, positions, last = x.shape[1], x.shape[2:].numel(), not x.is_contiguous()
    labels = labels.contiguous()
    label_position = int(labels.shape[1:].numel() > 1)
    label_map = (positions if label_position else 1) if labels.shape[0] > 1 else 0
    means = amount  # stands in where there are none
    if mean:
        means = _means(x, labels, clusters, label_map, label_position)
    out = torch.empty_like(x)
    wrap_triton(drop_kernel)[(-(-maps * positions // _BLOCK), words.shape[0])](
        x, out, labels, words, amount, means, x.shape[0], maps, positions, clusters, words.shape[1],
        label_map, label_position, float(labels.numel()), LAST=last, PER_MAP=per_map, BY_BATCH=by_batch,
        MEAN=mean, TYPE=tl.float64 if x.dtype == torch.float64 else tl.float32, BLOCK=_BLOCK,
    )  # fmt: skip
    return out


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *tensors = inputs[:4]
    ctx.save_for_backward(*tensors)
    ctx.rest = inputs[4:]


def _backward(ctx: Any, grad: Tensor) -> Any:
    """For fixed clusters the map is linear and its own adjoint."""
    return apply(grad, *ctx.saved_tensors, *ctx.rest), *[None] * 7


def _map(info: Any, in_dims: Any, *inputs: Any) -> tuple[Tensor, int]:
    """One after the other: whoever maps over batches has words of his own for each."""
    each = [
        [value if dim is None else value.select(dim, i) for value, dim in zip(inputs, in_dims, strict=True)]
        for i in range(info.batch_size)
    ]
    return torch.stack([apply(*one) for one in each]), 0


apply.register_autograd(_backward, setup_context=_save)  # pyright: ignore[reportFunctionMemberAccess]
apply.register_vmap(_map)  # pyright: ignore[reportFunctionMemberAccess]
