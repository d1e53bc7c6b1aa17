"""The fused drop: what it does, in Triton's interpreter, and how many kernels it starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_equals_cluster_drop_in_the_interpreter_of_triton():
    here = Path(__file__).parent
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            here / "interpreted_fused_drop.py",
        ],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


# Types of the arguments of each kernel, and what its caller makes constant.
INTEGERS = dict.fromkeys(
    ("samples", "maps", "positions", "clusters", "cells", "stride", "label_map", "label_position"), "i32"
) | dict.fromkeys(("step_map", "step_position", "mean_map", "mean_cluster"), "i32")
TABLES = {"uniform": "*fp32", "prob": "*fp32", "sizes": "*i32", "words": "*i32", "amount": "*i64"}


def kernels():
    from lightning_dropcluster.methods.dropping import triton_kernels as made

    by_product = {"SAMPLES": 64, "POSITIONS": 64, "CLUSTERS": 128}
    yield made.pack_kernel, {}, {"COUNT": True, "BLOCK": 512}
    for last in (False, True):
        beside = {"step_map" if last else "step_position": 1, "mean_map" if last else "mean_cluster": 1}
        for kind, labels in (("bf16", "u8"), ("fp16", "i16")):
            types = {"x": f"*{kind}", "labels": f"*{labels}", "means": "*fp32"}
            yield made.means_by_product_kernel, types, {**by_product, **beside}
        if last:
            fixed = dict.fromkeys(("MAPS", "POSITIONS", "CLUSTERS"), 64)
            yield made.means_of_positions_kernel, {"x": "*bf16", "labels": "*u8", "means": "*fp32"}, fixed
        wide = {"MAPS": 16 if last else 1, "POSITIONS": 8 if last else 128, "CLUSTERS": 16}
        yield made.means_kernel, {"x": "*fp32", "labels": "*u8", "means": "*fp64"}, {**wide, **beside}
        for kind, means in (("bf16", "fp32"), ("fp32", "fp64")):
            types = {
                "x": f"*{kind}",
                "out": f"*{kind}",
                "labels": "*i32",
                "means": f"*{means}",
                "total": "fp32",
            }
            for mean in (False, True):
                fixed = {"LAST": last, "PER_MAP": True, "BY_BATCH": not mean, "MEAN": mean, "BLOCK": 512}
                yield made.drop_kernel, types, {**fixed, "TYPE": made.tl.float32}


def test_kernels_compile_for_a_gpu_that_is_not_here(tmp_path, monkeypatch):
    """The interpreter takes much that the compiler refuses."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for kernel, types, fixed in kernels():
        names = kernel.arg_names
        told = {name: "constexpr" if name in fixed else (INTEGERS | TABLES | types)[name] for name in names}
        constants = {(names.index(name),): value for name, value in fixed.items()}
        assert compile(ASTSource(kernel, told, constants), GPUTarget("cuda", 90, 32)).asm["cubin"]
