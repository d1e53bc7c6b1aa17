"""Draw the idea: what Dropout, DropBlock and DropCluster each hide in one feature map of a photograph."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytorch_lightning as pl
import timm
import torch
from jsonargparse import auto_cli
from sklearn.datasets import load_sample_image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2

from benchmarks.common.record import quiet
from lightning_dropcluster import ClusterDrop, DropBlock, DropCluster, Dropout
from lightning_dropcluster.visualization.colors import neighbor_colors
from lightning_dropcluster.visualization.panels import draw_map

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PHOTOS = ("flower.jpg", "china.jpg")  # scikit-learn's two photographs; the first is drawn
LAYER = "model.layer1"
SIZE = 96
DROP_PROB = 0.3


class Classifier(pl.LightningModule):
    """Tells crops of the two photographs apart."""

    def __init__(self) -> None:
        super().__init__()
        self.model = timm.create_model("test_resnet", num_classes=len(PHOTOS))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)


def main(
    out: str = "benchmarks/results/idea.png", crops: int = 256, epochs: int = 4, cluster_size: int = 24
) -> None:
    """Learn clusters from random crops of two photographs, and draw what each method hides in one map.

    Args:
        out: PNG file for the picture.
        crops: training images.
        epochs: passes over them.
        cluster_size: mean number of features per cluster.
    """
    pl.seed_everything(0, verbose=False)
    photos = [load_photo(name) for name in PHOTOS]
    model, labels = learn_clusters(photos, crops, epochs, cluster_size)
    photo = v2.functional.resize(photos[0], [SIZE, SIZE])
    maps = feature_maps(model, photo)
    chosen = int(maps.flatten(1).std(1).argmax())
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    draw(photos[0], maps[chosen], labels[chosen]).savefig(out, dpi=150)
    print(out)


def load_photo(name: str) -> Tensor:
    """Cut the middle square out of one of scikit-learn's photographs: (3, H, H), values from -1 to 1."""
    pixels = torch.tensor(load_sample_image(name)).permute(2, 0, 1) / 127.5 - 1
    return v2.functional.center_crop(pixels, [min(pixels.shape[1:])])


def learn_clusters(
    photos: list[Tensor], crops: int, epochs: int, cluster_size: int
) -> tuple[Classifier, Tensor]:
    """Train on random crops with the callback, and return the network and the clusters of `LAYER`."""
    crop = v2.Compose([v2.RandomResizedCrop(SIZE, (0.6, 1.0), (0.9, 1.1)), v2.ColorJitter(0.5, 0.3)])
    targets = torch.arange(crops) % len(photos)
    images = torch.stack([crop(photos[target] / 2 + 0.5) * 2 - 1 for target in targets])
    model = Classifier()
    callback = DropCluster(LAYER, cluster_size=cluster_size, start=0.5, num_samples=crops)
    with quiet():
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            callbacks=[callback],
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        trainer.fit(model, DataLoader(TensorDataset(images, targets), batch_size=32, shuffle=True))
    return model.eval(), callback.labels[LAYER]


def feature_maps(model: Classifier, photo: Tensor) -> Tensor:
    """Return the output of `LAYER` for one image: (C, H, W)."""
    seen: list[Tensor] = []

    def look(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append(output)

    handle = model.get_submodule(LAYER).register_forward_hook(look)
    with torch.inference_mode():
        model.model(photo[None])
    handle.remove()
    return seen[0][0]


def draw(photo: Tensor, feature_map: Tensor, labels: Tensor) -> Figure:
    """Lay the photograph, the map, its clusters, and what each method hides side by side."""
    from matplotlib.figure import Figure

    methods = {
        "Dropout hides\nsingle features": Dropout(DROP_PROB),
        "DropBlock hides\nsquares, anywhere": DropBlock(DROP_PROB, block_size=5),
        "DropCluster hides\nlearned clusters": ClusterDrop(labels[None], DROP_PROB),
    }
    figure = Figure(figsize=(13, 2.6), layout="compressed")
    axes = figure.subplots(1, 6)
    axes[0].imshow((photo / 2 + 0.5).permute(1, 2, 0).numpy())
    axes[1].imshow(feature_map.numpy())
    draw_map(axes[2], labels, neighbor_colors(labels[None]))
    for ax, method in zip(axes[3:], methods.values(), strict=True):
        ax.imshow(feature_map.masked_fill(draw_hidden(method, labels.shape), torch.nan).numpy())
    titles = ["image", "one feature map", "features that\nrespond alike", *methods]
    for ax, title in zip(axes, titles, strict=True):
        ax.set(title=title, xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    return figure


def draw_hidden(method: nn.Module, shape: Sequence[int], tries: int = 50) -> Tensor:
    """Tell what a method hides: of several draws, the one whose share is closest to `DROP_PROB`."""
    draws = method(torch.ones(tries, 1, *shape))[:, 0] == 0
    return draws[(draws.float().mean((1, 2)) - DROP_PROB).abs().argmin()]


if __name__ == "__main__":
    auto_cli(main)
