"""The table that the command line prints of a model's layers."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from lightning_dropcluster.inspection.preview import HEADINGS, LayerPreview, Preview, misread_warning

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_SHORTEST_GAP = 3  # a shorter run of layers that are not picked is shown rather than counted
_PIPE_WIDTH = 160


def print_layers(
    model: str,
    input_size: str,
    found: Preview,
    picked: Collection[str] | None,
    *,
    scope: str,
    channel_dim: int,
    show_all: bool,
) -> None:
    """Print a model's conv layers, what is picked, and patterns to copy."""
    screen = console()
    chosen = found
    if picked is not None:
        chosen = Preview(tuple(layer for layer in found.layers if layer.name in picked), {})
    screen.print(
        _table(f"{model} at {input_size}", found, chosen, marked=picked is not None, show_all=show_all)
    )
    for note in _notes(chosen, scope, channel_dim):
        screen.print(note, style="yellow")
    if found.patterns or found.last_patterns:
        screen.print("\nPatterns to copy:" if picked is None else "\nOther choices:", style="bold")
    for title, text in _suggestions(found):
        screen.print(f"  {title}", style="dim")
        screen.print(f"    {text}", markup=False, soft_wrap=True)


def _suggestions(found: Preview) -> Iterator[tuple[str, str]]:
    """Yield titles and arguments to copy."""
    if found.stages:
        yield "outputs of all stages but the last; DropCluster() takes them", _stages(found)
    for title, patterns in found.patterns.items():
        yield title, _argument(patterns)
    for title, patterns in found.last_patterns.items():
        yield title, _argument(patterns, -1)


def _stages(found: Preview) -> str:
    """Write the stages; where some have their channels first and others last, they need no argument."""
    if len(set(found.stage_dims)) > 1:
        return ", ".join(found.stages)
    return _argument(found.stages, found.stage_dims[0])


def _argument(patterns: Sequence[str], channel_dim: int = 1) -> str:
    listed = ", ".join(f'"{pattern}"' for pattern in patterns)
    listed = listed if len(patterns) == 1 else f"[{listed}]"
    return f"layers={listed}" + ", channel_dim=-1" * (channel_dim == -1)


def console() -> Console:
    """Make a console that does not fold the names that a pipe is to find."""
    from rich.console import Console

    is_wide = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(highlight=False, width=_PIPE_WIDTH if is_wide else None)


def _table(title: str, found: Preview, chosen: Preview, *, marked: bool, show_all: bool) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(
        title=title, title_justify="left", title_style="bold", show_footer=True, box=box.SIMPLE_HEAD
    )
    table.pad_edge, table.padding = False, (0, 1, 0, 0)
    if marked:
        table.add_column("")
    for position, (heading, footer) in enumerate(zip(HEADINGS, chosen.total(), strict=True)):
        justify = "left" if position < 3 else "right"
        table.add_column(heading, footer, justify=justify, overflow="fold")
    names = {layer.name for layer in chosen.layers}
    for is_picked, run in groupby(found.layers, key=lambda layer: layer.name in names):
        for row in _rows(list(run), is_picked=is_picked, show_all=show_all):
            mark = ("●" if is_picked else "",) if marked else ()
            table.add_row(*mark, *row, style=None if is_picked else "dim")
    return table


def _rows(run: list[LayerPreview], *, is_picked: bool, show_all: bool) -> Iterator[tuple[str, ...]]:
    """Write a run of neighbouring layers that are all picked, or all not; of the latter no clusters."""
    if not is_picked and not show_all and len(run) > _SHORTEST_GAP:
        yield (f"… {len(run)} more", "", "", "", "", "")
        return
    for layer in run:
        yield layer.cells() if is_picked else (*layer.cells()[:4], "", "")


def _notes(chosen: Preview, scope: str, channel_dim: int) -> Iterator[str]:
    misread = [layer.name for layer in chosen.layers if layer.is_misread]
    if warning := misread_warning(misread, channel_dim):
        yield f"{warning}."
    # As in a fit, a map of one feature is nothing to cluster, and no news.
    whole = [layer for layer in chosen.layers if layer.num_clusters == 1 < layer.features // layer.problems]
    if whole and scope == "map":
        noun = "layers" if len(whole) > 1 else "layer"
        yield (
            f"In {len(whole)} {noun} each map is one cluster, so whole maps are dropped: lower cluster_size, "
            "use scope='channel', or leave them out."
        )
