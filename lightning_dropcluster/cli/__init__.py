"""The command line."""

from lightning_dropcluster.cli.command import main, run

__all__ = ["main", "run"]
