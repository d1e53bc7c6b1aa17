"""A tiny model, data and trainer for whole fits."""

import re
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


class Classifier(pl.LightningModule):
    """A classifier as users write them; it keeps its training losses."""

    def __init__(self, model: nn.Module | None = None) -> None:
        super().__init__()
        self.model = model if model is not None else tiny_resnet()
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.model(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.model(batch[0])

    test_step = validation_step

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.model(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def tiny_resnet() -> nn.Module:
    torch.manual_seed(0)
    return ResNet(BasicBlock, (1, 1, 1, 1), channels=(8, 8, 16, 16), num_classes=4)


def two_convs() -> nn.Module:
    """A net that compiles in a quarter of a ResNet's time."""
    torch.manual_seed(0)
    convs = [nn.Sequential(nn.Conv2d(i, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU()) for i in (3, 8)]
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def make_loader(num_samples: int = 32, batch_size: int = 8, size: int = 32) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(num_samples, 3, size, size, generator=generator)
    images = F.interpolate(F.avg_pool2d(images, 4), scale_factor=4) + 0.1 * images
    # A generator of its own: a loader draws a seed for every epoch, else from torch's global one.
    dataset = TensorDataset(images, torch.arange(num_samples) % 4)
    return DataLoader(dataset, batch_size=batch_size, generator=generator)


class ResumableLoader:
    """A loader that goes on where a checkpoint was written in mid-epoch."""

    def __init__(self, loader: DataLoader) -> None:
        self.loader, self.position, self.start = loader, 0, 0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self):
        start, self.start = self.start, 0
        for position, batch in enumerate(self.loader, start=1):
            self.position = position
            if position > start:
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position % len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["position"]


def make_trainer(*callbacks: pl.Callback, **options) -> pl.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "max_epochs": 4,
    }
    return pl.Trainer(callbacks=list(callbacks), **(quiet | options))


class At(pl.Callback):
    """Call a function after every training batch."""

    def __init__(self, act: Callable[[pl.Trainer, pl.LightningModule], None]) -> None:
        self.act = act

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.act(trainer, pl_module)


class Seeds(pl.Callback):
    """Seed each step by its number, so that a resumed run draws like one that was never interrupted."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        torch.manual_seed(trainer.global_step)


def count_hooks(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def case_id(case: Any) -> str:
    """Name a case alike in every process, which addresses would not."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(case))[:60]
