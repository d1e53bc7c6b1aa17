import pytest
import torch

from lightning_dropcluster import memory
from lightning_dropcluster.layers.hooks import LayerHook
from lightning_dropcluster.learning.sketch import Sketch, SketchSettings
from lightning_dropcluster.learning.window import GatheringWindow

SHAPE = (2, 3, 4)
LAYER = torch.nn.Identity()


def make_x(samples=8, shape=SHAPE, seed=0):
    return torch.randn(samples, *shape, generator=torch.Generator().manual_seed(seed))


def make_window(*names, number=0, shapes=None, **options):
    settings = SketchSettings(**({"num_samples": 20, "sketch_dim": 16} | options))
    hooks = {name: LayerHook(name, LAYER, None) for name in names or ("stem",)}
    return GatheringWindow(hooks, settings, number, torch.device("cpu"), shapes)


def step(window, batches):
    """Do what a training step does: arm, then one call of each layer."""
    window.arm()
    for hook in window.hooks.values():
        hook.first_call = True
    for name, batch in batches.items():
        window.hooks[name](LAYER, (), batch)


def test_layers_get_a_sketch_once_their_shape_is_known():
    window = make_window("stem", "late")
    step(window, {"stem": make_x()})
    assert [hook.sketch for hook in window.hooks.values()] == [None, None]
    step(window, {"stem": make_x()})
    assert window.hooks["stem"].sketch.count == 8
    assert window.hooks["late"].sketch is None


def test_arming_again_keeps_what_was_gathered():
    window = make_window()
    for _ in range(3):
        step(window, {"stem": make_x()})
    assert window.hooks["stem"].sketch.count == 16


def test_is_full_when_the_slowest_layer_that_ran_in_the_step_saw_enough():
    window, full = make_window("stem", "late"), []
    for batch in ({"stem": make_x(), "late": make_x()}, {"stem": make_x()}, {"stem": make_x(4)}):
        step(window, batch)
        full.append(window.verdict())
    step(window, {"stem": make_x()})
    assert [*full, window.verdict()] == ["open", "open", "open", "full"]


def test_a_layer_that_folds_heads_into_the_batch_does_not_close_the_window_for_others():
    window, full = make_window("stem", "heads"), []
    for _ in range(4):
        step(window, {"stem": make_x(8), "heads": make_x(32)})
        full.append(window.verdict())
    assert full == ["open", "open", "open", "full"]
    assert {int(sketch.count) for sketch in window.close().values()} == {20}


def test_a_window_without_a_sketch_is_not_full():
    assert make_window().verdict() == "open"


def test_closing_takes_the_sketches_and_leaves_nothing_behind():
    window = make_window("stem", "late")
    for _ in range(2):
        step(window, {"stem": make_x()})
    sketches = window.close()
    assert [*sketches] == ["stem"]
    assert sketches["stem"].count == 8
    assert all(hook.sketch is None for hook in window.hooks.values())
    assert window.close() == {}


def test_sketches_are_made_with_the_settings_of_the_window():
    window = make_window(scope="channel", number=3, num_samples=7, sketch_dim=5, seed=11)
    for _ in range(2):
        step(window, {"stem": make_x()})
    expected = Sketch(SHAPE, scope="channel", num_samples=7, sketch_dim=5, seed=11, window=3)
    expected.update(make_x())
    made = window.merge()["stem"]
    assert torch.equal(made.profiles(), expected.profiles())
    assert made.count == 7


def test_a_batch_of_another_size_is_left_out():
    window = make_window()
    for samples, width in ((1, 4), (8, 4), (8, 6), (8, 4)):
        step(window, {"stem": make_x(samples, (2, 3, width))})
    assert window.merge()["stem"].count == 16


def test_the_first_batch_of_the_window_sets_its_size():
    window = make_window()
    step(window, {"stem": make_x(1, (2, 3, 6))})
    step(window, {"stem": make_x()})
    assert window.verdict() == "open"
    step(window, {"stem": make_x()})
    assert window.hooks["stem"].sketch.shape == SHAPE
    assert window.hooks["stem"].sketch.count == 8


def test_a_layer_that_never_ran_is_named_and_left_out():
    window = make_window("stem", "late")
    for _ in range(2):
        step(window, {"stem": make_x()})
    with pytest.warns(UserWarning, match="layer 'late' was not gathered"):
        assert [*window.merge()] == ["stem"]


def test_a_layer_that_did_not_run_in_this_window_keeps_its_labels():
    window = make_window("stem", "late")
    step(window, {"stem": make_x(), "late": make_x()})
    step(window, {"stem": make_x()})
    with pytest.warns(UserWarning, match="layer 'late' did not run while the window was open"):
        assert [*window.merge()] == ["stem"]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e19])
def test_a_layer_with_unusable_values_is_named_and_left_out(value):
    window, bad = make_window("stem", "late"), make_x()
    bad[3, 1, 1, 1] = value
    for _ in range(2):
        step(window, {"stem": make_x(), "late": bad})
    with pytest.warns(UserWarning, match="activations of layer 'late' were NaN, infinite or huge"):
        assert [*window.merge()] == ["stem"]


def test_values_beyond_the_last_sample_cannot_spoil_the_window():
    window, batch = make_window(num_samples=4), make_x()
    batch[6] = torch.nan
    for _ in range(2):
        step(window, {"stem": batch})
    assert [*window.merge()] == ["stem"]


def test_a_window_goes_on_from_its_state_to_the_last_bit():
    whole, saved, resumed = make_window(), make_window(), make_window()
    batches = [{"stem": make_x(seed=seed)} for seed in range(4)]
    for batch in batches:
        step(whole, batch)
    for batch in batches[:2]:
        step(saved, batch)
    resumed.load_state_dict(saved.state_dict())
    for batch in batches[2:]:
        step(resumed, batch)
    one, other = whole.merge()["stem"], resumed.merge()["stem"]
    assert torch.equal(one.profiles(), other.profiles())
    assert one.count == other.count == 20


def test_samples_that_a_state_holds_beyond_those_asked_for_now_stay_in():
    saved, resumed = make_window(), make_window(num_samples=10)
    for seed in range(4):
        step(saved, {"stem": make_x(seed=seed)})
    resumed.load_state_dict(saved.state_dict())
    step(resumed, {"stem": make_x(seed=9)})
    assert resumed.verdict() == "full"
    assert torch.equal(resumed.merge()["stem"].profiles(), saved.merge()["stem"].profiles())


def verdicts(window, *widths):
    """Do a step of 8 samples for each width, and return how the window stood after it."""
    for width in widths:
        step(window, {"stem": make_x(shape=(2, 3, width))})
        yield window.verdict()


def test_a_window_stalls_once_as_many_samples_of_one_other_size_have_passed():
    assert [*verdicts(make_window(), 4, 4, 6, 6, 6)] == ["open"] * 4 + ["stalled"]
    assert [*verdicts(make_window(), 4, 4, 6, 5, 6, 5, 6)] == ["open"] * 6 + ["stalled"]


def test_sizes_that_take_turns_fill_a_window():
    assert [*verdicts(make_window(), 4, *(4, 6, 6) * 3)] == ["open"] * 7 + ["full"] * 3


def test_a_window_is_scattered_where_sizes_hardly_come_twice():
    found = [*verdicts(make_window(), 4, *range(4, 15))]
    assert found == ["open"] * 11 + ["scattered"]  # after 4 x 20 samples of other sizes


def test_with_shapes_given_maps_of_all_sizes_fill_the_sketch():
    window = make_window(shapes={"stem": (2, 3, 9)})
    assert [*verdicts(window, 4, 5, 6, 7)] == ["open"] * 3 + ["full"]
    assert window.merge()["stem"].shape == (2, 3, 9)


def test_the_shapes_of_all_layers_are_those_of_their_last_calls():
    window = make_window("stem", "late")
    step(window, {"stem": make_x()})
    step(window, {"stem": make_x(shape=(2, 3, 6))})
    assert window.shapes_of_all() == {"stem": (2, 3, 6)}


def test_a_layer_that_has_enough_does_not_stall_the_others():
    window = make_window("stem", "heads")
    batches = [{"stem": make_x(4), "heads": make_x(32, (2, 3, width))} for width in (4, 4, 6, 6, 6, 6)]
    found = []
    for batch in batches:
        step(window, batch)
        found.append(window.verdict())
    assert found == ["open"] * 5 + ["full"]


def test_what_has_passed_goes_through_a_state():
    saved, resumed = make_window(), make_window()
    assert [*verdicts(saved, 4, 4, 6, 6)] == ["open"] * 4
    resumed.load_state_dict(saved.state_dict())
    assert [*verdicts(resumed, 6)] == ["stalled"]


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("x"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)
@pytest.mark.parametrize("method", ["__init__", "update"])
def test_a_layer_for_which_memory_does_not_suffice_is_told_and_holds_none(error, method, monkeypatch):
    window = make_window("stem", "late")
    step(window, {"stem": make_x(), "late": make_x()})
    monkeypatch.setattr(Sketch, method, lambda *args, **options: (_ for _ in ()).throw(error))
    step(window, {"stem": make_x(), "late": make_x()})
    assert window.verdict() == "failed"
    assert window.failed["stem"] is error
    assert error.__traceback__ is None
    assert window.hooks["stem"].sketch is None
    window.close()
    assert all(hook.sketch is hook.gather_error is None for hook in window.hooks.values())


def test_other_errors_of_a_sketch_pass(monkeypatch):
    window = make_window()
    step(window, {"stem": make_x()})
    monkeypatch.setattr(Sketch, "update", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        step(window, {"stem": make_x()})


def test_memory_that_is_not_there_is_not_asked_for(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1000.0)
    window = make_window()
    for _ in range(2):
        step(window, {"stem": make_x()})
    assert window.verdict() == "failed"
    assert str(window.failed["stem"]) == "1,000 bytes are free"


def test_its_state_is_tensors_and_plain_scalars(tmp_path):
    window = make_window()
    for _ in range(2):
        step(window, {"stem": make_x()})
    torch.save(window.state_dict(), tmp_path / "window.pt")
    state = torch.load(tmp_path / "window.pt", weights_only=True)
    assert state["stem"]["shape"] == [*SHAPE]
    assert state["stem"]["count"] == 8


def test_state_of_layers_that_are_gone_is_passed_over():
    saved, resumed = make_window("stem", "gone"), make_window("stem")
    for _ in range(2):
        step(saved, {"stem": make_x(), "gone": make_x()})
    resumed.load_state_dict(saved.state_dict())
    assert resumed.hooks["stem"].sketch.count == 8


def test_state_of_other_settings_is_named_and_starts_again():
    saved, resumed = make_window(), make_window(sketch_dim=8)
    for _ in range(2):
        step(saved, {"stem": make_x()})
    with pytest.warns(UserWarning, match="sketch of layer 'stem' was made with other settings"):
        resumed.load_state_dict(saved.state_dict())
    assert resumed.hooks["stem"].sketch is None


def test_merging_over_one_rank_changes_nothing():
    sketch = Sketch(SHAPE)
    sketch.update(make_x())
    before = {name: value.clone() for name, value in sketch.state_dict().items()}
    sketch.merge()
    assert all(torch.equal(value, before[name]) for name, value in sketch.state_dict().items())
