"""The command line."""

from lightning_dropcluster.cli.command import main

__all__ = ["main"]
