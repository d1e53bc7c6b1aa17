"""R-Block for a LightningModule; nothing here imports Lightning."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dropcluster.functional import r_block_loss


class RBlock:
    """A mix-in that gives a LightningModule, or any module, the training step of R-Block.

    One pass over the batch and a copy of it takes the place of two passes: what is dropped differs between
    the halves, and each half is a sub-model. With ``paired=True`` in the regularisers it differs as much as
    can be. A step takes twice the time and memory, and batch norm sees each sample twice. See
    `functional.r_block_loss` for the loss and its source.

    Example:
        >>> from pytorch_lightning import LightningModule
        >>> class Classifier(RBlock, LightningModule):
        ...     def __init__(self, model):
        ...         super().__init__()
        ...         self.model = model
        ...
        ...     def forward(self, images):
        ...         return self.model(images)
        ...
        ...     def training_step(self, batch, batch_idx):
        ...         images, targets = batch
        ...         return self.r_block_loss(images, targets, weight=1.0)
    """

    def r_block_loss(
        self,
        inputs: Tensor,
        targets: Tensor,
        *,
        weight: float = 1.0,
        task_loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    ) -> Tensor:
        """Run the module on a batch and a copy of it, and return the loss of the two halves.

        Args:
            inputs: (N, ...), what ``forward`` takes.
            targets: what the task loss takes beside the logits, (N, ...).
            weight: of the halves' disagreement, at least 0.
            task_loss: (logits, targets) -> 0-d loss.

        Returns:
            The loss, 0-d.
        """
        logits: Tensor = self(torch.cat([inputs, inputs]))  # pyright: ignore[reportCallIssue]
        first, second = logits.chunk(2)
        return r_block_loss(first, second, targets, weight=weight, task_loss=task_loss)
