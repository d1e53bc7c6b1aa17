import io
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lightning_dropcluster.visualization import (
    cluster_colors,
    neighbor_colors,
    plot_clusters,
    plot_history,
    plot_overlay,
    plot_sizes,
    save_animation,
)
from lightning_dropcluster.visualization.sizes import cluster_sizes_of


def panels(figure):
    """The (H, W, 3) colours of every panel that shows a map."""
    return [np.asarray(axes.images[0].get_array()) for axes in figure.axes if axes.images]


def num_colors(pixels):
    return len(np.unique(pixels.reshape(-1, 3), axis=0))


def png(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


@given(st.integers(1, 1500))
def test_colors_are_distinct_in_8_bits(num_clusters):
    colors = cluster_colors(num_clusters)
    assert colors.shape == (num_clusters, 3)
    assert ((colors >= 0) & (colors <= 1)).all()
    assert len((colors * 255).round().unique(dim=0)) == num_clusters


@pytest.mark.parametrize("num_clusters", [4096, 12_544])
def test_colors_are_distinct_for_very_many_clusters(num_clusters):
    assert len((cluster_colors(num_clusters) * 255).round().unique(dim=0)) == num_clusters


@pytest.mark.parametrize(("num_clusters", "least"), [(8, 0.4), (64, 0.12), (200, 0.07)])
def test_colors_are_clearly_different(num_clusters, least):
    colors = cluster_colors(num_clusters)
    assert torch.nn.functional.pdist(colors).min() > least


def test_colors_stay_when_more_are_asked_for():
    assert torch.equal(cluster_colors(4096)[:20], cluster_colors(20))


def test_colors_are_the_callers_own():
    cluster_colors(3).zero_()
    assert cluster_colors(3).any()


@pytest.mark.parametrize("num_clusters", [0, -1, 2.0, True, "3"])
def test_colors_refuse_bad_counts(num_clusters):
    with pytest.raises((TypeError, ValueError), match=r"num_clusters=.*: must be an integer of at least 1"):
        cluster_colors(num_clusters)


@pytest.mark.parametrize("shape", [(3, 20), (3, 6, 7), (3, 4, 6, 7), (1, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_a_panel_has_as_many_colors_as_clusters(shape, dtype):
    labels = torch.randint(0, 6, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    shown = labels if labels.ndim < 4 else labels[:, labels.shape[1] // 2]
    figure = plot_clusters(labels)
    assert [num_colors(pixels) for pixels in panels(figure)] == [len(one.unique()) for one in shown]
    assert png(figure).startswith(b"\x89PNG")


@pytest.mark.parametrize("num_clusters", [1, 64, 200, 1024])
def test_every_cluster_of_a_map_is_seen(num_clusters):
    labels = torch.arange(1024).reshape(1, 32, 32) % num_clusters
    assert num_colors(panels(plot_clusters(labels))[0]) == num_clusters


def test_one_label_has_one_color_in_all_maps():
    labels = torch.tensor([[[0, 70], [900, 70]], [[900, 0], [70, 70]]])
    first, second = panels(plot_clusters(labels))
    assert (first[0, 0] == second[0, 1]).all()
    assert (first[0, 1] == second[1, 0]).all()
    assert (first[1, 0] == second[0, 0]).all()


def test_strips_and_slices_keep_their_layout():
    strip = torch.tensor([[0, 0, 1]])
    assert panels(plot_clusters(strip))[0].shape == (1, 3, 3)
    volume = torch.stack([torch.full((5, 6), depth) for depth in range(3)])[None]
    assert num_colors(panels(plot_clusters(volume))[0]) == 1


def test_borders_run_between_clusters_and_nowhere_else():
    def borders(labels):
        collections = plot_clusters(labels).axes[0].collections
        return sum(len(lines.get_segments()) for lines in collections)

    assert borders(torch.zeros(1, 4, 4, dtype=torch.long)) == 0
    assert borders(torch.tensor([[[0, 0, 1], [0, 0, 1]]])) == 2
    assert borders(torch.arange(129 * 2).reshape(1, 129, 2)) == 0


def test_titles_say_what_is_shown():
    labels = torch.zeros(5, 3, 4, dtype=torch.long)
    labels[0, 0, 0] = 7
    figure = plot_clusters(labels, title="model.conv1", max_maps=2)
    assert [axes.get_title() for axes in figure.axes] == ["map 0 · 2 clusters", "map 1 · 1 cluster"]
    assert figure.get_suptitle() == (
        "model.conv1\n5 feature maps of 3 × 4 (first 2 shown), 1 to 2 clusters in each"
    )
    assert plot_clusters(labels[1:2]).get_suptitle() == "1 feature map of 3 × 4, 1 cluster in each"
    assert "slice 1 shown" in plot_clusters(labels[:, None].repeat(1, 2, 1, 1)).get_suptitle()


@pytest.mark.parametrize(("columns", "layout"), [(None, (3, 3)), (4, (2, 4)), (100, (1, 7))])
def test_columns_set_the_layout(columns, layout):
    figure = plot_clusters(torch.arange(28).view(7, 2, 2), columns=columns)
    grid = figure.axes[0].get_gridspec()
    assert (grid.nrows, grid.ncols) == layout
    assert len(panels(figure)) == 7
    assert not any(axes.axison for axes in figure.axes if not axes.images)


def test_the_maps_that_are_shown_make_the_layout():
    grid = plot_clusters(torch.arange(256).view(64, 2, 2), max_maps=9).axes[0].get_gridspec()
    assert (grid.nrows, grid.ncols) == (3, 3)


def test_maps_that_are_alike_are_drawn_once():
    labels = patches(1, 8, 5).expand(3, -1, -1)
    figure = plot_clusters(labels)
    assert [axes.get_title() for axes in figure.axes] == ["all maps · 5 clusters"]
    assert figure.get_suptitle() == "3 feature maps of 8 × 8, all alike, 5 clusters in each"
    overlay = plot_overlay(labels, torch.randn(8, 8))
    assert [axes.get_title() for axes in overlay.axes] == ["input", "all maps · 5 clusters"]


def test_labels_are_left_alone_and_pyplot_unused():
    labels = torch.randint(0, 5, (2, 4, 4), dtype=torch.int16)
    before = labels.clone()
    plot_clusters(labels)
    assert torch.equal(labels, before)
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        ([[0, 1]], TypeError, r"labels: must be an integer tensor, not \[\[0, 1\]\]"),
        (torch.zeros(2, 3, 3), TypeError, r"must be an integer tensor, not a torch\.float32 tensor"),
        (torch.zeros(2, 3).to(torch.uint16), TypeError, r"must be an integer tensor, not a torch\.uint16"),
        (torch.zeros(2, 3).bool(), TypeError, r"labels: must be an integer tensor, not a torch\.bool"),
        (torch.zeros(3).long(), ValueError, r"labels of shape \(3,\): must be \(C, \*spatial\)"),
        (torch.zeros(1, 1, 1, 1, 1).long(), ValueError, r"labels of shape \(1, 1, 1, 1, 1\): must be"),
        (torch.zeros(0, 3, 3).long(), ValueError, r"labels of shape \(0, 3, 3\): must be"),
    ],
)
def test_bad_labels(labels, error, message):
    with pytest.raises(error, match=message):
        plot_clusters(labels)


FLAT = torch.zeros(2, 4, 4, dtype=torch.long)


@pytest.mark.parametrize(
    ("draw", "error", "message"),
    [
        (lambda: plot_clusters(FLAT, previous=[1]), TypeError, r"previous: must be an integer tensor"),
        (
            lambda: plot_clusters(FLAT, previous=FLAT - 1),
            ValueError,
            r"previous from -1 to -1: must be in",
        ),
        (lambda: plot_clusters(FLAT + 2**40), ValueError, r"labels from 1099511627776 to .*: must be in \[0"),
        (lambda: plot_clusters(FLAT, colors=[[0, 0, 0]]), TypeError, r"colors: must be a tensor, not list"),
        (lambda: plot_clusters(FLAT, colors=torch.full((1, 3), 2.0)), ValueError, r"colors: .* in \[0, 1\]"),
        (lambda: plot_history([FLAT, FLAT.float()]), TypeError, r"history\[1\]: must be an integer tensor"),
        (lambda: plot_history([FLAT], epochs=3), TypeError, r"epochs: must be a list .* not int"),
        (lambda: plot_overlay(FLAT, torch.zeros(3, 0, 8)), ValueError, r"image of shape \(3, 0, 8\)"),
        (lambda: plot_overlay(FLAT, torch.full((8, 8), torch.nan)), ValueError, r"image: must be finite"),
        (lambda: plot_overlay(FLAT, torch.zeros(8, 8).cfloat()), TypeError, r"image: .* real numbers"),
        (lambda: save_animation("clusters.mp4", [FLAT]), ValueError, r"path='clusters.mp4': must end in"),
    ],
)
def test_what_cannot_be_drawn_names_the_argument(draw, error, message):
    with pytest.raises(error, match=f"^{message}"):
        draw()


@pytest.mark.parametrize("name", ["max_maps", "columns"])
@pytest.mark.parametrize("value", [0, -3, 1.5, "2", True])
def test_bad_counts(name, value):
    with pytest.raises((TypeError, ValueError), match=rf"{name}=.*: must be an integer of at least 1"):
        plot_clusters(torch.zeros(1, 2, 2, dtype=torch.long), **{name: value})


@pytest.mark.parametrize("value", [0, 1.5])
def test_bad_counts_of_maps_in_animations(value, tmp_path):
    with pytest.raises((TypeError, ValueError), match=r"max_maps=.*: must be an integer of at least 1"):
        save_animation(tmp_path / "x.gif", [torch.zeros(1, 2, 2, dtype=torch.long)], max_maps=value)


def test_missing_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install '.\[plot\]' in the clone"):
        plot_clusters(torch.zeros(1, 2, 2, dtype=torch.long))


def patches(num_maps, side, num_clusters, seed=0, moved=0.0):
    """Labels of connected clusters: each cell belongs to the nearest of some random points."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(num_maps, num_clusters, 2, generator=generator) * side
    points += moved * torch.randn(points.shape, generator=generator)
    grid = torch.cartesian_prod(torch.arange(side), torch.arange(side)).float()
    return torch.cdist(grid.expand(num_maps, -1, -1), points).argmin(2).reshape(num_maps, side, side)


def beside(labels):
    """Pairs of clusters that touch."""
    pairs = [
        torch.stack([one.flatten(), other.flatten()])
        for one, other in ((labels[:, 1:], labels[:, :-1]), (labels[:, :, 1:], labels[:, :, :-1]))
    ]
    pairs = torch.cat(pairs, 1).unique(dim=1)
    return pairs[:, pairs[0] != pairs[1]]


@pytest.mark.parametrize("num_clusters", [6, 64, 196])
def test_clusters_side_by_side_differ_more_than_by_chance(num_clusters):
    labels = patches(1, 32, num_clusters)
    first, second = beside(labels)
    colors = neighbor_colors(labels)

    def nearest(colors):
        return (colors[first] - colors[second]).norm(dim=1).min()

    assert len((colors * 255).round().unique(dim=0)) == num_clusters
    assert nearest(colors) > 0.3
    by_chance = [nearest(colors[torch.randperm(num_clusters)]) for _ in range(5)]
    assert nearest(colors) > max(by_chance) or num_clusters < 10


def test_titles_tell_epoch_and_agreement():
    labels = patches(2, 8, 4)
    text = plot_clusters(labels, title="conv1", epoch=3, previous=labels).get_suptitle()
    assert text.splitlines()[0] == "conv1 · epoch 3"
    assert text.splitlines()[2] == "agreement with the clusters before: 1.00"
    other = plot_clusters(labels, previous=patches(2, 8, 4, seed=1)).get_suptitle()
    assert "agreement with the clusters before: 1.00" not in other


def test_given_colors_are_used():
    colors = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]])
    labels = torch.tensor([[[0, 2]]])
    assert panels(plot_clusters(labels, colors=colors))[0].tolist() == [[[1, 0, 0], [0, 0, 1]]]
    with pytest.raises(ValueError, match=r"colors of shape \(2, 3\): must be \(K, 3\), K at least 3"):
        plot_clusters(labels, colors=colors[:2])


def test_a_filmstrip_keeps_the_colors_of_clusters():
    history = [patches(5, 12, 7, moved=moved) for moved in (0.0, 0.5, 1.0)]
    figure = plot_history(history, epochs=[0, 5, 10], title="conv1", max_maps=2)
    pixels = panels(figure)
    assert len(pixels) == 6
    shown = [labels[row] for row in range(2) for labels in history]
    assert [num_colors(one) for one in pixels] == [len(labels.unique()) for labels in shown]
    colors = {
        (int(label), tuple(color))
        for labels, one in zip(shown, pixels, strict=True)
        for label, color in zip(labels.flatten(), one.reshape(-1, 3).tolist(), strict=True)
    }
    assert len(colors) == 7
    heads = [axes.get_title() for axes in figure.axes[:3]]
    assert heads[0] == "epoch 0"
    assert heads[1].startswith("epoch 5\nagreement 0.")


def test_of_many_moments_the_first_and_last_are_drawn():
    history = [torch.full((1, 2, 2), moment) for moment in range(20)]
    figure = plot_history(history, max_moments=3)
    assert [axes.get_title().splitlines()[0] for axes in figure.axes] == [
        "clustering 1",
        "clustering 11",
        "clustering 20",
    ]


def test_an_animation_has_a_frame_per_moment(tmp_path, monkeypatch):
    history = [patches(2, 8, 4, moved=moved) for moved in (0.0, 2.0, 4.0)]
    titles = []

    def spy(*args, **kwargs):
        figure = plot_clusters(*args, **kwargs)
        titles.append(figure.get_suptitle())
        return figure

    monkeypatch.setattr("lightning_dropcluster.visualization.history.plot_clusters", spy)
    save_animation(tmp_path / "a.gif", history, epochs=[1, 2, 3], seconds=0.1)
    assert ["agreement" in title for title in titles] == [False, True, True]
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 3
        gif.seek(2)
        assert gif.info["duration"] == 300


@pytest.mark.parametrize("shape", [(3, 20, 30), (1, 20, 30), (20, 30)])
def test_an_overlay_shows_the_image_and_every_cluster(shape):
    labels = patches(3, 8, 5)
    axes = plot_overlay(labels, torch.randn(shape), title="conv1", max_maps=2).axes
    assert [a.get_title() for a in axes] == ["input", "map 0 · 5 clusters", "map 1 · 5 clusters"]
    assert [len(a.images) for a in axes] == [1, 2, 2]
    assert axes[0].images[0].get_array().shape == (20, 30, 3)
    assert [num_colors(np.asarray(a.images[1].get_array())) for a in axes[1:]] == [5, 5]
    assert axes[1].images[0].get_extent() == axes[1].images[1].get_extent()


@pytest.mark.parametrize(
    ("scope", "counts"),
    [("map", [2, 2, 2, 2]), ("layer", [4, 4]), ("position", [2, 2]), ("channel", [1, 1])],
)
def test_sizes_count_what_was_grouped(scope, counts):
    labels = torch.tensor([[[0, 0, 1, 1]], [[0, 0, 1, 1]]])
    if scope == "channel":
        labels = torch.tensor([[[0, 0, 0, 0]], [[1, 1, 1, 1]]])
    assert cluster_sizes_of(labels, scope).tolist() == counts


def test_the_histogram_holds_every_cluster():
    labels = patches(6, 16, 9)
    (axes,) = plot_sizes(labels, title="conv1").axes
    assert sum(bar.get_height() for bar in axes.patches) == 54
    assert axes.get_title().startswith("conv1\n54 clusters · sizes ")


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: plot_history([]), "history: must hold the labels of at least one moment"),
        (lambda: plot_history([patches(1, 4, 2), patches(1, 5, 2)]), "labels have different shapes"),
        (lambda: plot_history([patches(1, 4, 2)], epochs=[1, 2]), "epochs: 2 of them for 1 moments"),
        (lambda: plot_history([patches(1, 4, 2)], max_moments=1), "max_moments=1: must be"),
        (lambda: plot_overlay(patches(1, 4, 2), torch.rand(2, 4, 4)), r"image of shape \(2, 4, 4\): must be"),
        (lambda: plot_overlay(torch.zeros(2, 3).long(), torch.rand(4, 4)), "only 2-d maps"),
        (lambda: plot_overlay(patches(1, 4, 2), torch.rand(4, 4), alpha=2), "alpha=2: must be"),
        (
            lambda: plot_overlay(patches(1, 4, 2), torch.rand(4, 4), colors=torch.rand(1, 3)),
            r"colors of shape \(1, 3\): must be",
        ),
        (lambda: plot_sizes(patches(1, 4, 2), scope="maps"), "scope='maps': must be one of"),
        (lambda: plot_clusters(patches(1, 4, 2), scope="maps"), "scope='maps': must be one of"),
    ],
)
def test_bad_arguments(act, message):
    with pytest.raises(ValueError, match=message):
        act()
