"""Try everything on a GPU in ten minutes, part by part, and hold it against the goals.

Needs torch, pytorch-lightning and rich to be there; what else is missing is taken from the folder that
`python -m benchmarks.gpu.bundle` packs.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import tarfile
import tomllib
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common.record import ROOT, append_line, commit, device_name, provenance
from benchmarks.gpu.parts import all_parts
from benchmarks.gpu.runner import Outcome, Part, run_parts

BUDGET, DRY_BUDGET = 540.0, 1800.0
LOG_LINES = 40  # of a part that failed, in what is printed and in its record


def main(words: Sequence[str] | None = None) -> int:
    """Run the parts, write their records, print the table; the exit code is 0 where all is met."""
    options = parse(words)
    parts = chosen(all_parts(options.data_dir, dry=options.dry), options.parts)
    budget = options.budget or (DRY_BUDGET if options.dry else BUDGET)
    outcomes = []
    with TemporaryDirectory() as folder:
        env = environment(Path(options.bundle), Path(folder) / "site")
        for outcome in run_parts(parts, budget, Path(folder), env):
            outcomes.append(outcome)
            record(outcome, options.out, dry=options.dry)
            print(f"{outcome.part.name}: {outcome.state}, {outcome.seconds} s", flush=True)
            if outcome.state != "done":
                print(end_of(outcome.log), flush=True)
    Console().print(table(outcomes))
    return int(not all(outcome.is_good for outcome in outcomes))


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line without jsonargparse, which may be in the bundle only."""
    kind = re.sub(r"\W+", "_", device_name().lower()) if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore[reportOptionalMemberAccess]
    parser.add_argument(
        "--dry", action="store_true", help="everything in small, on any machine: figures mean nothing"
    )
    parser.add_argument("--parts", help="names of parts, separated by commas; by default all")
    parser.add_argument("--budget", type=float, help="seconds for everything")
    parser.add_argument(
        "--data_dir", help="CIFAR-10, a folder with train/CLASS/* and test/CLASS/*, or a tar of it"
    )
    parser.add_argument(
        "--bundle", default=str(ROOT / ".gpu"), help="folder that benchmarks.gpu.bundle wrote"
    )
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / f"gpu_check_{kind}.jsonl"))
    options = parser.parse_args(words)
    if options.data_dir and not Path(options.data_dir).exists():
        parser.error(f"--data_dir {options.data_dir}: there is no such folder or file")
    if options.dry and options.out == parser.get_default("out"):
        options.out = None
    return options


def chosen(parts: Sequence[Part], names: str | None) -> list[Part]:
    """Pick parts by their names."""
    known = [part.name for part in parts]
    wanted = known if names is None else names.split(",")
    if unknown := set(wanted) - set(known):
        raise SystemExit(f"--parts must be some of {','.join(known)}, got {','.join(sorted(unknown))}")
    return [part for part in parts if part.name in wanted]


def environment(bundle: Path, site: Path) -> dict[str, str]:
    """Let the parts import what is missing here from the bundle, and know the commit where git does not."""
    missing = [note_package(site.parent / "package")]
    if (bundle / "site.tar.xz").exists():
        with tarfile.open(bundle / "site.tar.xz") as archive:
            archive.extractall(site, filter="data")
        missing += [str(folder) for folder in sorted(site.iterdir()) if find_spec(folder.name) is None]
    sys.path += missing  # so that versions are found here too
    noted = bundle / "commit"
    known = commit() or (noted.read_text().strip() if noted.exists() else "")
    paths = [str(ROOT), *missing, *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["BENCHMARK_COMMIT"] = known
    told = {"OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
    return {**told, **os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def note_package(folder: Path) -> str:
    """Describe the clone as an installed package is, which may be none here: it asks for its own version."""
    about = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    info = folder / f"{about['name'].replace('-', '_')}-{about['version']}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Name: {about['name']}\nVersion: {about['version']}\n")
    return str(folder)


def record(outcome: Outcome, out: str | None, *, dry: bool) -> None:
    """Keep a part's records and what became of it, and beside them all that it printed."""
    if out is None:
        return
    with Path(f"{out}.log").open("a") as file:
        file.write(f"==== {outcome.part.name}: {outcome.state}\n{outcome.log}\n")
    for found in outcome.records:
        append_line({"part": outcome.part.name, **found}, out)
    goals = [{**asdict(goal), "measured": value, "met": met} for goal, value, met in outcome.verdicts]
    what: dict[str, Any] = {"state": outcome.state, "seconds": outcome.seconds, "goals": goals, "dry": dry}
    log = {} if outcome.state == "done" else {"log": end_of(outcome.log)}
    append_line({"benchmark": "gpu check", "part": outcome.part.name, **what, **log, **provenance()}, out)


def end_of(log: str) -> str:
    """Leave out all but the last lines."""
    return "\n".join(log.splitlines()[-LOG_LINES:])


def table(outcomes: Sequence[Outcome]) -> Table:
    """Lay out what was measured and what was to be met."""
    made = Table(
        "part", "what", "measured", "goal", "met", title=f"{device_name()}, torch {torch.__version__}"
    )
    for outcome in outcomes:
        made.add_row(outcome.part.name, f"{outcome.state}, {outcome.seconds} s", "", "", "")
        for goal, value, met in outcome.verdicts:
            bounds = [
                f"{sign} {bound:g}"
                for sign, bound in (("≤", goal.at_most), ("≥", goal.at_least))
                if bound is not None
            ]
            shown = "nothing" if value is None else f"{value:.4g}"
            made.add_row("", goal.what, shown, " ".join(bounds), {True: "yes", False: "NO", None: ""}[met])
        made.add_section()
    return made


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # which stops the part that runs, too
    sys.exit(main())
