"""Report a comparison: Markdown tables and a picture, with 95 % intervals and differences paired by seed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import isnan, nan
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from benchmarks.common.record import parse
from benchmarks.gain.compare import read_records
from benchmarks.gain.paired import Estimate, difference, estimate
from benchmarks.gain.protocol import Record, Stage, choose, final_runs, key, tuning_runs
from benchmarks.gain.stages import STAGES, StageName

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Values = dict[str, dict[int, float]]
"""Method to seed to value."""


@dataclass(frozen=True)
class Metric:
    """A number of a run, `None` where the run has none, and how to print it."""

    name: str
    read: Callable[[Record], float | None]
    factor: float
    digits: int


def corrupted(record: Record, score: str) -> float:
    """Average a score over corruptions and severities: the plain mean, without a reference network."""
    return fmean(number(value) for scores in record["corrupted"].values() for value in scores[score])


def scaled(record: Record, score: str) -> float | None:
    """Read a score after temperature scaling."""
    return number(record["scaled"][score]) if record.get("scaled") else None


def number(score: float | None) -> float:
    """Read a score of a record: NaN where it was not finite."""
    return nan if score is None else score


METRICS = (
    Metric("accuracy %", lambda r: number(r["accuracy"]), 100, 2),
    Metric("NLL", lambda r: number(r["nll"]), 1, 3),
    Metric("ECE %", lambda r: number(r["ece"]), 100, 2),
    Metric("corrupted accuracy %", lambda r: corrupted(r, "accuracy"), 100, 2),
    Metric("corrupted NLL", lambda r: corrupted(r, "nll"), 1, 3),
    Metric("corrupted ECE %", lambda r: corrupted(r, "ece"), 100, 2),
)
SCALED = (
    Metric("temperature", lambda r: scaled(r, "temperature"), 1, 2),
    Metric("scaled NLL", lambda r: scaled(r, "nll"), 1, 3),
    Metric("scaled ECE %", lambda r: scaled(r, "ece"), 100, 2),
)


@dataclass(frozen=True)
class Options:
    """What a report lets you choose.

    Args:
        records: JSON-lines file that `compare.py` wrote.
        stage: whose runs to report.
        against: method that all others are set against; by default the first of the stage is set against all.
        seeds: leave out seeds from this number on, to set methods with few seeds beside those with more.
        plot: PNG file for the picture.
    """

    records: str = "compare.jsonl"
    stage: StageName = "quick"
    against: str | None = None
    seeds: int | None = None
    plot: str | None = None


def main(options: Options) -> None:
    """Print the tables, and draw the picture on request."""
    stage, records = STAGES[options.stage], read_records(options.records)
    if options.seeds is not None:
        stage = with_seeds_below(options.seeds, stage)
    print("\n".join(markdown(stage, records, options.against)))
    if options.plot is not None:
        Path(options.plot).parent.mkdir(parents=True, exist_ok=True)
        draw(stage, records).savefig(options.plot)


def with_seeds_below(most: int, stage: Stage) -> Stage:
    """Leave out the final runs of seeds from a number on."""
    return replace(stage, rounds=[([s for s in seeds if s < most], names) for seeds, names in stage.rounds])


def collect(stage: Stage, records: Sequence[Record], metric: Metric) -> Values:
    """Read a metric of the stage's final runs, as far as they have finished."""
    found = {key(record["arguments"]): record for record in records}
    values: Values = {method.name: {} for method in stage.methods}
    for run in final_runs(stage, records):
        score = metric.read(found[run.key]) if run.key in found else None
        if score is not None:
            values[run.method][run.settings.seed] = metric.factor * score
    return {method: by_seed for method, by_seed in values.items() if by_seed}


def markdown(stage: Stage, records: Sequence[Record], against: str | None = None) -> Iterator[str]:
    """Yield the lines of three tables: tuning, means over seeds, and differences paired by seed."""
    if tuning_runs(stage):
        yield from tuning_table(stage, records)
        yield ""
    columns = {metric: collect(stage, records, metric) for metric in metrics(stage)}
    yield from _header("method", "seeds", *(metric.name for metric in columns))
    for method, by_seed in columns[METRICS[0]].items():
        scores = {metric: list(of.get(method, {}).values()) for metric, of in columns.items()}
        cells = [_cell(estimate(of) if of else None, metric.digits) for metric, of in scores.items()]
        yield _row(method, str(len(by_seed)), *cells)
    yield ""
    yield from _header("difference", "pairs", *(metric.name for metric in columns))
    for method, less in compared(stage, against):
        pairs = {m: difference(of.get(method, {}), of.get(less, {})) for m, of in columns.items()}
        cells = [_cell(pair, metric.digits, signed=True) for metric, pair in pairs.items()]
        if count := max(pair.count if pair else 0 for pair in pairs.values()):
            yield _row(f"{method} less {less}", str(count), *cells)


def metrics(stage: Stage) -> tuple[Metric, ...]:
    """List the numbers that the stage's final runs have."""
    has_corrupted = stage.base.corrupted_samples > 0 and not stage.explores
    has_scaled = stage.base.calibration_samples > 0 and not stage.explores
    return (*METRICS[:3], *(METRICS[3:] if has_corrupted else ()), *(SCALED if has_scaled else ()))


def compared(stage: Stage, against: str | None = None) -> list[tuple[str, str]]:
    """List which method is set against which: each against its control, and the first against all.

    Args:
        stage: the comparison.
        against: set all against this method instead.

    Raises:
        ValueError: if the stage has no such method.
    """
    names = [method.name for method in stage.methods]
    if against is not None:
        if against not in names:
            raise ValueError(f"against must be one of {', '.join(names)}, got {against!r}")
        return [(name, against) for name in names if name != against]
    controls = [(method.like, method.name) for method in stage.methods if method.like]
    first = stage.methods[0].name
    others = [(first, method.name) for method in stage.methods if method.name != first]
    return [*controls, *(pair for pair in others if pair not in controls)]


def tuning_table(stage: Stage, records: Sequence[Record]) -> Iterator[str]:
    """Yield the lines of the table of tuning runs, the chosen ones marked."""
    found, chosen = {key(record["arguments"]): record for record in records}, choose(stage, records)
    yield from _header("method", "setting", "validation accuracy %", "validation NLL", "chosen")
    grid = {method.name: iter(method.grid) for method in stage.methods}
    for run in sorted(tuning_runs(stage), key=lambda run: list(grid).index(run.method)):
        change, record = next(grid[run.method]), found[run.key]
        setting = ", ".join(f"{name}={value}" for name, value in change.items())
        mark = "yes" if change == chosen[run.method] else ""
        yield _row(
            run.method, setting, f"{100 * record['accuracy']:.2f}", f"{number(record['nll']):.3f}", mark
        )


def draw(stage: Stage, records: Sequence[Record]) -> Figure:
    """Draw each metric in a panel: a method a row, a dot per seed, the mean with its 95 % interval."""
    from matplotlib.figure import Figure

    columns = {metric: collect(stage, records, metric) for metric in metrics(stage)}
    methods, rows = list(columns[METRICS[0]]), len(columns) // 3
    figure = Figure(figsize=(12, 1 + rows * (0.5 + 0.35 * len(methods))), layout="constrained")
    axes = figure.subplots(rows, 3, sharey=True, squeeze=False)
    for axis, metric in zip(axes.flat, columns, strict=True):
        for row, method in enumerate(methods):
            values = list(columns[metric].get(method, {}).values())
            if not values:
                continue
            mean = estimate(values)
            axis.plot(values, [row] * len(values), ".", color="0.7", zorder=1)
            axis.errorbar(mean.mean, row, xerr=mean.high - mean.mean, fmt="o", color="C0", capsize=3)
        axis.set(title=metric.name, yticks=range(len(methods)), yticklabels=methods)
    axes[0, 0].invert_yaxis()
    return figure


def _cell(value: Estimate | None, digits: int, *, signed: bool = False) -> str:
    if value is None:
        return "-"
    if isnan(value.mean):
        return "diverged"
    sign = "+" if signed else ""
    width = f" ± {value.high - value.mean:.{digits}f}" if value.count > 1 else ""
    return f"{value.mean:{sign}.{digits}f}{width}"


def _header(*names: str) -> Iterable[str]:
    return _row(*names), "|" + "---|" * len(names)


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(main(parse(Options, __doc__)))
