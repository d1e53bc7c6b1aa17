"""Pictures reach loggers that take images, and nothing of a logger reaches training."""

from types import SimpleNamespace

import numpy as np
import pytest
from fits import Classifier, make_loader, make_trainer
from matplotlib.figure import Figure
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.loggers.logger import Logger, rank_zero_experiment
from torch import nn

from lightning_dropcluster import DropCluster
from lightning_dropcluster.visualization import logged

SETTINGS = {"start": 0.0, "every_n_epochs": 1, "num_samples": 8}


class Recorder(Logger):
    """A logger whose experiment, or the logger itself, has one method for images, as the real ones have."""

    name, version = "recorder", "0"

    def __init__(self, kind, error=None):
        super().__init__()
        self.pictures = []

        def take(tag, picture, step):
            if error is not None:
                raise error
            self.pictures.append((tag, picture, step))

        self._run = SimpleNamespace()
        if kind == "tensorboard":
            self._run.add_image = lambda tag, image, step, dataformats: take(tag, image, step)
        elif kind == "wandb":
            self.log_image = lambda key, images, step: take(key, images[0], step)
        elif kind == "mlflow":
            self.run_id = "run"
            self._run.log_image = lambda run_id, image, artifact_file: take(
                *artifact_file.rsplit("/", 1)[:1], image, int(artifact_file[-12:-4])
            )
        elif kind == "comet":
            self._run.log_image = lambda image, name, step: take(name, image, step)

    @property
    @rank_zero_experiment
    def experiment(self):
        return self._run

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, params, *args, **kwargs):
        pass


@pytest.fixture
def no_pause(monkeypatch):
    monkeypatch.setattr(logged, "_LEAST_PAUSE", 0.0)


@pytest.fixture
def blank(monkeypatch):
    """Draw nothing, which takes no time."""
    monkeypatch.setattr(logged, "plot_clusters", lambda *_, **__: Figure((1, 1)))


def fit(*loggers, callback=None, **options):
    callback = callback or DropCluster(["conv1", "layer1.0.conv2"], **SETTINGS)
    make_trainer(callback, logger=list(loggers), **({"max_epochs": 3} | options)).fit(
        Classifier(), make_loader()
    )
    return callback


@pytest.mark.usefixtures("no_pause")
def test_each_reclustering_sends_a_picture_of_each_layer_to_each_logger():
    loggers = [Recorder(kind) for kind in ("tensorboard", "wandb", "mlflow", "comet")]
    fit(*loggers)
    names = ["dropcluster/model.conv1", "dropcluster/model.layer1.0.conv2"]
    for logger in loggers:
        sent = [(tag, step) for tag, _, step in logger.pictures]
        assert sent == [(name, step) for step in (1, 4, 8) for name in names]
        assert all(p.dtype == np.uint8 and p.ndim == 3 and p.shape[2] == 3 for _, p, _ in logger.pictures)


@pytest.mark.usefixtures("no_pause")
def test_the_picture_is_that_of_the_labels_with_their_colors(monkeypatch):
    drawn = []

    def spy(labels, **options):
        drawn.append((labels, options))
        return Figure((1, 1))

    monkeypatch.setattr(logged, "plot_clusters", spy)
    callback = fit(Recorder("wandb"), callback=DropCluster("conv1", **SETTINGS))
    assert drawn[-1][0].equal(callback.labels["model.conv1"])
    assert [options["epoch"] for _, options in drawn] == [0, 1, 2]
    assert drawn[0][1]["previous"] is None
    assert drawn[2][1]["previous"].equal(drawn[1][0])
    assert all(options["colors"].equal(drawn[0][1]["colors"]) for _, options in drawn)
    fit(Recorder("wandb"), callback=callback)
    assert drawn[3][1]["previous"] is None


@pytest.mark.usefixtures("no_pause", "blank")
def test_layers_without_maps_are_passed_over():
    logger = Recorder("tensorboard")
    fit(
        logger,
        callback=DropCluster(["global_pool", "conv1"], **SETTINGS, layer_types=nn.Module),
        max_epochs=1,
    )
    assert {tag for tag, _, _ in logger.pictures} == {"dropcluster/model.conv1"}


@pytest.mark.usefixtures("no_pause", "blank")
def test_at_most_four_layers_are_drawn():
    logger = Recorder("comet")
    fit(logger, callback=DropCluster("**.conv[12]", **SETTINGS), max_epochs=1)
    assert len(logger.pictures) == 4


def test_pictures_wait_where_they_would_take_much_of_the_time():
    logger = Recorder("comet")
    fit(logger)
    assert {step for _, _, step in logger.pictures} == {1}


@pytest.mark.usefixtures("no_pause", "blank")
def test_a_failing_logger_is_named_once_and_training_goes_on():
    failing, other = Recorder("comet", OSError("no network")), Recorder("comet")
    with pytest.warns(
        UserWarning, match=r"a logger did not take a picture.*OSError\('no network'\)"
    ) as caught:
        callback = fit(failing, other)
    assert sum("did not take a picture" in str(one.message) for one in caught) == 1
    assert len(other.pictures) == 6
    assert callback.labels


@pytest.mark.parametrize("case", ["switched off", "no images", "no matplotlib", "fast_dev_run"])
def test_nothing_is_drawn_where_nobody_wants_it(case, monkeypatch, tmp_path):
    monkeypatch.setattr(logged, "plot_clusters", lambda *_, **__: pytest.fail("drawn"))
    callback, logger, options = None, Recorder("tensorboard"), {}
    if case == "switched off":
        callback = DropCluster("conv1", log_pictures=False, **SETTINGS)
    elif case == "no images":
        logger = CSVLogger(tmp_path)
    elif case == "no matplotlib":
        monkeypatch.setattr(logged, "find_spec", lambda name: None)
    else:
        options = {"fast_dev_run": 2}
    assert fit(logger, callback=callback, **options).labels


def test_a_logger_without_its_package_gets_no_picture():
    class Broken:
        @property
        def experiment(self):
            raise ModuleNotFoundError("tensorboard")

    assert logged._sender(Broken()) is None


@pytest.mark.parametrize("value", [1, "yes", None])
def test_the_switch_is_a_bool(value):
    with pytest.raises(TypeError, match=r"log_pictures=.*: must be True or False"):
        DropCluster("conv1", log_pictures=value)
