"""Warnings and errors that tell a user what to do: each advises what helps where it is given."""

import copy
import warnings

import pytest
import torch
from fits import Classifier, make_trainer
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from lightning_dropcluster import DropCluster, StructuredDropout


class WithTeacher(Classifier):
    """Runs a second model beside the one that trains."""

    def __init__(self, *, train: bool, frozen: bool) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.model).requires_grad_(not frozen).train(train)

    def on_train_epoch_start(self) -> None:
        self.teacher.eval()

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            self.teacher(batch[0])
        return super().training_step(batch, batch_idx)


class WithAverage(Classifier):
    """Keeps an average of the weights that no training step runs."""

    def __init__(self) -> None:
        super().__init__()
        self.average = copy.deepcopy(self.model)


def told(module: nn.Module, loader, callback, **options) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(callback, **({"max_epochs": 1} | options)).fit(module, loader)
    return "\n".join(str(w.message) for w in caught if type(callback).__name__ in str(w.message))


@pytest.mark.parametrize("pattern", ["*.conv1", "*.act1"])
@pytest.mark.parametrize("frozen", [True, False])
def test_a_teacher_is_to_be_left_out_and_not_to_be_trained(loader, pattern, frozen):
    options = {"start": 0.0, "num_samples": 16, "layer_types": (nn.Conv2d, nn.ReLU)}
    text = told(WithTeacher(train=False, frozen=frozen), loader, DropCluster(pattern, **options))
    assert "teacher." in text
    assert ".train()" in text if not frozen else ".train()" not in text
    assert "leave them out" in text
    assert "ranks" not in text


def test_an_average_of_the_weights_is_to_be_left_out(loader):
    with pytest.raises(
        RuntimeError, match=r"'average.conv1' did not run .* such as an average of the weights"
    ):
        make_trainer(StructuredDropout("*.conv1", nn.Dropout2d())).fit(WithAverage(), loader)


def test_a_stage_that_a_feature_extractor_takes_apart_is_explained(loader):
    class Extracting(Classifier):
        def training_step(self, batch, batch_idx):
            return self.features(batch[0])["layer1"].mean()

        def on_fit_start(self):
            self.features = create_feature_extractor(self.model, ["layer1"])

    options = {"layer_types": nn.Module}
    with pytest.raises(RuntimeError, match=r"did not run .* trace with torch\.fx"):
        make_trainer(StructuredDropout("model.layer1", nn.Dropout2d(), **options)).fit(Extracting(), loader)


@pytest.mark.parametrize("make", [DropCluster, lambda name: StructuredDropout(name, nn.Dropout2d())])
def test_backward_hooks_of_a_picked_layer_are_told_of(loader, make):
    module = Classifier()
    module.model.conv1.register_full_backward_hook(lambda *_: None)
    text = told(module, loader, make("conv1"))
    assert "layers model.conv1 have backward hooks" in text
    assert "layer_types=torch.nn.ReLU" in text
    assert "backward hooks" not in told(module, loader, make("layer1.*.conv1"))


def test_gradients_behind_an_activation_are_those_of_the_layer(loader):
    """What the advice of the warning is worth: per-sample gradients from a backward hook are right there."""
    conv, act = nn.Conv2d(3, 4, 3), nn.ReLU()
    grads: list[torch.Tensor] = []
    conv.register_full_backward_hook(lambda module, before, after: grads.append(after[0]))

    class Hooked(Classifier):
        def __init__(self):
            super().__init__(nn.Sequential(conv, act, nn.AdaptiveAvgPool2d(1), nn.Flatten()))

        def on_after_backward(self):
            by_hand = grads.pop().sum((0, 2, 3))
            torch.testing.assert_close(by_hand, conv.bias.grad, rtol=1e-3, atol=1e-4)

    callback = StructuredDropout("1", nn.Dropout2d(), layer_types=nn.ReLU)
    assert told(Hooked(), loader, callback) == ""
