"""Run the tests that need a GPU, file by file: what one file breaks on the device stays in its process."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import chain
from pathlib import Path
from typing import Any

from benchmarks.common.record import ROOT, provenance, write_line

MARK = re.compile(r"mark\.gpu\b")
# A newer or older torch may warn of what is no fault here.
OPTIONS = ("-m", "gpu", "-W", "default", "-p", "no:cacheprovider", "-v", "--no-header", "-rfE")
ALONE = ("test_faiss_search.py",)  # it fills the GPU's memory
AT_ONCE, LIMIT = 5, 120.0  # files, and seconds for each
COUNTED = ("passed", "failed", "error", "skipped")


def main() -> int:
    """Write a record for each file and one for all; the exit code is 0 where all that ran passed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=None, help="run so many files only, the smallest")
    parser.add_argument("--out", default=None, help="file to which the records are appended as well")
    options = parser.parse_args()
    total = Counter(dict.fromkeys(COUNTED, 0))
    for record in run_files(files_to_run()[: options.files]):
        write_line({"benchmark": "gpu tests", **record}, options.out)
        total.update({word: record[word] for word in COUNTED})
    bad = total["failed"] + total["error"]
    write_line({"benchmark": "gpu tests", "file": "all", **total, "bad": bad, **provenance()}, options.out)
    return int(bad > 0)


def files_to_run() -> list[Path]:
    """Find the files with such tests, small ones first; others need not even import."""
    found = [path for path in (ROOT / "tests").rglob("test_*.py") if MARK.search(path.read_text())]
    return sorted(found, key=lambda path: path.stat().st_size)


def run_files(paths: list[Path]) -> Iterator[dict[str, Any]]:
    """Run some at once, since most of their time is imports; large ones first, so that none is left over."""
    alone = [path for path in paths if path.name in ALONE]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        running = [pool.submit(run_file, path) for path in reversed(paths) if path not in alone]
        yield from chain((done.result() for done in as_completed(running)), map(run_file, alone))


def run_file(path: Path) -> dict[str, Any]:
    """Run one file's tests and count them; a process that crashed or hung is an error."""
    started = time.monotonic()
    command = [sys.executable, "-m", "pytest", *OPTIONS, str(path)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
        printed, errors, code = done.stdout, done.stderr, done.returncode
    except subprocess.TimeoutExpired as late:
        printed, errors, code = (late.stdout or b"").decode(errors="replace"), "", None
    print(printed, errors, file=sys.stderr, flush=True)
    counts = {word: count(printed, word) for word in COUNTED}
    if code not in (0, 1):
        counts["error"] += 1
    told = [line for line in printed.splitlines() if line.startswith(("FAILED", "ERROR"))]
    where = {"file": str(path.relative_to(ROOT)), "exit_code": code}
    return {**where, **counts, "seconds": round(time.monotonic() - started, 1), "told": told}


def count(printed: str, word: str) -> int:
    """Read a number off pytest's last line, as in "2 failed, 13 passed in 4.2s"."""
    found = re.findall(rf"(\d+) {word}", printed.rsplit("\n", 2)[-2] if "\n" in printed else "")
    return int(found[0]) if found else 0


if __name__ == "__main__":
    sys.exit(main())
