"""Kernels of the fused drop, in Triton: pack what is dropped into words, then pass over the activation."""

import triton
import triton.language as tl


@triton.jit
def pack_kernel(
    uniform, prob, sizes, words, amount, samples, cells, stride, COUNT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Write words of 32 samples whose set bits are dropped, and the amount: how many features are, or prob.

    The number is an integer, so that the order of the additions does not matter.
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
        tl.atomic_add(amount, tl.sum(count * tl.load(sizes + cell, mask=inside, other=0), 0))
    else:
        tl.store(amount, p)


@triton.jit
def means_by_product_kernel(
    x, labels, means, samples, maps, positions, clusters, label_map, label_position, step_map, step_position,
    mean_map, mean_cluster, SAMPLES: tl.constexpr, POSITIONS: tl.constexpr, CLUSTERS: tl.constexpr,
):  # fmt: skip
    """Write the means of clusters in each sample of a map, as products with who is a member."""
    c = tl.program_id(1)
    n = (tl.program_id(0) * SAMPLES + tl.arange(0, SAMPLES)[:, None]).to(tl.int64)
    k = tl.program_id(2) * CLUSTERS + tl.arange(0, CLUSTERS)[None, :]
    total = tl.zeros((SAMPLES, CLUSTERS), tl.float32)
    size = tl.zeros((1, CLUSTERS), tl.int32)
    for start in range(0, positions, POSITIONS):
        s = start + tl.arange(0, POSITIONS)
        at = n * maps * positions + c * step_map + s[None, :] * step_position
        value = tl.load(x + at, mask=(n < samples) & (s[None, :] < positions), other=0.0)
        label = tl.load(labels + c * label_map + s * label_position, mask=s < positions, other=0).to(tl.int32)
        member = (label[:, None] == k) & (s[:, None] < positions)
        total = tl.dot(value, member.to(value.dtype), total)
        size += tl.sum(member.to(tl.int32), 0, keep_dims=True)
    at = means + n * maps * clusters + c * mean_map + k * mean_cluster
    tl.store(at, total / tl.maximum(size, 1).to(tl.float32), mask=(n < samples) & (k < clusters))


@triton.jit
def means_of_positions_kernel(
    x, labels, means, maps, positions, clusters, MAPS: tl.constexpr, POSITIONS: tl.constexpr,
    CLUSTERS: tl.constexpr,
):  # fmt: skip
    """Write the means of clusters that all maps share, of a sample whose channels are last in memory."""
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * MAPS + tl.arange(0, MAPS)[None, :]
    k = tl.program_id(2) * CLUSTERS + tl.arange(0, CLUSTERS)[:, None]
    total = tl.zeros((CLUSTERS, MAPS), tl.float32)
    size = tl.zeros((CLUSTERS, 1), tl.int32)
    for start in range(0, positions, POSITIONS):
        s = start + tl.arange(0, POSITIONS)
        at = n * maps * positions + s[:, None] * maps + c
        value = tl.load(x + at, mask=(s[:, None] < positions) & (c < maps), other=0.0)
        label = tl.load(labels + s, mask=s < positions, other=0).to(tl.int32)
        member = (label[None, :] == k) & (s[None, :] < positions)
        total = tl.dot(member.to(value.dtype), value, total)
        size += tl.sum(member.to(tl.int32), 1, keep_dims=True)
    at = means + n * maps * clusters + k * maps + c
    tl.store(at, total / tl.maximum(size, 1).to(tl.float32), mask=(k < clusters) & (c < maps))


@triton.jit
def means_kernel(
    x, labels, means, samples, maps, positions, clusters, label_map, label_position, step_map, step_position,
    mean_map, mean_cluster, MAPS: tl.constexpr, POSITIONS: tl.constexpr, CLUSTERS: tl.constexpr,
):  # fmt: skip
    """Write the means of clusters in each sample and map, added up in float64 without atomic operations."""
    c = tl.program_id(1) * MAPS + tl.arange(0, MAPS)[None, :]
    n = tl.program_id(0).to(tl.int64)
    for first in range(0, clusters, CLUSTERS):
        k = first + tl.arange(0, CLUSTERS)
        total = tl.zeros((MAPS, CLUSTERS), tl.float64)
        size = tl.zeros((MAPS, CLUSTERS), tl.int32)
        for start in range(0, positions, POSITIONS):
            s = start + tl.arange(0, POSITIONS)[:, None]
            inside = (c < maps) & (s < positions)
            at = n * maps * positions + c * step_map + s * step_position
            value = tl.load(x + at, mask=inside, other=0.0).to(tl.float64)
            label = tl.load(labels + c * label_map + s * label_position, mask=inside, other=0).to(tl.int32)
            member = (label[:, :, None] == k[None, None, :]) & inside[:, :, None]
            total += tl.sum(tl.where(member, value[:, :, None], 0.0), 0)
            size += tl.sum(member.to(tl.int32), 0)
        at = means + n * maps * clusters + tl.trans(c) * mean_map + k[None, :] * mean_cluster
        mean = total / tl.maximum(size, 1).to(tl.float64)
        tl.store(at, mean, mask=(tl.trans(c) < maps) & (k[None, :] < clusters))


@triton.jit
def drop_kernel(
    x, out, labels, words, amount, means, samples, maps, positions, clusters, cells, label_map,
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
    of_mean = label * maps + c if LAST else c * clusters + label
    cell = c * clusters + label if PER_MAP else label
    word = tl.load(words + tl.program_id(1).to(tl.int64) * cells + cell, mask=inside, other=0)
    if BY_BATCH:
        gone = tl.load(amount).to(tl.float32)
        total *= samples
        scale = 1.0 + tl.div_rn(gone, tl.maximum(total - gone, 1.0))
    else:
        scale = tl.div_rn(1.0, 1.0 - tl.load(amount).to(tl.float32))
    if not MEAN:
        scale = scale.to(out.dtype.element_ty)  # as a table of the activation's type would round it
    for i in range(32):
        n = tl.program_id(1) * 32 + i
        at = n.to(tl.int64) * features + f
        ok = f < tl.where(n < samples, features, 0)
        value = tl.load(x + at, mask=ok, other=0.0).to(TYPE)
        kept = (word >> i) & 1 == 0
        if MEAN:
            near = tl.load(means + n.to(tl.int64) * maps * clusters + of_mean, mask=ok, other=0.0).to(TYPE)
            weight = tl.where(kept, 1.0 - scale.to(TYPE), 1.0)  # pyright: ignore[reportArgumentType]
            # Exact where the feature is the mean, where the weight is 0, and where it is 1.
            from_value, from_mean = value + weight * (near - value), near - (near - value) * (1.0 - weight)
            made = tl.where(tl.abs(weight) < 0.5, from_value, from_mean)
        else:
            made = tl.where(kept, value * scale.to(TYPE), 0.0)  # pyright: ignore[reportArgumentType]
        tl.store(out + at, made.to(out.dtype.element_ty), mask=ok)
