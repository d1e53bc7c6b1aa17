"""DropCluster for PyTorch Lightning: drop learned clusters of features in any timm model by a callback."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_dropcluster.callbacks import DropCluster, StructuredDropout
    from lightning_dropcluster.clustering import Clusterer, FaissKMeans, ReNA, TorchKMeans, Ward
    from lightning_dropcluster.inspection import preview
    from lightning_dropcluster.layers import select_layers
    from lightning_dropcluster.methods import (
        REGULARIZERS,
        AdvancedDropout,
        ChannelCorrDrop,
        ClusterDrop,
        CorrDrop,
        DropBlock,
        Dropout,
        DropRegularizer,
        ProbDropBlock,
        RBlock,
        Regularizer,
        SpatialDropout,
    )
    from lightning_dropcluster.visualization import (
        plot_clusters,
        plot_history,
        plot_overlay,
        plot_sizes,
        save_animation,
    )

__version__ = version("lightning_dropcluster")

__all__ = [
    "REGULARIZERS",
    "AdvancedDropout",
    "ChannelCorrDrop",
    "ClusterDrop",
    "Clusterer",
    "CorrDrop",
    "DropBlock",
    "DropCluster",
    "DropRegularizer",
    "Dropout",
    "FaissKMeans",
    "ProbDropBlock",
    "RBlock",
    "ReNA",
    "Regularizer",
    "SpatialDropout",
    "StructuredDropout",
    "TorchKMeans",
    "Ward",
    "plot_clusters",
    "plot_history",
    "plot_overlay",
    "plot_sizes",
    "preview",
    "save_animation",
    "select_layers",
]

# Lightning, FAISS and torchvision take seconds to import: a name brings what it needs when it is first used.
# The cheaper rooms come first.
_ROOMS = ("methods", "layers", "clustering", "inspection", "visualization", "callbacks", "functional")


if not TYPE_CHECKING:  # checkers would take any name for one that is there

    def __getattr__(name: str) -> Any:
        for room in _ROOMS if name in __all__ else ():
            module = import_module(f"{__name__}.{room}")
            if name in module.__all__:
                return getattr(module, name)
        if name in _ROOMS:
            return import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})
