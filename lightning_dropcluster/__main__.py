"""Run the command line as ``python -m lightning_dropcluster``."""

from lightning_dropcluster.cli import main

if __name__ == "__main__":
    main()
