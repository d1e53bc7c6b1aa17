"""Compare methods over seeds by the protocol in evidence.md; a run that has finished is never run again."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

from benchmarks.common.record import write_line
from benchmarks.gain.protocol import Record, Run, final_runs, key, load_stage, tuning_runs
from benchmarks.gain.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare methods over seeds by the protocol in evidence.md; a run that has finished is never run again.

    Args:
        stage: the name of a file in `stages/`, or the path of another YAML file.
        out: JSON-lines file with the record of each finished run; runs that are in it are not run again.
        data_dir: see `train.py`.
        weights: a file to take in place of what timm downloads, in stages that start from trained weights.
        jobs: runs at a time, each a process.
        threads: of each run.
        launcher: words before each command, such as "nice -n 10" or "srun --exclusive".
        dry_run: only count what remains to be run.
    """

    stage: str = "quick"
    out: str = "compare.jsonl"
    data_dir: str | None = None
    weights: str | None = None
    jobs: int = 1
    threads: int = 1
    launcher: str = ""
    dry_run: bool = False

    def __post_init__(self) -> None:
        for name in ("jobs", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def main(options: Options) -> int:
    """Run what remains of a stage: first the tuning runs, and when all are there, the final ones.

    Returns:
        The number of runs that are missing in the end.
    """
    stage = load_stage(options.stage)
    base = replace(stage.base, data_dir=options.data_dir, progress_bar=False)
    if options.weights is not None:
        base = replace(base, weights=_in_place_of(base.weights, options))
    stage = replace(stage, base=base)
    missing = finish(tuning_runs(stage), options)
    return missing if missing else finish(final_runs(stage, read_records(options.out)), options)


def finish(runs: Sequence[Run], options: Options) -> int:
    """Run those of the runs that have no record yet.

    Args:
        runs: all of one phase.
        options: how to run them, and the file of the records.

    Returns:
        The number that are missing in the end.
    """
    todo = remaining(runs, read_records(options.out))
    print(f"{len(runs) - len(todo)} of {len(runs)} runs have finished", file=sys.stderr)
    if not todo or options.dry_run:
        return len(todo)
    with ThreadPoolExecutor(options.jobs) as pool:
        try:
            return list(pool.map(partial(attempt, options=options), todo)).count(False)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _in_place_of(weights: str | None, options: Options) -> str | None:
    if weights is None:
        raise ValueError(
            f"weights must be None, as {options.stage} starts from random ones, got {options.weights!r}"
        )
    return options.weights


def read_records(out: str) -> list[Record]:
    """Read the records of finished runs; none where there is no file yet."""
    path = Path(out)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def remaining(runs: Iterable[Run], records: Iterable[Record]) -> list[Run]:
    """List the runs without a record, in their order and each once."""
    done = {key(record["arguments"]) for record in records}
    return list({run.key: run for run in runs if run.key not in done}.values())


def attempt(run: Run, options: Options) -> bool:
    """Train in a process of its own and append the record.

    Returns:
        Whether it succeeded; if not, what it said is on standard error.
    """
    train = [sys.executable, "-m", "benchmarks.gain.train", "--config", json.dumps(changes(run.settings))]
    command = [*shlex.split(options.launcher), *train]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{run.method} failed: {shlex.join(command)}\n{done.stderr}", file=sys.stderr, flush=True)
        return False
    record = json.loads(done.stdout.splitlines()[-1])
    stage = Path(options.stage).stem
    write_line({"stage": stage, "method": run.method, "phase": run.phase, **record}, options.out)
    return True


def changes(settings: Settings) -> dict[str, Any]:
    """List the settings that differ from the default."""
    usual = asdict(Settings())
    return {name: value for name, value in asdict(settings).items() if value != usual[name]}


if __name__ == "__main__":
    sys.exit(1 if main(auto_cli(Options, as_positional=False)) else 0)
