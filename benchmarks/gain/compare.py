"""Compare methods over seeds by the protocol in evidence.md; a run that has finished is never run again."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import traceback
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from jsonargparse import auto_cli

from benchmarks.common.record import commit, write_line
from benchmarks.gain.protocol import Record, Run, final_runs, key, load_stage, tuning_runs
from benchmarks.gain.train import run as train

PROCESSES = multiprocessing.get_context("forkserver")
"""Each run is a process of its own, forked from one that has imported everything already."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare methods over seeds by the protocol in evidence.md; a run that has finished is never run again.

    Args:
        stage: the name of a file in `stages/`, or the path of another YAML file.
        out: JSON-lines file with the record of each finished run; runs that are in it are not run again.
        data_dir: see `train.py`. Runs are told apart by their settings, not by this: other images need
            another file for ``out``.
        weights: a file to take in place of what timm downloads, in stages that start from trained weights.
        jobs: runs at a time, each a process.
        threads: of each run.
        dry_run: only count what remains to be run.
    """

    stage: str = "quick"
    out: str = "compare.jsonl"
    data_dir: str | None = None
    weights: str | None = None
    jobs: int = 1
    threads: int = 1
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
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    PROCESSES.set_forkserver_preload(["benchmarks.gain.train"])
    with ThreadPoolExecutor(options.jobs) as pool:
        try:
            return list(pool.map(partial(attempt, options=options, code=commit()), todo)).count(False)
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


def attempt(run: Run, options: Options, code: str | None) -> bool:
    """Train in a process of its own and append the record.

    Args:
        run: what to do.
        options: how, and the file of the records.
        code: the commit that is being run, which may not be the one checked out at the end.

    Returns:
        Whether it succeeded; if not, what it said is on standard error.
    """
    try:
        with ProcessPoolExecutor(1, PROCESSES) as process:
            record = process.submit(train, run.settings).result()
    except Exception as error:
        print(f"{run.method} failed: {run.key}", file=sys.stderr)
        traceback.print_exception(error)
        return False
    named = {"stage": Path(options.stage).stem, "method": run.method, "phase": run.phase}
    write_line({**named, **record, "commit": code}, options.out)
    return True


if __name__ == "__main__":
    sys.exit(1 if main(auto_cli(Options, as_positional=False)) else 0)
