"""Clusters filled with their own mean: sums by cluster, in slices that fit the cache."""

import torch
from torch import Tensor

from lightning_dropcluster.methods.dropping.label_tables import look_up
from lightning_dropcluster.methods.dropping.memory_order import is_channels_last

# Features that are worked on at once, and those of one sample among them. On a CPU what they need stays in
# the cache; elsewhere few operations count, and memory on the way is bounded.
_SLICES = {"cpu": (2**17, 2**15)}
_LARGE_SLICES = (2**25, 2**25)
_SHARED = {"cpu": 2**18}  # features worked on at once where maps share one partition
_LANES = 64  # maps at least where their features are interleaved, to read in long runs


def fill_means_whole(x: Tensor, labels: Tensor, keep: Tensor, scale: Tensor) -> Tensor:
    """Return ``m + (x - m) * keep * scale``, m being the mean of the cluster in its sample and map."""
    if _are_whole_maps(labels):
        return _fill_whole_maps(x, labels, keep, scale)
    last = is_channels_last(x)
    index, keep, sizes = _clusters_of_maps(x, labels, keep)
    flat = _flat_index(index, sizes.shape[1], last)
    return _fill(x, flat, _weights(x, keep, scale), sizes, last).to(x.dtype)


def fill_means(out: Tensor, x: Tensor, labels: Tensor, keep: Tensor, scale: Tensor) -> None:
    """Write what `fill_means_whole` returns, with less memory and, on a CPU, in less time."""
    if _are_whole_maps(labels):
        out.copy_(_fill_whole_maps(x, labels, keep, scale))
        return
    if len(labels) == 1 and x.ndim > 2:
        _fill_shared(out, x, labels, keep, scale)
        return
    last = is_channels_last(x)
    index, keep, sizes = _clusters_of_maps(x, labels, keep)
    weights = _weights(x, keep, scale)
    maps, samples = _slice_shape(index, last, x.device.type)
    for i in range(0, len(index), maps):
        part, size = slice(i, i + maps), sizes[i : i + maps]
        flat = _flat_index(index[part], sizes.shape[1], last)
        for j in range(0, len(x), samples):
            weight = weights[j : j + samples, part] if len(weights) > 1 else weights[:, part]
            out[j : j + samples, part] = _fill(x[j : j + samples, part], flat, weight, size, last)


@torch.library.custom_op("lightning_dropcluster::fill_means", mutates_args=())
def fill_means_opaquely(x: Tensor, labels: Tensor, keep: Tensor, scale: Tensor) -> Tensor:
    """Return what `fill_means` writes, as one operation, since compilers would keep its indices."""
    out = torch.empty_like(x)
    fill_means(out, x, labels, keep, scale)
    return out


@fill_means_opaquely.register_fake
def _(x: Tensor, labels: Tensor, keep: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(x)


def _fill_whole_maps(x: Tensor, labels: Tensor, keep: Tensor, scale: Tensor) -> Tensor:
    """The same where each map is one cluster: additions to a single sum would wait for each other."""
    weights = look_up(_weights(x, keep, scale), labels.long().view(-1, 1).expand(x.shape[1], 1))
    spatial = tuple(range(2, x.ndim))
    means = x.sum(spatial, keepdim=True, dtype=_type_of_sums(x)) / x.shape[2:].numel()
    filled = x.to(weights.dtype).lerp(
        means.to(weights.dtype), weights.view(*weights.shape[:2], *labels.shape[1:])
    )
    return filled.to(x.dtype)


def _fill_shared(out: Tensor, x: Tensor, labels: Tensor, keep: Tensor, scale: Tensor) -> None:
    """The same where maps share one partition, so that looking weights up once serves them all."""
    last, index, exact = is_channels_last(x), labels.flatten().long(), _type_of_sums(x)
    sizes = torch.zeros(keep.shape[2], dtype=exact, device=x.device)
    sizes = sizes.index_add(0, index, sizes.new_ones(len(index))).clamp(min=1.0)
    weights = _weights(x, keep, scale).index_select(2, index)
    if last:
        weights = weights.mT
    means_of = _means_of_rows if last else _means_of_columns
    samples = max(1, _SHARED.get(x.device.type, _LARGE_SLICES[0]) // max(1, x[:1].numel()))
    for start in range(0, len(x), samples):
        part = slice(start, start + samples)
        features = x[part].movedim(1, -1).flatten(1, -2) if last else x[part].flatten(2)
        means = means_of(features, index, sizes, weights.dtype)
        filled = features.to(weights.dtype).lerp(means, weights[part] if len(weights) > 1 else weights)
        out[part] = (filled.mT if last else filled).unflatten(2, x.shape[2:])


def _means_of_rows(features: Tensor, index: Tensor, sizes: Tensor, dtype: torch.dtype) -> Tensor:
    """The mean for each feature (N, F, C) of interleaved maps: a position is a row, read in one go."""
    sums = sizes.new_zeros(len(features), len(sizes), features.shape[2])
    sums.index_add_(1, index, features.to(sizes.dtype))
    return (sums / sizes[:, None]).to(dtype).index_select(1, index)


def _means_of_columns(features: Tensor, index: Tensor, sizes: Tensor, dtype: torch.dtype) -> Tensor:
    """The mean for each feature (N, C, F) of maps that lie one after the other."""
    numbers = index.expand(features.shape)
    sums = sizes.new_zeros(*features.shape[:2], len(sizes)).scatter_add_(2, numbers, features.to(sizes.dtype))
    return (sums / sizes).to(dtype).gather(2, numbers)


def _fill(x: Tensor, index: Tensor, weights: Tensor, sizes: Tensor, last: bool) -> Tensor:
    """Move x (N, C, *spatial) towards the means of its clusters, by weights (N or 1, C, M), in their type."""
    ordered = x.movedim(1, -1) if last else x
    flat = ordered.flatten(1)
    wide, rows = flat.to(sizes.dtype), index.expand(flat.shape)
    sums = wide.new_zeros(len(x), sizes.numel()).scatter_add(1, rows, wide)
    means = (sums / sizes.flatten()).to(weights.dtype).gather(1, rows)
    # Exact where x is the mean, where the weight is 0, and where it is 1.
    values = wide if wide.dtype == weights.dtype else flat.to(weights.dtype)
    filled = values.lerp(means, weights.flatten(1).expand(len(x), -1).gather(1, rows))
    return filled.view(ordered.shape).movedim(-1, 1) if last else filled.view(ordered.shape)


def _clusters_of_maps(x: Tensor, labels: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Labels (C, *spatial) below M, keep table (N or 1, C, M) and sizes (C, M) of clusters within maps.

    M is at most the number of features of a map, since each cluster of the layer may be in each map.
    """
    channels, spatial = x.shape[1], x.shape[2:]
    index = labels.long().expand(x.shape[1:]).reshape(channels, spatial.numel())
    keep = keep.expand(-1, channels, -1)
    if keep.shape[2] > index.shape[1]:
        keep, index = look_up(keep, index), _first_members(index, keep.shape[2])
    exact = _type_of_sums(x)
    sizes = torch.zeros(channels, keep.shape[2], dtype=exact, device=x.device)
    sizes = sizes.scatter_add(1, index, torch.ones_like(index, dtype=exact)).clamp(min=1.0)
    return index.view(channels, *spatial), keep, sizes


def _type_of_sums(x: Tensor) -> torch.dtype:
    """A type in which sums of equal features are exact, but for those that are float64 already."""
    return torch.float32 if x.element_size() == 2 or x.device.type == "mps" else torch.float64


def _first_members(labels: Tensor, num_clusters: int) -> Tensor:
    """Number clusters (C, F) of maps by the place of their first member."""
    places = torch.arange(labels.shape[1], device=labels.device).expand(labels.shape)
    first = torch.full((len(labels), num_clusters), labels.shape[1], device=labels.device)
    return first.scatter_reduce(1, labels, places, "amin").gather(1, labels)


def _weights(x: Tensor, keep: Tensor, scale: Tensor) -> Tensor:
    """How far each cluster goes to its mean, 1 being all the way."""
    return 1.0 - keep * scale.to(torch.promote_types(x.dtype, torch.float32))


def _flat_index(labels: Tensor, num_clusters: int, last: bool) -> Tensor:
    """Number the clusters (C, *spatial) of all maps through, in the order in which features lie in memory."""
    first = torch.arange(len(labels), device=labels.device) * num_clusters
    numbers = labels + first.view(-1, *(1 for _ in labels.shape[1:]))
    return (numbers.movedim(0, -1) if last else numbers).flatten()


def _slice_shape(labels: Tensor, last: bool, device: str) -> tuple[int, int]:
    """How many maps and samples to work on at once."""
    features = max(1, labels.shape[1:].numel())
    most, row = _SLICES.get(device, _LARGE_SLICES)
    maps = max(_LANES if last else 1, row // features)
    return maps, max(1, most // max(1, features * min(maps, len(labels))))


def _are_whole_maps(labels: Tensor) -> bool:
    return labels.ndim > 1 and labels.shape[1:].numel() == 1
