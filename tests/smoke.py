"""What make dist asks of a wheel in an empty environment: a tiny fit learns clusters and leaves no hook."""

import sys
from pathlib import Path

import pytorch_lightning as pl
import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_dropcluster
from lightning_dropcluster import DropCluster


class Classifier(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = timm.create_model("test_resnet", num_classes=4)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def main() -> None:
    data = TensorDataset(torch.randn(32, 3, 32, 32), torch.arange(32) % 4)
    module, callback = Classifier(), DropCluster("conv1.0", start=0, num_samples=16)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(max_epochs=2, accelerator="cpu", callbacks=[callback], **quiet)
    trainer.fit(module, DataLoader(data, batch_size=8))

    assert list(callback.labels) == ["model.conv1.0"], callback.labels
    assert not any(layer._forward_hooks for layer in module.modules())
    assert Path(lightning_dropcluster.__file__).is_relative_to(sys.prefix), lightning_dropcluster.__file__
    print(f"lightning_dropcluster {lightning_dropcluster.__version__} works in {sys.prefix}")


if __name__ == "__main__":
    main()
