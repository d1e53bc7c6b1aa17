"""Running averages that follow clean steps alone, step by step and without a Trainer."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import BatchNormAct2d, EvoNorm2dB0, FrozenBatchNormAct2d, SyncBatchNormAct
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import FrozenBatchNorm2d

from lightning_dropcluster.layers.norm_statistics import CLEAN_EVERY, NormStatistics, is_clean_step

NORMS = {
    "BatchNorm2d": nn.BatchNorm2d,
    "no affine": lambda n: nn.BatchNorm2d(n, affine=False),
    "cumulative": lambda n: nn.BatchNorm2d(n, momentum=None),
    "slow": lambda n: nn.BatchNorm2d(n, momentum=0.01),
    "BatchNormAct2d": BatchNormAct2d,
    "SyncBatchNorm": nn.SyncBatchNorm,  # which needs a GPU where there are ranks
    "SyncBatchNormAct": SyncBatchNormAct,
    "InstanceNorm2d": lambda n: nn.InstanceNorm2d(n, track_running_stats=True),
    "EvoNorm2dB0": EvoNorm2dB0,
}


def step(statistics: NormStatistics, norm: nn.Module, x: torch.Tensor, drops: bool, calls: int = 1) -> None:
    statistics.begin_step(drops)
    statistics.begin_pass()
    for _ in range(calls):
        norm(2 * x if drops else x)
    statistics.end_pass()
    statistics.end_step()


def averages(norm: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in norm.named_buffers()}


@given(st.integers(0, 10**6))
def test_one_step_in_each_block_is_clean(block):
    batches = range(block * CLEAN_EVERY, (block + 1) * CLEAN_EVERY)
    assert sum(map(is_clean_step, batches)) == 1


def test_the_first_step_is_clean_and_places_change():
    places = {batch % CLEAN_EVERY for batch in range(64 * CLEAN_EVERY) if is_clean_step(batch)}
    assert is_clean_step(0)
    assert len(places) == CLEAN_EVERY


@pytest.mark.parametrize(("total", "last"), [(1000, 20), (100, 10), (9, 0)])
def test_the_last_steps_are_clean(total, last):
    clean = [is_clean_step(batch, total - batch) for batch in range(total)]
    assert all(clean[total - last :])
    assert sum(clean[: total - last]) < total / 6 + 1


@pytest.mark.parametrize("name", NORMS)
def test_a_step_that_drops_leaves_no_trace(name):
    norm, x = NORMS[name](3), torch.randn(8, 3, 4, 4)
    statistics = NormStatistics()
    statistics.attach(norm)
    assert statistics.are_moving()
    before = averages(norm)
    step(statistics, norm, x, drops=True)
    assert all(torch.equal(value, before[key]) for key, value in averages(norm).items())


@pytest.mark.parametrize("name", NORMS)
def test_without_dropping_nothing_is_changed(name):
    x, plain, watched = torch.randn(5, 8, 3, 4, 4), NORMS[name](3), NORMS[name](3)
    statistics = NormStatistics()
    statistics.attach(watched)
    for batch in x:
        plain(batch)
        step(statistics, watched, batch, drops=False)
    assert all(torch.equal(value, averages(plain)[key]) for key, value in averages(watched).items())


@pytest.mark.parametrize("calls", [1, 2])
def test_averages_never_overshoot(calls):
    """A layer that runs twice in a step, as under activation checkpointing, stays between old and new."""
    norm, x = nn.BatchNorm2d(3), 0.01 * torch.randn(8, 3, 4, 4) + 5
    statistics = NormStatistics()
    statistics.attach(norm)
    for index in range(100):
        step(statistics, norm, x, drops=index % 8 != 3, calls=calls)
        assert (norm.running_var > 0).all()
        assert (norm.running_mean <= x.mean((0, 2, 3)) + 1e-4).all()
    torch.testing.assert_close(norm.running_mean, x.mean((0, 2, 3)), atol=0.01, rtol=0)


def test_frozen_averages_stay():
    norm = nn.BatchNorm2d(3).eval()
    statistics = NormStatistics()
    statistics.attach(norm)
    before = averages(norm)
    for index in range(10):
        step(statistics, norm, torch.randn(8, 3, 4, 4), drops=index % 2 == 0)
    assert all(torch.equal(value, before[key]) for key, value in averages(norm).items())


@pytest.mark.parametrize("name", ["InstanceNorm2d", "EvoNorm2dB0"])
def test_averages_without_a_count_are_as_fast_as_those_with_one(name):
    x, norms = 5 * torch.randn(64, 3, 8, 8), [NORMS["BatchNorm2d"](3), NORMS[name](3)]
    for norm in norms:
        statistics = NormStatistics()
        statistics.attach(norm)
        for index in range(25):
            step(statistics, norm, x, drops=index % 8 != 0)
    counted, uncounted = (norm.running_var.mean().item() for norm in norms)
    assert uncounted == pytest.approx(counted, rel=0.1)


def test_what_is_loaded_between_two_steps_stays():
    norm, statistics = nn.BatchNorm2d(3), NormStatistics()
    statistics.attach(norm)
    statistics.begin_step(True)
    norm.running_var.fill_(7.0)  # by another callback, before the training step
    statistics.begin_pass()
    norm(torch.randn(8, 3, 4, 4))
    statistics.end_pass()
    assert (norm.running_var == 7.0).all()


def test_steps_in_which_no_average_moves_count_for_nothing():
    norm, statistics = nn.BatchNorm2d(3).eval(), NormStatistics()
    statistics.attach(norm)
    step(statistics, norm, torch.randn(8, 3, 4, 4), drops=True)
    assert statistics.left_out == 0


def test_layers_that_run_after_a_backward_within_the_step_catch_up_too():
    first, second, statistics = nn.BatchNorm2d(3), nn.BatchNorm2d(3), NormStatistics()
    statistics.attach(nn.ModuleList([first, second]))
    x = torch.randn(8, 3, 4, 4)
    for drops in (True, True, False):
        statistics.begin_step(drops)
        statistics.begin_pass()
        first(x)
        statistics.begin_pass()
        statistics.end_pass()  # as manual_backward
        second(x)
        statistics.end_pass()
        statistics.end_step()
    assert torch.equal(first.running_mean, second.running_mean)


def test_a_graph_that_runs_backward_twice_is_left_alone():
    norm, statistics = nn.BatchNorm2d(3), NormStatistics()
    statistics.attach(norm)
    statistics.begin_step(True)
    statistics.begin_pass()
    loss = norm(torch.randn(8, 3, 4, 4)).square().sum()
    loss.backward(retain_graph=True)
    statistics.end_pass()
    loss.backward()
    statistics.end_pass()


def test_a_copy_that_follows_the_model_is_left_alone():
    model = nn.ModuleList([nn.BatchNorm2d(3), nn.BatchNorm2d(3).eval()])
    statistics = NormStatistics()
    statistics.attach(model)
    statistics.begin_step(True)
    statistics.begin_pass()
    model[1].running_var.fill_(7.0)
    statistics.end_pass()
    assert (model[1].running_var == 7.0).all()


def test_buffers_of_other_names_are_left_alone():
    model = nn.BatchNorm2d(3)
    model.register_buffer("running_steps", torch.zeros(()))
    statistics = NormStatistics()
    statistics.attach(model)
    statistics.begin_step(True)
    statistics.begin_pass()
    model.running_steps += 1
    statistics.end_pass()
    assert model.running_steps == 1


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_another_default_type(default):
    norm, statistics = nn.BatchNorm2d(3), NormStatistics()
    statistics.attach(norm)
    torch.set_default_dtype(default)
    try:
        for drops in (True, False):
            step(statistics, norm, torch.randn(8, 3, 4, 4, dtype=torch.float32), drops)
    finally:
        torch.set_default_dtype(torch.float32)
    assert norm.running_var.isfinite().all()


def test_averages_in_float64_keep_their_digits():
    norm, statistics = nn.BatchNorm2d(1).double(), NormStatistics()
    statistics.attach(norm)
    norm.running_mean.fill_(1e9 + 1)
    for drops in (True, False):
        step(statistics, norm, torch.full((2, 1, 1, 2), 1e9 + 1, dtype=torch.float64), drops)
    assert norm.running_mean.item() == pytest.approx(1e9 + 1, abs=0.01)


def test_a_model_without_averages_needs_nothing():
    statistics = NormStatistics()
    statistics.attach(nn.Sequential(nn.LayerNorm(3), nn.GroupNorm(1, 3), nn.InstanceNorm2d(3)))
    assert not statistics.are_moving()


def test_an_unfinished_step_leaves_no_trace():
    norm, statistics = nn.BatchNorm2d(3), NormStatistics()
    statistics.attach(norm)
    before = averages(norm)
    statistics.begin_step(True)
    statistics.begin_pass()
    norm(torch.randn(8, 3, 4, 4))
    statistics.cancel_step()
    statistics.end_step()
    assert all(torch.equal(value, before[key]) for key, value in averages(norm).items())
    assert statistics.left_out == 0


def test_one_callback_that_drops_is_enough():
    norm, statistics = nn.BatchNorm2d(3), NormStatistics()
    statistics.attach(norm)
    before = averages(norm)
    for drops in (False, True, False):
        statistics.begin_step(drops)
    statistics.begin_pass()
    norm(torch.randn(8, 3, 4, 4))
    statistics.end_pass()
    statistics.end_step()
    statistics.end_step()
    assert torch.equal(norm.running_var, before["running_var"])
    assert statistics.left_out == 1


def test_buffers_that_are_replaced_are_followed():
    """Moving a model to another type gives its layers new buffers."""
    norm, statistics = nn.BatchNorm2d(3), NormStatistics()
    statistics.attach(norm)
    step(statistics, norm, torch.randn(8, 3, 4, 4), drops=True)
    norm.double()
    step(statistics, norm, torch.randn(8, 3, 4, 4).double(), drops=True)
    assert torch.equal(norm.running_var, torch.ones(3).double())


def test_a_count_under_another_name_goes_with_its_averages():
    """Of a normaliser that weighs all of the past alike."""

    class Welford(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("running_mean", torch.zeros(3))
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            self.count += 1
            self.running_mean += (x.mean((0, 2, 3)) - self.running_mean) / self.count

    norm, statistics = Welford(), NormStatistics()
    statistics.attach(norm)
    x = torch.randn(8, 3, 4, 4) + 5
    for index in range(16):
        step(statistics, norm, x, drops=index % 8 != 0)
    assert norm.count == 2
    torch.testing.assert_close(norm.running_mean, x.mean((0, 2, 3)))


@pytest.mark.parametrize("make", [FrozenBatchNormAct2d, FrozenBatchNorm2d])
def test_frozen_layers_have_no_averages_to_keep(make):
    statistics = NormStatistics()
    statistics.attach(make(3))
    assert not statistics.are_moving()


def test_a_layer_that_gets_its_size_in_a_step_is_taken_from_the_next_on():
    norm, statistics = nn.LazyBatchNorm2d(), NormStatistics()
    statistics.attach(norm)
    for drops in (True, False):
        step(statistics, norm, torch.randn(8, 3, 4, 4), drops=drops)
    before = averages(norm)
    step(statistics, norm, torch.randn(8, 3, 4, 4), drops=True)
    assert all(torch.equal(value, before[key]) for key, value in averages(norm).items())


class Work(TorchDispatchMode):
    """Counts operations that write something, each a launch or more on a GPU."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("drops", [False, True])
def test_many_layers_take_as_few_operations_as_one(drops):
    counts = []
    for layers in (1, 20):
        norms, statistics = nn.Sequential(*(nn.BatchNorm2d(3) for _ in range(layers))), NormStatistics()
        statistics.attach(norms)
        step(statistics, norms, torch.randn(8, 3, 4, 4), drops=True)
        statistics.begin_step(drops)
        statistics.begin_pass()
        norms(torch.randn(8, 3, 4, 4))
        with Work() as work:
            statistics.end_pass()
        counts.append(work.count)
    assert counts[0] == counts[1] < 30
