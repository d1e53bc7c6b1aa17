"""What a reclustering of a layer did: numbers to log, and what its user should be told."""

from collections.abc import Iterator

from torch import Tensor

from lightning_dropcluster.clustering import adjusted_rand_index
from lightning_dropcluster.learning.clusters import Clusters
from lightning_dropcluster.learning.scopes import SCOPES, Grouping, Shape
from lightning_dropcluster.methods.dropping.label_tables import cluster_sizes

Report = dict[str, float]
"""What one reclustering of one layer did, ready to be logged."""


def make_report(labels: Tensor, counts: Tensor, shape: Shape, before: Clusters | None) -> Report:
    """Sum up new labels (B, F) with so many clusters (B,).

    Number and mean size of the clusters, the sum of squared shares, the largest share, and where there were
    clusters of the same shape before, the agreement with them.
    """
    shares = cluster_sizes(labels, len(labels), int(counts.max())) / labels.shape[1]
    report = {
        "num_clusters": counts.double().mean().item(),
        "cluster_size": (labels.shape[1] / counts.double()).mean().item(),
        "concentration": shares.square().sum(1).mean().item(),
        "largest_share": shares.max().item(),
    }
    if before is not None and before.shape == shape:
        report["agreement"] = adjusted_rand_index(labels, before.table.reshape(labels.shape))
    return report


def warnings_for(name: str, counts: Tensor, shape: Shape, grouping: Grouping) -> Iterator[str]:
    """Tell in a sentence each where the counts of clusters (B,) are not what the settings make one expect."""
    wanted = grouping.num_clusters or grouping.clusters_for(shape)
    if fewer := int((counts < wanted).sum()):
        yield (
            f"layer {name!r}: num_clusters={wanted} is lowered to the number of distinct profiles in "
            f"{fewer} of {len(counts)} clusterings, to {int(counts.min())} at the least"
        )
    items = SCOPES[grouping.scope].problems(shape)[1]
    if grouping.num_clusters is None and grouping.is_capped(shape):
        yield (
            f"layer {name!r}: with scope={grouping.scope!r} there are {wanted} clusters at most, so "
            f"cluster_size becomes {items / wanted:.0f}"
        )
    if grouping.num_clusters is None and wanted == 1 < items:
        yield (
            f"layer {name!r}: with outputs of shape {shape} and scope={grouping.scope!r} one cluster "
            f"holds all {items} features, which are dropped at once; lower cluster_size, or choose layers "
            f"with {'more channels' if grouping.scope == 'channel' else 'larger maps'}"
        )
