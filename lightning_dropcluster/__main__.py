"""Run the command line as ``python -m lightning_dropcluster``."""

from lightning_dropcluster.cli import run

if __name__ == "__main__":
    run()
