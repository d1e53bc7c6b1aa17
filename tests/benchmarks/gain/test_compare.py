import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import stats

from benchmarks.gain import compare
from benchmarks.gain.compare import Options, main, read_records, remaining
from benchmarks.gain.protocol import STAGES, Method, Stage, choose, final_runs, load_stage, tuning_runs
from benchmarks.gain.report import Options as ReportOptions
from benchmarks.gain.report import collect, compared, differences, draw, spell, tables, with_seeds_below
from benchmarks.gain.report import main as report_main
from benchmarks.gain.settings import Settings, arguments

NAMES = sorted(path.stem for path in STAGES.glob("*.yaml"))
RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"

BASE = Settings(
    model="test_resnet.r160_in1k",
    stem="cifar",
    data="fake",
    train_samples=40,
    corrupted_samples=10,
    epochs=1,
    batch_size=16,
    layers="conv1",
    start=0,
    progress_bar=False,
)
METHODS = (
    Method("dropped", {"regularizer": "dropout"}, ({"drop_prob": 0.1}, {"drop_prob": 0.5})),
    Method("control", {"regularizer": "spatial_dropout"}, like="dropped"),
    Method("none"),
)
STAGE = Stage(
    base=BASE,
    methods=METHODS,
    tuning_seeds=(9,),
    validation_samples=20,
    rounds=(((0, 1), ("dropped", "control")), ((0,), ("none",))),
)


def fake_record(run, accuracy=0.5, nll=1.0):
    scores = {"accuracy": accuracy, "nll": nll, "ece": 0.1}
    corrupted = {name: {key: [value] * 5 for key, value in scores.items()} for name in ("a", "b")}
    return {**scores, "corrupted": corrupted, "method": run.method, "arguments": arguments(run.settings)}


TUNED = [fake_record(run, nll=nll) for run, nll in zip(tuning_runs(STAGE), (2.0, 1.0), strict=True)]


def test_tuning_looks_at_validation_images_only():
    runs = tuning_runs(STAGE)
    assert [run.settings.drop_prob for run in runs] == [0.1, 0.5]
    assert {run.settings.validation_samples for run in runs} == {20}
    assert {run.settings.corrupted_samples for run in runs} == {0}
    assert {run.settings.seed for run in runs} == {9}
    assert {run.phase for run in runs} == {"tuning"}


def test_tuning_may_have_images_of_its_own_number():
    stage = replace(STAGE, tuning_samples=30)
    assert {run.settings.train_samples for run in tuning_runs(stage)} == {30}
    assert {
        run.settings.train_samples for run in final_runs(stage, map(fake_record, tuning_runs(stage)))
    } == {40}


def test_the_lowest_validation_nll_is_chosen_and_lent_to_the_control():
    assert choose(STAGE, TUNED) == {"dropped": {"drop_prob": 0.5}, "control": {"drop_prob": 0.5}, "none": {}}
    with pytest.raises(
        ValueError, match=r"records must hold all tuning runs, got none for 1 of \{'dropped'\}"
    ):
        choose(STAGE, TUNED[:1])


def test_final_runs_come_in_the_order_of_the_rounds():
    runs = final_runs(STAGE, TUNED)
    assert [(run.method, run.settings.seed) for run in runs] == [
        ("dropped", 0),
        ("control", 0),
        ("dropped", 1),
        ("control", 1),
        ("none", 0),
    ]
    assert {run.phase for run in runs} == {"final"}
    assert runs[1].settings == replace(BASE, regularizer="spatial_dropout", drop_prob=0.5)


def test_a_stage_that_explores_leaves_the_test_images_alone():
    runs = final_runs(replace(STAGE, explores=True), TUNED)
    assert {(run.settings.validation_samples, run.settings.corrupted_samples) for run in runs} == {(20, 0)}
    assert {run.phase for run in runs} == {"final"}
    assert [run.settings.drop_prob for run in runs[:2]] == [0.5, 0.5]


def test_runs_are_told_apart_by_what_matters():
    run = final_runs(STAGE, TUNED)[0]
    same = replace(run, settings=replace(run.settings, data_dir="/x", out="y", progress_bar=True))
    other = replace(run, settings=replace(run.settings, seed=5))
    assert remaining([same, other, other], [fake_record(run)]) == [other]


def test_weights_are_the_same_wherever_they_come_from():
    run, apart = final_runs(STAGE, TUNED)[0], []
    for weights in (None, "timm", "/x/file.pth"):
        apart.append(replace(run, settings=replace(run.settings, weights=weights)))
    assert remaining(apart, [fake_record(apart[1])]) == [apart[0]]


def test_weights_are_for_stages_that_start_from_some():
    with pytest.raises(ValueError, match="weights must be None, as quick starts from random ones, got 'x'"):
        main(Options(weights="x"))


def test_a_record_outlives_a_new_setting():
    run = final_runs(STAGE, TUNED)[0]
    record = fake_record(run)
    del record["arguments"]["any_layer"]  # as if written before there was one
    assert remaining([run], [record]) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"methods": (*METHODS, Method("x", {}, ({},)))},
            r"methods must have grids of one length, got \[1, 2\]",
        ),
        ({"tuning_seeds": (1,)}, r"rounds must name a method and seed once and leave out \(1,\)"),
        ({"rounds": (((0, 0), ("none",)),)}, r"rounds must name a method and seed once"),
        ({"rounds": (((0,), ("nothing",)),)}, r"methods must have the names .* none for \{'nothing'\}"),
    ],
)
def test_bad_stages(change, message):
    with pytest.raises(ValueError, match=message):
        replace(STAGE, **change)


@pytest.mark.parametrize("name", NAMES)
def test_every_stage_has_its_first_final_runs_in_pairs(name):
    stage = load_stage(name)
    records = [fake_record(run) for run in tuning_runs(stage)]
    first = final_runs(stage, records)[:2]  # none where a stage only tunes
    assert len({run.settings.seed for run in first}) == bool(first)


@pytest.fixture(scope="module")
def records():
    return read_records(str(RESULTS / "compare_cpu.jsonl"))


@pytest.mark.parametrize("path", sorted(RESULTS.glob("compare_*.md")), ids=lambda path: path.stem)
def test_every_table_is_found_again_in_the_records(path, records):
    stage = load_stage(path.stem.removeprefix("compare_").replace("_", "-"))
    assert "\n\n".join(tables(stage, records)) + "\n" == path.read_text()


def test_stages_extend_one_another(tmp_path):
    child = {"extends": "blocks-1000", "base": {"train_samples": 7}, "dropping": {"layers": "x"}}
    child["methods"] = {"none": {}, "one": {"regularizer": "dropout"}}
    child["rounds"] = [{"seeds": [0], "methods": ["one"]}]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(child))
    stage, parent = load_stage(str(tmp_path / "mine.yaml")), load_stage("blocks-1000")
    assert stage.base == replace(parent.base, train_samples=7)
    assert stage.tuning_seeds == parent.tuning_seeds
    assert [m.fixed for m in stage.methods] == [{}, {"layers": "x", "regularizer": "dropout"}]


def test_unknown_stages():
    with pytest.raises(ValueError, match=r"stage must be a YAML file or one of .*quick.*, got 'stem-9'"):
        load_stage("stem-9")


@pytest.fixture
def small(tmp_path):
    """A stage in a file of its own, with a single setting to choose from."""
    dropped = {"regularizer": "dropout", "grid": [{"drop_prob": 0.1}]}
    stage = {"base": asdict(BASE), "methods": {"dropped": dropped}, "tuning_seeds": [9]}
    stage |= {"validation_samples": 20, "rounds": [{"seeds": [0, 1], "methods": ["dropped"]}]}
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(stage))
    return str(path)


def test_a_finished_run_is_not_run_again(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "ProcessPoolExecutor", lambda workers, _: ThreadPoolExecutor(workers))
    options = Options(stage=small, out=str(tmp_path / "new" / "runs.jsonl"))
    assert main(replace(options, dry_run=True)) == 1
    assert main(options) == 0
    records = read_records(options.out)
    assert [(record["stage"], record["phase"]) for record in records] == [
        ("small", "tuning"),
        ("small", "final"),
        ("small", "final"),
    ]
    assert [record["split"] for record in records] == ["validation", "test", "test"]
    assert [len(record["corrupted"]) for record in records] == [0, 8, 8]
    monkeypatch.setattr(compare, "attempt", lambda *args, **kwargs: pytest.fail("ran again"))
    assert main(options) == 0
    capsys.readouterr()
    plot = tmp_path / "plots" / "runs.png"
    report_main(ReportOptions(records=options.out, stage=small, plot=str(plot)))
    assert "| dropped  | 2 " in capsys.readouterr().out
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_failed_run_is_missing_and_tells_why(small, tmp_path, capsys):
    options = Options(stage=small, out=str(tmp_path / "r.jsonl"), data_dir=str(tmp_path / "nowhere"))
    path = Path(small)
    path.write_text(path.read_text().replace("data: fake", "data: folder"))
    assert main(options) == 1
    said = capsys.readouterr().err
    assert "FileNotFoundError" in said
    assert "dropped failed: " in said
    assert read_records(options.out) == []


@pytest.mark.parametrize("name", ["jobs", "threads"])
def test_bad_options(name):
    with pytest.raises(ValueError, match=rf"{name} must be at least 1, got 0"):
        Options(**{name: 0})


def test_intervals_agree_with_scipy():
    one, two = np.random.default_rng(0).normal(size=(2, 8))
    mean, low = stats.ttest_rel(one, two), stats.ttest_rel(one, two).confidence_interval().low
    difference = pd.Series(one - two, name="NLL")
    assert mean.df == 7
    assert spell(difference) == f"{difference.mean():.3f} ± {difference.mean() - low:.3f}"
    assert spell(difference[:1]) == f"{difference[0]:.3f}"


def test_differences_pair_by_seed():
    rows = [("a", 1, 5.0), ("a", 2, 7.0), ("a", 3, 100.0), ("b", 2, 6.0), ("b", 1, 3.0), ("b", 4, -100.0)]
    runs = pd.DataFrame([*rows, ("c", 9, 1.0)], columns=["method", "seed", "NLL"])
    found = differences(runs, [("a", "b"), ("a", "c"), ("a", "nobody")])
    assert found["difference"].tolist() == ["a less b"]
    assert found["pairs"].tolist() == ["2"]
    assert found["NLL"][0].startswith("+1.500 ± ")


def test_a_pair_that_diverged_in_both_runs_is_no_missing_one():
    runs = pd.DataFrame(
        [(name, seed, math.inf if seed == 2 else 1.0) for name in "ab" for seed in range(3)],
        columns=["method", "seed", "NLL"],
    )
    assert differences(runs, [("a", "b")])["NLL"].tolist() == ["diverged"]


def cells(stage, records, against=None):
    """Split all rows of the tables into cells."""
    lines = "\n".join(tables(stage, records, against)).splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_reports_state_means_and_differences():
    records = list(TUNED)
    accuracy = {
        ("dropped", 0): 0.7,
        ("dropped", 1): 0.8,
        ("control", 0): 0.6,
        ("control", 1): 0.6,
        ("none", 0): 0.5,
    }
    for run in final_runs(STAGE, TUNED):
        records.append(fake_record(run, accuracy[run.method, run.settings.seed]))
    reach, rows = stats.t.ppf(0.975, 1) * 5, cells(STAGE, records)
    assert rows[2:4] == [
        ["dropped", "drop_prob=0.1", "50.00", "2.000", ""],
        ["dropped", "drop_prob=0.5", "50.00", "1.000", "yes"],
    ]
    assert ["dropped", "2", f"75.00 ± {reach:.2f}"] in [row[:3] for row in rows]
    paired = ["dropped less control", "2", f"+15.00 ± {reach:.2f}", "+0.000 ± 0.000"]
    assert paired in [row[:4] for row in rows]
    assert ["dropped less none", "1", "+20.00", "+0.000"] in [row[:4] for row in rows]


def test_lines_are_json(tmp_path):
    out = tmp_path / "r.jsonl"
    out.write_text(json.dumps({"a": 1}) + "\n")
    assert read_records(str(out)) == [{"a": 1}]


def test_reports_set_all_against_a_method_of_choice():
    assert compared(STAGE) == [("dropped", "control"), ("dropped", "none")]
    assert compared(STAGE, "none") == [("dropped", "none"), ("control", "none")]
    with pytest.raises(ValueError, match="against must be one of dropped, control, none, got 'nobody'"):
        compared(STAGE, "nobody")


def test_reports_leave_out_seeds_from_a_number_on():
    runs = final_runs(with_seeds_below(1, STAGE), TUNED)
    assert runs == [run for run in final_runs(STAGE, TUNED) if run.settings.seed < 1]
    assert {run.method for run in runs} == {"dropped", "control", "none"}


def test_a_run_that_diverged_is_reported_as_such():
    lost = {"accuracy": 0.1, "nll": None, "ece": None}
    corrupted = {"a": {key: [0.1, value] for key, value in lost.items()}}
    records = [*TUNED[:1], {**TUNED[1], **lost}]
    records += [{**fake_record(run), **lost, "corrupted": corrupted} for run in final_runs(STAGE, records)]
    rows = cells(STAGE, records)
    assert ["dropped", "drop_prob=0.5", "10.00", "inf", ""] in rows
    assert ["dropped", "2", "10.00 ± 0.00", "diverged", "diverged"] in [row[:5] for row in rows]
    draw(collect(STAGE, records))


def test_scores_that_a_run_lacks_are_left_blank():
    records = [*TUNED, *map(fake_record, final_runs(STAGE, TUNED))]
    records[-1]["scaled"] = {"temperature": 1.5, "accuracy": 0.5, "nll": 1.0, "ece": 0.1}
    rows = cells(STAGE, records)
    assert ["1.50", "1.000", "10.00"] in [row[-3:] for row in rows]
    assert any(row[0] == "dropped" and row[-3:] == ["-", "-", "-"] for row in rows)
    draw(collect(STAGE, records))


def test_tuning_averages_seeds_and_may_go_by_scaled_nll():
    base = replace(BASE, calibration_samples=5)
    stage = replace(STAGE, base=base, tuning_seeds=(8, 9), tuned_by="scaled nll")
    runs = tuning_runs(stage)
    assert [(run.settings.seed, run.settings.drop_prob) for run in runs] == [
        (8, 0.1),
        (8, 0.5),
        (9, 0.1),
        (9, 0.5),
    ]
    assert {run.settings.calibration_samples for run in runs} == {5}
    scaled = [1.0, 2.0, 3.0, 1.5]
    records = [
        fake_record(run, nll=9 - nll) | {"scaled": {"nll": nll}}
        for run, nll in zip(runs, scaled, strict=True)
    ]
    assert choose(stage, records)["dropped"] == {"drop_prob": 0.5}
    assert ["dropped", "drop_prob=0.5", "50.00", "1.750", "yes"] in cells(stage, records)
    with pytest.raises(ValueError, match="tuned_by 'scaled nll' needs calibration_samples above 0, got 0"):
        replace(STAGE, tuned_by="scaled nll")


def test_reports_state_what_clean_averages_change():
    runs = final_runs(STAGE, TUNED)
    records = [
        fake_record(run, 0.7) | {"old_averages": fake_record(run, old) | {"corrupted": {}}}
        for run, old in zip(runs, (0.6, 0.7, 0.5, 0.7, 0.7), strict=True)
    ]
    rows = cells(STAGE, [*TUNED, *records])
    found = [row[:3] for row in rows[[row[0] for row in rows].index("clean less old averages") + 2 :]]
    assert found[0][:2] == ["dropped", "2"]
    assert found[0][2].startswith("+15.00 ±")
    assert found[1:] == [["control", "2", "+0.00 ± 0.00"], ["none", "1", "+0.00"]]
