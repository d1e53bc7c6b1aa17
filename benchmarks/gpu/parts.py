"""What is run on a GPU, in the order of its worth, and what it must give."""

from __future__ import annotations

from benchmarks.gpu.runner import Goal, Part

CONV2 = "layer*.*.conv2"


def all_parts(data_dir: str | None, *, dry: bool) -> list[Part]:
    """List the parts.

    Args:
        data_dir: of CIFAR-10.
        dry: in small, for any machine; of the goals what must hold there too.

    Returns:
        The parts.
    """
    return [start(dry), tests(dry), accuracy(data_dir, dry)]


def start(dry: bool) -> Part:
    goals = [
        Goal("packages that are missing", "number_missing", at_most=0),
        Goal("GPUs that FAISS sees", "faiss_gpus", at_least=None if dry else 1),
        Goal("FAISS imported, s", "import_faiss_s"),
        Goal("first fit, s", "first_fit_s"),
        Goal("bytes that FAISS holds", "faiss_bytes", at_most=2**29),
    ]
    return Part("start", ["benchmarks.gpu.start"], 60, goals)


def tests(dry: bool) -> Part:
    goals = [
        Goal("tests that failed", "bad", at_most=0),
        Goal("tests that passed", "passed", at_least=None if dry else 60, where={"file": "all"}),
        Goal("tests left out", "skipped", at_most=None if dry else 0, where={"file": "all"}),
    ]
    return Part("tests", ["benchmarks.gpu.correctness", *(["--files", "1"] if dry else [])], 150, goals)


def accuracy(data_dir: str | None, dry: bool) -> Part:
    small = ["--data=digits", "--train_samples=512", "--epochs=2", "--batch_size=128", "--widths=[8,16,16]"]
    words = small if dry else [f"--data_dir={data_dir}"] if data_dir else []
    paired = "fast training, paired"
    goals = [
        Goal(
            "none, accuracy",
            "accuracy",
            at_least=None if dry else 0.93,
            where={"benchmark": paired, "case": "none"},
        ),
        Goal("none, s", "seconds", at_most=None if dry else 12, where={"case": "none"}),
        Goal("seeds", "seeds", where={"case": "none"}),
        *(
            Goal(f"{name}, gain", "gain", where={"case": name})
            for name in ("Dropout", "DropBlock", "DropCluster zero", "DropCluster mean")
        ),
    ]
    return Part(
        "accuracy", ["benchmarks.gpu.accuracy", *words, "--seconds={seconds}"], 20 if dry else 150, goals
    )
