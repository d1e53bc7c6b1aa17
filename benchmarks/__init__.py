"""Benchmarks: `gain` (does it help), `cost` (time and memory), `common` (what both need)."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # else idle threads spin, very slow on busy cores
