"""The command line: what the callback would work on in a timm model, and what it learned.

Each command imports what it needs when it runs: torch alone takes seconds, which ``--help`` does without.
"""

from __future__ import annotations

import gc
import os
import re
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

_PROG = "lightning-dropcluster"
_MISSING = "{error}: this command needs more packages: pip install '.[cli]' in the clone"


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line."""
    try:
        import rich  # noqa: F401
        from jsonargparse import ArgumentParser
    except ImportError as error:
        raise SystemExit(_MISSING.format(error=error)) from error

    class Parser(ArgumentParser):
        def format_help(self, *args: Any, **options: Any) -> str:
            text = super().format_help(*args, **options)
            return re.sub(r"--\w+", lambda option: option[0].replace("_", "-"), text)

    about = "See what DropCluster would work on, and what it learned."
    parser = Parser(prog=_PROG, description=about, version=version("lightning-dropcluster"))
    commands = parser.add_subcommands(dest="command")
    for name, (command, add_arguments) in _COMMANDS.items():
        sub = Parser(description=_first_line(command))
        add_arguments(sub)
        commands.add_subcommand(name, sub, help=_first_line(command))
    parsed = parser.parse_args([_with_underscores(word) for word in (sys.argv[1:] if args is None else args)])
    command, _ = _COMMANDS[parsed.command]
    try:
        command(**parsed[parsed.command].as_dict())
    except ImportError as error:
        raise SystemExit(str(error)) from error
    except (ValueError, OSError) as error:
        raise SystemExit(f"{_PROG} {parsed.command}: {error}") from error


def run() -> NoReturn:
    """Run the command line as a process of its own, and end that at once.

    Looking for garbage among the objects of torch and timm, and freeing them all in the end, takes as long as
    the command itself.
    """
    gc.set_threshold(1_000_000)
    main()
    sys.stdout.flush()
    os._exit(0)


def list_layers(
    model: str,
    match: list[str] | None = None,
    *,
    input: str | None = None,
    any_layer: bool = False,
    show_all: bool = False,
    num_clusters: int | None = None,
    cluster_size: float | None = None,
    scope: str = "map",
    num_samples: int = 1024,
    sketch_dim: int = 64,
    channel_dim: int = 1,
) -> None:
    """List the layers of a timm model that can drop, and what a pattern picks.

    Args:
        model: name of a timm model, such as resnet50.
        match: patterns, as for DropCluster(layers=...).
        input: input size, such as 3x224x224, 3x160x192 or 224; the model's own by default.
        any_layer: let --match pick modules of any type, as layer_types=torch.nn.Module does.
        show_all: with --match, show every layer that is not picked too.
        num_clusters: clusters per feature map.
        cluster_size: or mean number of features per cluster; 16 by default.
        scope: what is grouped: map, position, layer or channel.
        num_samples: samples gathered for each clustering.
        sketch_dim: dimensions of the sketch.
        channel_dim: -1 for layers with channels last, such as the blocks of transformers.

    Raises:
        ValueError: if there is no such model, or an argument does not fit it.
    """
    from lightning_dropcluster.cli.models import show_layers

    show_layers(
        model,
        match,
        parse_size(input),
        any_layer=any_layer,
        show_all=show_all,
        num_clusters=num_clusters,
        cluster_size=cluster_size,
        scope=scope,
        num_samples=num_samples,
        sketch_dim=sketch_dim,
        channel_dim=channel_dim,
    )


def plot(
    checkpoints: list[str],
    match: list[str] | None = None,
    *,
    output: str = ".",
    image: str | None = None,
    max_maps: int = 16,
) -> None:
    """Draw the clusters that checkpoints hold; of several checkpoints of a run, also how they changed.

    Args:
        checkpoints: files that Lightning wrote, or folders of them.
        match: patterns of layers' names; all layers with clusters by default.
        output: folder for the pictures.
        image: file with an input image, to draw the clusters over.
        max_maps: feature maps drawn of each layer at most.

    Raises:
        ValueError: if an argument is wrong, or there are no clusters.
        OSError: if a file cannot be read or written.
    """
    from lightning_dropcluster.checks import check_number
    from lightning_dropcluster.cli.checkpoints import (
        print_history,
        read_histories,
        read_image,
        save_plots,
    )

    check_number("max_maps", max_maps, 1, integer=True)
    pixels = None if image is None else read_image(image)
    histories = read_histories(checkpoints, match or ["**"])
    Path(output).mkdir(parents=True, exist_ok=True)
    for history in histories:
        print_history(history)
        for path in save_plots(history, Path(output), image=pixels, max_maps=max_maps):
            print(f"  {path}")


def parse_size(text: str | None) -> tuple[int, ...] | None:
    """Read an input size (C, H, W), such as ``"3x224x224"``, or ``"224"`` for three square channels.

    Example:
        >>> parse_size("3x160x192"), parse_size("224")
        ((3, 160, 192), (3, 224, 224))
    """
    if text is None:
        return None
    if not re.fullmatch(r"[1-9]\d*([x×,][1-9]\d*[x×,][1-9]\d*)?", text):
        raise ValueError(f"input={text!r}: must be a size such as 3x224x224 or 224")
    sides = [int(side) for side in re.split("[x×,]", text)]
    return tuple(sides) if len(sides) == 3 else (3, *(sides * 2))


def _with_underscores(word: str) -> str:
    """Spell an option as the parser does, which takes no hyphens."""
    name, equals, value = word.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if name.startswith("--") else word


def _add_layers(parser: ArgumentParser) -> None:
    parser.add_argument("model", type=str, help="name of a timm model, such as resnet50")
    parser.add_argument(
        "--match", nargs="+", type=str, metavar="PATTERN", help="patterns, as for DropCluster(layers=...)"
    )
    parser.add_argument(
        "--all", action="store_true", dest="show_all", help="with --match, show the other layers too"
    )
    parser.add_argument(
        "--any_layer",
        action="store_true",
        help="let --match pick modules of any type, as layer_types=torch.nn.Module does",
    )
    parser.add_function_arguments(
        list_layers, as_group=False, skip={"model", "match", "show_all", "any_layer"}
    )


def _add_plot(parser: ArgumentParser) -> None:
    parser.add_argument(
        "checkpoints",
        nargs="+",
        type=str,
        metavar="CHECKPOINT",
        help="files that Lightning wrote, or folders of them",
    )
    parser.add_argument(
        "--match", nargs="+", type=str, metavar="PATTERN", help="patterns of layers' names; all by default"
    )
    parser.add_function_arguments(plot, as_group=False, skip={"checkpoints", "match"})


def _first_line(function: Callable[..., None]) -> str:
    return (function.__doc__ or "").partition("\n")[0]


_COMMANDS: dict[str, tuple[Callable[..., None], Callable[[ArgumentParser], None]]] = {
    "layers": (list_layers, _add_layers),
    "plot": (plot, _add_plot),
}
