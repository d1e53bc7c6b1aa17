"""A network that learns CIFAR-10 in seconds on a GPU, and images that never leave it.

After airbench94 (https://arxiv.org/abs/2404.00498): patches are whitened, convs begin as the identity, biases
learn faster. Ours has residual connections, trains for longer, and averages no weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from benchmarks.common.data import Split, jitter

LABEL_SMOOTHING = 0.2
PEAK_LR, MOMENTUM, WEIGHT_DECAY = 1.5, 0.85, 0.00133  # for batches of 1,024
FASTER_BIASES = 64
WARM_UP, LAST_LR = 0.23, 0.07  # share of the steps, and of the learning rate


class DeviceBatches:
    """Shuffled, augmented and normalised batches of images that are kept on a device in uint8.

    Args:
        split: images (N, 3, H, W) and labels, on the device.
        moments: mean and standard deviation by which images are normalised, on the scale 0 to 1.
        batch_size: an incomplete last batch is left out.
        seed: of the order and the augmentation.
        mirror: whether to mirror half of the images.
    """

    def __init__(
        self, split: Split, moments: tuple[Tensor, Tensor], batch_size: int, seed: int, mirror: bool
    ) -> None:
        self.split, self.batch_size, self.mirror = split, batch_size, mirror
        self.mean, self.std = (moment.to(split.images.device) for moment in moments)
        self.generator = Generator(split.images.device).manual_seed(seed)

    def __len__(self) -> int:
        return len(self.split) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        device = self.generator.device
        order = torch.randperm(len(self.split), generator=self.generator, device=device)
        for chosen in order.split(self.batch_size)[: len(self)]:
            images, labels = self.split[chosen]
            images = cutout(jitter(self.normalised(images), self.generator, self.mirror), self.generator)
            yield images.contiguous(memory_format=torch.channels_last), labels

    def normalised(self, images: Tensor) -> Tensor:
        return (images.float() / 255 - self.mean) / self.std


def cutout(images: Tensor, generator: Generator, share: float = 0.25) -> Tensor:
    """Blank a square of each image, whose side is a share of the image's; it may lie partly outside."""
    count, _, height, width = images.shape
    draw = torch.rand(2, count, 1, generator=generator, device=images.device)
    inside = [
        (torch.arange(side, device=images.device) - (middle * side).floor()).abs() < share * side / 2
        for side, middle in zip((height, width), draw, strict=True)
    ]
    return images.masked_fill((inside[0][:, :, None] & inside[1][:, None, :])[:, None], 0.0)


class Group(nn.Module):
    """Two convs on half the resolution, with a residual connection around the second."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.pool = nn.MaxPool2d(2)
        self.norm1, self.norm2 = (nn.BatchNorm2d(out, momentum=0.4) for _ in range(2))
        for conv in (self.conv1, self.conv2):
            nn.init.dirac_(conv.weight.data[: conv.in_channels])
        for norm in (self.norm1, self.norm2):
            norm.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm1(self.pool(self.conv1(x))))
        return x + F.gelu(self.norm2(self.conv2(x)))


class FastResNet(nn.Module):
    """Whitened 2 x 2 patches, three groups, a maximum over positions and a linear layer.

    Args:
        images: (N, 3, H, W), normalised, whose patches are whitened.
        num_classes: outputs.
        widths: channels of the groups.
    """

    def __init__(self, images: Tensor, num_classes: int, widths: tuple[int, ...] = (64, 256, 256)) -> None:
        super().__init__()
        self.whiten = nn.Conv2d(3, 24, 2)
        self.whiten.weight = nn.Parameter(whitening(images), requires_grad=False)
        nn.init.zeros_(self.whiten.bias)  # pyright: ignore[reportArgumentType]
        self.groups = nn.ModuleList(Group(*sizes) for sizes in zip((24, *widths), widths, strict=False))
        self.head = nn.Linear(widths[-1], num_classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.whiten(x))
        for group in self.groups:
            x = group(x)
        return self.head(x.amax((2, 3))) / 9


def whitening(images: Tensor) -> Tensor:
    """Filters (24, 3, 2, 2) that make 2 x 2 patches uncorrelated and of variance 1, and their negatives."""
    patches = F.unfold(images, 2).movedim(1, -1).reshape(-1, 12)
    values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    filters = (vectors / (values + 5e-4).sqrt()).T.reshape(12, 3, 2, 2)
    return torch.cat([filters, -filters])


class FastClassifier(pl.LightningModule):
    """The network and how it is trained.

    Args:
        net: the network.
        batch_size: by which learning rates are scaled.
    """

    def __init__(self, net: nn.Module, batch_size: int) -> None:
        super().__init__()
        self.net, self.lr = net, PEAK_LR * batch_size / 1024

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1], label_smoothing=LABEL_SMOOTHING)

    def configure_optimizers(self) -> Any:
        learned = [weight for weight in self.parameters() if weight.requires_grad]
        biases = [m.bias for m in self.net.modules() if isinstance(m, nn.BatchNorm2d)]
        others = [weight for weight in learned if all(weight is not bias for bias in biases)]
        groups = [self._group(others, self.lr), self._group(biases, FASTER_BIASES * self.lr)]
        sgd = torch.optim.SGD(groups, momentum=MOMENTUM, nesterov=True)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.LambdaLR(sgd, lambda step: triangle(step / steps))
        return {"optimizer": sgd, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _group(self, parameters: list[nn.Parameter], lr: float) -> dict[str, object]:
        """What decays by the same share in a step, whatever its learning rate."""
        return {"params": parameters, "lr": lr, "weight_decay": WEIGHT_DECAY * self.lr / lr}


def triangle(position: float) -> float:
    """Share of the peak's learning rate at a position in [0, 1] of training."""
    if position < WARM_UP:
        return 0.2 + 0.8 * position / WARM_UP
    return 1 - (1 - LAST_LR) * (position - WARM_UP) / (1 - WARM_UP)
