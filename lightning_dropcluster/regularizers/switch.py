"""Switch: a regulariser that is applied or not, as its owner says between steps."""

from torch import Tensor, nn


class Switch(nn.Module):
    """Apply a regulariser while it is on, and make sure that it maps like to like.

    That makes two variants of it for ``torch.compile``: off and on.

    Args:
        regularizer: module x -> x.

    Attributes:
        active: whether to apply it.
    """

    def __init__(self, regularizer: nn.Module) -> None:
        super().__init__()
        self.regularizer, self.active = regularizer, False

    def forward(self, x: Tensor) -> Tensor:
        """Regularise an activation.

        Args:
            x: (N, C, *spatial).

        Returns:
            What the regulariser makes of ``x``, in the type of ``x``; ``x`` itself while the switch is off.

        Raises:
            ValueError: where the regulariser returns anything but a tensor of the shape of ``x``.
        """
        if not self.active:
            return x
        made = self.regularizer(x)
        if not isinstance(made, Tensor) or made.shape != x.shape:
            what = f"shape {tuple(made.shape)}" if isinstance(made, Tensor) else f"a {type(made).__name__}"
            raise ValueError(
                f"regularizer: {type(self.regularizer).__name__} must return a tensor of shape "
                f"{tuple(x.shape)} as it was given, but returned {what}"
            )
        return made.to(x.dtype)
