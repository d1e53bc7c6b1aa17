"""The check of a GPU: one part takes nothing from another, and the parts say what they are asked for."""

import fcntl
import json
import os
import tarfile
from importlib import import_module

import pytest
from jsonargparse import auto_cli

import lightning_dropcluster
from benchmarks.common import record
from benchmarks.gpu import accuracy, check, correctness, start
from benchmarks.gpu.parts import all_parts
from benchmarks.gpu.runner import Goal, Part, run_parts

FAKE = """
import fcntl, subprocess, sys, time
kind, out = sys.argv[1], sys.argv[-1]
open(out, "a").write('{"case": "%s", "ratio": 1.5}\\n{"cut o' % kind)
if kind == "fails":
    sys.exit("no luck")
if kind == "hangs":
    lock = open(out + ".lock", "w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    subprocess.Popen(["sleep", "60"], pass_fds=[lock.fileno()])
    time.sleep(60)
"""
MET, MISSED = Goal("fast", "ratio", at_most=1.5), Goal("faster", "ratio", at_most=1.4)


@pytest.fixture
def env(tmp_path):
    (tmp_path / "fake.py").write_text(FAKE)
    return {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONFAULTHANDLER": "1"}


def parts(*kinds, limit=60.0):
    return [Part(kind, ["fake", kind], 3.0 if kind == "hangs" else limit, [MET, MISSED]) for kind in kinds]


def test_a_part_that_fails_or_hangs_takes_nothing_from_the_others(tmp_path, env):
    outcomes = list(run_parts(parts("fails", "hangs", "works"), 200, tmp_path, env))
    assert [o.state for o in outcomes] == ["failed, exit code 1", "stopped after 3 s", "done"]
    assert [o.records for o in outcomes] == [[{"case": o.part.name, "ratio": 1.5}] for o in outcomes]
    assert "no luck" in outcomes[0].log
    assert 'fake.py", line 11' in outcomes[1].log  # where it was
    with (
        tmp_path / "hangs.jsonl.lock"
    ).open() as lock:  # which the part's child holds for as long as it lives
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_what_the_time_is_too_short_for_is_left_out_and_said(tmp_path, env):
    (outcome,) = run_parts(parts("works"), 20, tmp_path, env)
    assert outcome.state == "skipped, 20 s were left of 20 s"
    assert not outcome.is_good


def test_goals():
    records = [{"case": "a", "ratio": 1.0}, {"case": "a", "ratio": 1.2}, {"case": "b", "ratio": None}]
    assert Goal("", "ratio", at_most=1.1).measured(records) == 1.2  # the worst
    assert Goal("", "ratio", at_least=1.1, where={"case": "a"}).measured(records) == 1.0
    assert Goal("", "ratio", at_most=1.1, where={"case": "b"}).measured(records) is None
    assert [Goal("", "ratio", at_most=0).is_met(value) for value in (0, 1, None)] == [True, False, False]
    assert [Goal("", "ratio", at_least=1).is_met(value) for value in (0, 1, None)] == [False, True, False]
    assert Goal("", "ratio").is_met(3.0) is None
    assert Goal("", "seconds.ratio").measured([{"seconds": {"ratio": 1.1}}, {"case": "other"}]) == 1.1


def test_it_prints_a_table_and_keeps_records(tmp_path, env, monkeypatch, capsys):
    monkeypatch.setattr(check, "all_parts", lambda data_dir, dry: parts("fails", "works"))
    monkeypatch.setenv("PYTHONPATH", env["PYTHONPATH"])
    monkeypatch.setenv("COLUMNS", "100")
    out = tmp_path / "out.jsonl"
    assert check.main(["--bundle", str(tmp_path), "--out", str(out)]) == 1
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("no luck", "works", "faster", "≤ 1.4", "NO"))
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["part"] for line in lines] == ["fails", "fails", "works", "works"]
    assert lines[1]["log"].strip() == "no luck"
    assert [goal["met"] for goal in lines[3]["goals"]] == [True, False]
    assert lines[3]["device"]
    assert "==== works: done" in (tmp_path / "out.jsonl.log").read_text()
    assert check.main(["--parts", "works", "--bundle", str(tmp_path), "--dry"]) == 1
    with pytest.raises(SystemExit, match="--parts must be some of fails,works, got fast"):
        check.main(["--parts", "works,fast"])
    with pytest.raises(SystemExit):
        check.main(["--data_dir", str(tmp_path / "nowhere")])
    assert "nowhere: there is no such folder or file" in capsys.readouterr().err


def test_only_what_is_missing_comes_from_the_bundle(tmp_path, monkeypatch):
    for name in ("torch", "not_there"):
        (tmp_path / "site" / name / name).mkdir(parents=True)
    with tarfile.open(tmp_path / "site.tar.xz", "w:xz") as archive:
        archive.add(tmp_path / "site", ".")
    (tmp_path / "commit").write_text("abc")
    monkeypatch.setattr(record, "_git", lambda *_: None)
    monkeypatch.setattr(check.sys, "path", [*check.sys.path])
    monkeypatch.setenv("BENCHMARK_COMMIT", "")
    env = check.environment(tmp_path, tmp_path / "unpacked")
    added = [path for path in env["PYTHONPATH"].split(os.pathsep) if "unpacked" in path]
    assert added == [str(tmp_path / "unpacked" / "not_there")]
    assert [folder.name for folder in (tmp_path / "package").iterdir()] == [
        f"lightning_dropcluster-{lightning_dropcluster.__version__}.dist-info"
    ]
    assert env["BENCHMARK_COMMIT"] == record.commit() == "abc"


def test_a_file_of_tests_that_hangs_is_an_error(tmp_path, monkeypatch):
    file = tmp_path / "test_hangs.py"
    file.write_text("import time\n\ndef test_hangs():\n    time.sleep(60)\n")
    monkeypatch.setattr(correctness, "LIMIT", 5.0)
    monkeypatch.setattr(correctness, "OPTIONS", ("-v", "-p", "no:cacheprovider", "-c", os.devnull))
    monkeypatch.setattr(correctness, "ROOT", tmp_path)
    (found,) = correctness.run_files([file])
    assert (found["error"], found["exit_code"], found["file"]) == (1, None, "test_hangs.py")


@pytest.mark.parametrize("dry", [True, False])
def test_parts_understand_their_options(dry, tmp_path):
    for part in all_parts("somewhere", dry=dry):
        module, *words = part.command
        settings = getattr(import_module(module), "Settings", None)
        if settings is not None:
            words = [word.format(seconds=9) for word in words]
            auto_cli(settings, args=[*words, "--out=x"], as_positional=False)


def test_start(monkeypatch, capsys):
    monkeypatch.setattr(start, "NEEDED", "faiss no_such_package")
    monkeypatch.setattr(start.sys, "argv", ["start"])
    start.main()
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line[0] == "{"]
    assert printed[0]["missing"] == ["no_such_package"]


@pytest.mark.filterwarnings("ignore:DropCluster")  # one epoch of few images
def test_accuracy_is_compared_in_pairs(tmp_path, monkeypatch):
    made = accuracy.methods(accuracy.Settings())
    names = ["none", "DropCluster mean"]
    assert set(names) < set(made)
    monkeypatch.setattr(accuracy, "methods", lambda _: {name: made[name] for name in names})
    out = tmp_path / "out.jsonl"
    small = {"train_samples": 32, "epochs": 1, "batch_size": 16, "widths": (4, 4, 4)}
    accuracy.main(accuracy.Settings(data="digits", seconds=0.0, out=str(out), **small))
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["case"] for line in lines] == 2 * names
    for one, pair in zip(lines[:2], lines[2:], strict=True):
        assert pair["gain"] == pytest.approx(one["accuracy"] - lines[0]["accuracy"])
