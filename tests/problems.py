"""Activations, labels and keep tables, small and of every kind."""

import pytest
import torch
from hypothesis import strategies as st

SCOPES = ("map", "position", "layer", "channel")
SPATIAL = ((5,), (3, 4), (2, 3, 2))
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

in_each_memory_format = pytest.mark.parametrize(
    ("spatial", "layout"),
    [((5,), torch.contiguous_format), ((3, 4), torch.channels_last), ((2, 3, 2), torch.channels_last_3d)],
    ids=["1d", "channels_last", "channels_last_3d"],
)


def label_shape(scope, channels, spatial):
    return {
        "map": (channels, *spatial),
        "position": (1, *spatial),
        "layer": (channels, *spatial),
        "channel": (channels, *(1 for _ in spatial)),
    }[scope]


def make_problem(scope="map", samples=3, channels=4, spatial=(3, 4), clusters=3, drawn=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, channels, *spatial, generator=generator)
    labels = torch.randint(clusters, label_shape(scope, channels, spatial), generator=generator)
    groups = channels if scope == "map" else 1
    keep = torch.rand(drawn or samples, groups, clusters, generator=generator) > 0.4
    return x, labels, keep


@st.composite
def problems(draw):
    samples = draw(st.integers(1, 3))
    return make_problem(
        draw(st.sampled_from(SCOPES)),
        samples,
        draw(st.integers(1, 3)),
        tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))),
        draw(st.integers(1, 5)),
        drawn=draw(st.sampled_from((1, samples))),
        seed=draw(st.integers(0, 99)),
    )
