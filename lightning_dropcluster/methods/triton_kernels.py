"""Kernels of the fused drop, in Triton: pack what is dropped into words, then pass over the activation."""

import triton
import triton.language as tl


@triton.jit
def pack_kernel(
    uniform, prob, sizes, words, dropped, samples, cells, stride, COUNT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Write words of 32 samples whose set bits are dropped, and add up how many features are.

    The sum is an integer, so that the order of the additions does not matter.
    """
    cell = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = cell < cells
    p = tl.load(prob)
    word = tl.zeros((BLOCK,), tl.int32)
    count = tl.zeros((BLOCK,), tl.int64)
    for i in range(32):
        n = tl.program_id(1) * 32 + i
        ok = cell < tl.where(n < samples, cells, 0)
        drawn = tl.load(uniform + n.to(tl.int64) * stride + cell, mask=ok, other=1.0)
        bit = (drawn < p).to(tl.int32)
        word |= bit << i
        count += bit
    tl.store(words + tl.program_id(1).to(tl.int64) * cells + cell, word, mask=inside)
    if COUNT:
        tl.atomic_add(dropped, tl.sum(count * tl.load(sizes + cell, mask=inside, other=0), 0))


@triton.jit
def means_kernel(
    x, labels, means, maps, positions, clusters, sample, step_map, step_position, label_map, label_position,
    TYPE: tl.constexpr, MAPS: tl.constexpr, POSITIONS: tl.constexpr, CLUSTERS: tl.constexpr,
):  # fmt: skip
    """Write the means (N, C, K) of clusters in each sample and map, added up without atomic operations."""
    c = tl.program_id(0) * MAPS + tl.arange(0, MAPS)[None, :]
    n = tl.program_id(1).to(tl.int64)
    for first in range(0, clusters, CLUSTERS):
        k = first + tl.arange(0, CLUSTERS)
        total = tl.zeros((MAPS, CLUSTERS), TYPE)
        size = tl.zeros((MAPS, CLUSTERS), tl.int32)
        for start in range(0, positions, POSITIONS):
            s = start + tl.arange(0, POSITIONS)[:, None]
            inside = (c < maps) & (s < positions)
            value = tl.load(x + n * sample + c * step_map + s * step_position, mask=inside, other=0.0)
            label = tl.load(labels + c * label_map + s * label_position, mask=inside, other=0).to(tl.int32)
            member = (label[:, :, None] == k[None, None, :]) & inside[:, :, None]
            total += tl.sum(tl.where(member, value.to(TYPE)[:, :, None], 0.0), 0)
            size += tl.sum(member.to(tl.int32), 0)
        at = means + (n * maps + tl.trans(c)) * clusters + k[None, :]
        mean = total / tl.maximum(size, 1).to(TYPE)
        tl.store(at, mean, mask=(tl.trans(c) < maps) & (k[None, :] < clusters))


@triton.jit
def drop_kernel(
    x, out, labels, words, dropped, prob, means, samples, maps, positions, clusters, cells, label_map,
    label_position, total, LAST: tl.constexpr, PER_MAP: tl.constexpr, BY_BATCH: tl.constexpr,
    MEAN: tl.constexpr, TYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Read 32 samples in the order of memory, with one look-up for all, and write what becomes of them."""
    f = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    features = maps * positions
    inside = f < features
    c = f % maps if LAST else f // positions
    s = f // maps if LAST else f % positions
    label = tl.load(labels + c * label_map + s * label_position, mask=inside, other=0).to(tl.int32)
    cell = c * clusters + label if PER_MAP else label
    word = tl.load(words + tl.program_id(1).to(tl.int64) * cells + cell, mask=inside, other=0)
    if BY_BATCH:
        gone = tl.load(dropped).to(tl.float32)
        scale = 1.0 + tl.div_rn(gone, tl.maximum(total - gone, 1.0))
    else:
        scale = tl.div_rn(1.0, 1.0 - tl.load(prob).to(tl.float32))
    if not MEAN:
        scale = scale.to(out.dtype.element_ty)  # as a table of the activation's type would round it
    for i in range(32):
        n = tl.program_id(1) * 32 + i
        at = n.to(tl.int64) * features + f
        ok = f < tl.where(n < samples, features, 0)
        value = tl.load(x + at, mask=ok, other=0.0).to(TYPE)
        kept = (word >> i) & 1 == 0
        if MEAN:
            near = tl.load(means + (n.to(tl.int64) * maps + c) * clusters + label, mask=ok, other=0.0).to(
                TYPE
            )
            weight = tl.where(kept, 1.0 - scale.to(TYPE), 1.0)  # pyright: ignore[reportArgumentType]
            # Exact where the feature is the mean, where the weight is 0, and where it is 1.
            from_value, from_mean = value + weight * (near - value), near - (near - value) * (1.0 - weight)
            made = tl.where(tl.abs(weight) < 0.5, from_value, from_mean)
        else:
            made = tl.where(kept, value * scale.to(TYPE), 0.0)  # pyright: ignore[reportArgumentType]
        tl.store(out + at, made.to(out.dtype.element_ty), mask=ok)
