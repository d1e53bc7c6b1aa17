"""The callback from YAML, through LightningCLI of both namespaces, and from the containers of Hydra."""

import importlib
import inspect

import pytest
import pytorch_lightning as pl
import yaml
from fits import Classifier, make_loader, make_trainer, tiny_resnet
from hydra.utils import instantiate
from omegaconf import OmegaConf
from pytorch_lightning.cli import LightningCLI
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD

from lightning_dropcluster import DropBlock, DropCluster, StructuredDropout, TorchKMeans

CONFIG = """
trainer:
  max_epochs: 2
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning_dropcluster.DropCluster
      init_args:
        layers: "layer[12].*.conv2"
        drop_prob: 0.2
        start: 0.0
        every_n_train_steps: 4
        num_samples: 8
    - class_path: lightning_dropcluster.DropCluster
      init_args:
        layers: [conv1, "layer3.*.conv1"]
        start: 1
        cluster_size: 8
        scope: position
        schedule: cosine
        num_samples: 8
        clusterer:
          class_path: lightning_dropcluster.TorchKMeans
          init_args: {max_iter: 7}
        layer_types: [torch.nn.Conv2d, torch.nn.BatchNorm2d]
    - class_path: lightning_dropcluster.StructuredDropout
      init_args: {layers: "layer2.*.conv1", regularizer: drop_block, drop_prob: 0.2}
    - class_path: lightning_dropcluster.StructuredDropout
      init_args:
        layers: "layer3.*.conv2"
        regularizer:
          class_path: lightning_dropcluster.DropBlock
          init_args: {drop_prob: 0.3, block_size: 3}
    - class_path: lightning_dropcluster.StructuredDropout
      init_args: {layers: "layer4.*.conv2", regularizer: torch.nn.Dropout2d}
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Lightning 2.6 lags behind jsonargparse
@pytest.mark.parametrize("namespace", ["pytorch_lightning", "lightning.pytorch"])
def test_yaml(namespace, tmp_path, monkeypatch):
    lightning = pytest.importorskip(namespace)
    cli = importlib.import_module(f"{namespace}.cli")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = tiny_resnet()

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self):
            return SGD(self.parameters(), lr=0.01)

    class Data(lightning.LightningDataModule):
        def train_dataloader(self):
            return make_loader()

    monkeypatch.setattr("sys.argv", ["train.py"])
    (tmp_path / "config.yaml").write_text(CONFIG)
    ran = cli.LightningCLI(
        Module,
        Data,
        seed_everything_default=False,
        args=[
            "fit",
            "--config",
            str(tmp_path / "config.yaml"),
            f"--trainer.default_root_dir={tmp_path / 'saved'}",
        ],
    )
    saved = yaml.safe_load((tmp_path / "saved" / "config.yaml").read_text())
    picked = [one["init_args"]["layers"] for one in saved["trainer"]["callbacks"][:2]]
    assert picked == ["layer[12].*.conv2", ["conv1", "layer3.*.conv1"]]
    first, second = (c for c in ran.trainer.callbacks if isinstance(c, DropCluster))
    assert list(first.labels) == ["model.layer1.0.conv2", "model.layer2.0.conv2"]
    assert list(second.labels) == ["model.conv1", "model.layer3.0.conv1"]
    assert type(second._layers.clusterer) is TorchKMeans
    assert second._layers.clusterer.max_iter == 7
    assert second.layer_types == [nn.Conv2d, nn.BatchNorm2d]
    structured = [c for c in ran.trainer.callbacks if isinstance(c, StructuredDropout)]
    made = [next(iter(callback.regularizers.values())) for callback in structured]
    assert [type(module) for module in made] == [DropBlock, DropBlock, nn.Dropout2d]
    assert (made[0].block_size, made[1].block_size) == (7, 3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("callback", [DropCluster, StructuredDropout])
def test_help_tells_what_the_docstring_says_of_each_argument(callback, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py"])
    name = f"lightning_dropcluster.{callback.__name__}"
    with pytest.raises(SystemExit, match="0"):
        LightningCLI(Classifier, pl.LightningDataModule, args=["fit", f"--trainer.callbacks.help={name}"])
    body = capsys.readouterr().out.split("Help for ")[1]
    documented = dict(_arguments(callback))
    assert documented.keys() == inspect.signature(callback).parameters.keys()
    for argument, text in documented.items():
        helped = body.split(f"  --trainer.callbacks.{argument} ", 1)[1].split("  --trainer.callbacks.")[0]
        assert " ".join(text.split()[:6]) in " ".join(helped.split())


def _arguments(callback):
    """The arguments that a docstring describes, with their first lines."""
    section = inspect.getdoc(callback).split("Args:\n")[1].split("\n\n")[0]
    for line in section.splitlines():
        if not line.startswith(" " * 8):
            yield line.strip().split(": ", 1)


def test_hydra():
    def get_class(path):
        return {"_target_": "hydra.utils.get_class", "path": path}

    config = OmegaConf.create(
        {
            "_target_": "lightning_dropcluster.DropCluster",
            "layers": ["conv1", "layer1.*.conv2"],
            "layer_types": [get_class("torch.nn.Conv2d"), get_class("torch.nn.BatchNorm2d")],
            "clusterer": {"_target_": "lightning_dropcluster.TorchKMeans", "max_iter": 3},
            "start": 0.0,
            "num_samples": 8,
        }
    )
    callback = instantiate(config)
    make_trainer(callback, max_epochs=1).fit(Classifier(), make_loader())
    assert list(callback.labels) == ["model.conv1", "model.layer1.0.conv2"]
    assert callback._layers.clusterer.max_iter == 3
