"""Pack what a GPU machine without internet lacks: FAISS for one kind of GPU, and packages of pure Python.

FAISS's wheel (135 MB) holds code for six kinds of GPU and needs cuBLAS 12 (600 MB), where a machine with a
recent PyTorch has cuBLAS 13. So the code for other kinds is blanked, which packs to almost nothing, and the
few functions of cuBLAS that FAISS calls, the same in both, are forwarded. Needs gcc, on Linux x86-64.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from jsonargparse import auto_cli

from benchmarks.common.record import ROOT, commit

CUDA_RUNTIME = "nvidia-cuda-runtime-cu12==12.9.79"
LIBRARIES = "faiss_gpu.libs"
PACKAGES = ("jsonargparse", "docstring-parser", "typeshed-client", "flash-kmeans", "timm")
FORWARDED = (  # what faiss-gpu 1.15 calls
    "cublasCreate_v2",
    "cublasDestroy_v2",
    "cublasGemmEx",
    "cublasGemmStridedBatchedEx",
    "cublasGetMathMode",
    "cublasSetMathMode",
    "cublasSetStream_v2",
    "cublasSgemmEx",
)
FATBIN_MAGIC = 0xBA55ED50
# A forwarded function has at most 24 arguments, all of them integers or pointers, which go on unchanged.
FORWARDER = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
static void *library(void) {{
  static void *found;
  const char *names[] = {{getenv("CUBLAS13"), "libcublas.so.13", "/usr/local/cuda/lib64/libcublas.so.13"}};
  for (int i = 0; !found && i < 3; i++) if (names[i]) found = dlopen(names[i], RTLD_NOW | RTLD_GLOBAL);
  if (!found) {{ fprintf(stderr, "libcublas.so.13 not found: set CUBLAS13 to its path\\n"); abort(); }}
  return found;
}}
"""
FUNCTION = """
int {name}({declared}) {{
  static int (*function)({types});
  if (!function) function = (int (*)({types}))dlsym(library(), "{name}");
  return function({passed});
}}
"""


@dataclass(frozen=True)
class Settings:
    """What to pack.

    Args:
        out: folder for the archive, and for a note of the commit; git ignores the default.
        compute_capability: of the GPU; 90 for H100 and H200.
        packages: of pure Python; on the machine only those that it lacks are used.
    """

    out: str = ".gpu"
    compute_capability: int = 90
    packages: tuple[str, ...] = PACKAGES


def main(settings: Settings) -> None:
    """Write the archive and say how large it is."""
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as folder:
        site = Path(folder) / "site"
        for name in settings.packages:
            unpack(download(name, Path(folder) / name, "--platform=any"), site)
        slim_faiss(Path(folder), site / "faiss", settings.compute_capability)
        with tarfile.open(out / "site.tar.xz", "w:xz", preset=6) as archive:
            archive.add(site, ".")
    (out / "commit").write_text(commit() or "")
    print(f"{out / 'site.tar.xz'}: {(out / 'site.tar.xz').stat().st_size / 2**20:.1f} MiB")


def download(name: str, folder: Path, *options: str) -> Path:
    """Let pip fetch a wheel, of the version that the project pins."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:", "--no-deps"]
    pins = ["--constraint", str(ROOT / "constraints.txt")]
    subprocess.run([*pip, *pins, *options, "--dest", str(folder), name], check=True)
    return next(folder.glob("*.whl"))


def unpack(wheel: Path, site: Path) -> None:
    """Give each package a folder of its own, with the name that it is imported by."""
    with zipfile.ZipFile(wheel) as archive:
        tops = sorted({name.split("/")[0] for name in archive.namelist() if "/" in name})
        archive.extractall(site / next(top for top in tops if not top.endswith((".dist-info", "_tests"))))


def slim_faiss(folder: Path, tree: Path, compute_capability: int) -> None:
    """Unpack FAISS with its libraries, for one kind of GPU."""
    for name in ("faiss-gpu", CUDA_RUNTIME):
        with zipfile.ZipFile(download(name, folder / name)) as archive:
            archive.extractall(tree)
    for library in tree.glob("nvidia/**/libcudart.so.12"):
        shutil.copy(library, tree / LIBRARIES)
    shutil.rmtree(tree / "nvidia")
    # Without this marker FAISS leaves finding its libraries to the loader, which looks beside it.
    (tree / "faiss" / "_gpu_build.py").unlink()
    keep_one_kind(tree / "faiss" / "libfaiss.so", compute_capability)
    build_library(tree / LIBRARIES, "libcublas.so.12", FORWARDED)
    build_library(tree / LIBRARIES, "libcublasLt.so.12", ())


def keep_one_kind(path: Path, compute_capability: int) -> None:
    """Blank the GPU code of a library, in place, that is not for one compute capability.

    Raises:
        ValueError: if there is none for it.
    """
    data = bytearray(path.read_bytes())
    kept = 0
    for start, size, made_for in gpu_code(data):
        if made_for == compute_capability:
            kept += 1
        else:
            data[start : start + size] = bytes(size)
    if not kept:
        raise ValueError(
            f"compute_capability must be one that {path.name} has code for, got {compute_capability}"
        )
    path.write_bytes(data)


def gpu_code(data: bytearray) -> Iterator[tuple[int, int, int]]:
    """Find pieces of GPU code: where they start, their size, and the compute capability they are for."""
    place, size = elf_section(data, b".nv_fatbin")
    end = place + size
    while place + 16 <= end:
        magic, _, header_size, body = struct.unpack_from("<IHHQ", data, place)
        if magic != FATBIN_MAGIC:
            place += 8  # padding
            continue
        entry, place = place + header_size, place + header_size + body
        while entry + 64 <= place:
            _, _, entry_header, payload = struct.unpack_from("<HHIQ", data, entry)
            yield entry + entry_header, payload, struct.unpack_from("<I", data, entry + 28)[0]
            entry += entry_header + payload


def elf_section(data: bytearray, name: bytes) -> tuple[int, int]:
    """Return offset and size of a section of a 64-bit ELF file."""
    table = struct.unpack_from("<Q", data, 0x28)[0]
    size, count, names = struct.unpack_from("<HHH", data, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", data, table + i * size) for i in range(count)]
    for header in headers:
        start = headers[names][4] + header[0]
        if data[start : data.index(b"\0", start)] == name:
            return header[4], header[5]
    raise ValueError(f"there is no section {name!r}")


def build_library(folder: Path, name: str, functions: tuple[str, ...]) -> None:
    """Compile a library of forwarders under the name, and with the symbol versions, that FAISS asks for."""
    numbers = range(24)
    signature = {
        "declared": ", ".join(f"long a{i}" for i in numbers),
        "types": ", ".join("long" for _ in numbers),
        "passed": ", ".join(f"a{i}" for i in numbers),
    }
    source, symbols = folder / "forward.c", folder / "forward.map"
    source.write_text(FORWARDER.format() + "".join(FUNCTION.format(name=f, **signature) for f in functions))
    exported = "global: " + "; ".join(functions) + "; " if functions else ""
    symbols.write_text(f"{name} {{ {exported}local: *; }};\n")
    options = ["-shared", "-fPIC", "-O1", "-w", f"-Wl,-soname,{name}", f"-Wl,--version-script={symbols}"]
    subprocess.run(["gcc", *options, "-o", str(folder / name), str(source), "-ldl"], check=True)
    source.unlink()
    symbols.unlink()


if __name__ == "__main__":
    main(auto_cli(Settings, as_positional=False))
