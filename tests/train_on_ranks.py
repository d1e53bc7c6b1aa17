"""A script as users write it, for tests that let Lightning start the ranks: python train_on_ranks.py ddp."""

import sys
import warnings

import torch
from fits import Classifier, make_loader, make_trainer
from processes import digest

from lightning_dropcluster import DropCluster

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.multiprocessing.set_sharing_strategy("file_system")  # the other one fails in some containers
    callback = DropCluster("layer[12].*.conv2", 0.5, num_samples=16, every_n_epochs=1)
    trainer = make_trainer(callback, strategy=sys.argv[1], devices=2)
    trainer.fit(Classifier(), make_loader(48, 4))
    print(f"labels {digest(callback.labels)} of {len(callback.labels)} layers", flush=True)
    print(f"metrics {' '.join(trainer.callback_metrics)}", flush=True)
