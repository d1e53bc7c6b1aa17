"""R-Block: the loss of two passes that drop differently, and a mix-in for a LightningModule.

Nothing here imports Lightning.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def r_block_loss(
    first: Tensor,
    second: Tensor,
    targets: Tensor,
    *,
    weight: float = 1.0,
    task_loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> Tensor:
    """Return the mean task loss of two passes plus their disagreement.

    It is (task(first) + task(second)) / 2 + weight (KL(p1 || p2) + KL(p2 || p1)) / 2.

    Source: R-Block, https://arxiv.org/abs/2307.15150, which makes the outputs of two sub-models agree whose
    drop regions differ. We had only its abstract; the loss is that of R-Drop, its parent,
    https://arxiv.org/abs/2106.14448, which sums the task losses: its alpha is twice our weight.

    Args:
        first: logits (N, K, ...) of one pass.
        second: logits of the other, of the same shape.
        targets: what the task loss takes beside the logits, (N, ...).
        weight: of the disagreement, at least 0.
        task_loss: (logits, targets) -> 0-d loss.

    Returns:
        The loss, 0-d.

    Example:
        >>> logits = torch.zeros(3, 4)
        >>> r_block_loss(logits, logits, torch.tensor([0, 1, 2]))  # no disagreement, log 4
        tensor(1.3863)
    """
    task = (task_loss(first, targets) + task_loss(second, targets)) / 2.0
    return task + weight * disagreement(first, second)


def disagreement(first: Tensor, second: Tensor) -> Tensor:
    """Return the symmetric Kullback-Leibler divergence of two predictions, (KL(p || q) + KL(q || p)) / 2.

    Args:
        first: logits (N, K, ...) of p.
        second: logits of q, of the same shape.

    Returns:
        The divergence, at least 0, averaged over all dimensions but that of the classes; 0-d, float32 or
        better.

    Raises:
        ValueError: if the shapes differ, or there is one class.

    Example:
        >>> disagreement(torch.zeros(3, 4), torch.ones(3, 4))
        tensor(0.)
    """
    if first.shape != second.shape:
        raise ValueError(f"second of shape {tuple(second.shape)}: must be as first, {tuple(first.shape)}")
    if first.shape[1] == 1:
        raise ValueError(f"first of shape {tuple(first.shape)}: must have two classes or more to compare")
    exact = torch.promote_types(first.dtype, torch.float32)
    log_p, log_q = first.log_softmax(1, dtype=exact), second.log_softmax(1, dtype=exact)
    # The sum of both directions is the sum over classes of (p - q) (log p - log q).
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(1).mean() / 2.0


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
