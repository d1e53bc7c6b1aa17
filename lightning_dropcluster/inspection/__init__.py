"""What the callbacks would do to a model, without training it."""

from lightning_dropcluster.inspection.preview import preview

__all__ = ["preview"]
