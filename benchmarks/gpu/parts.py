"""What is run on a GPU, in the order of its worth, and what it must give."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.gpu.runner import Goal, Part

PATIENCE = 4  # with machines on which a dry run is but one job of many
PAIRED = ("Dropout", "DropBlock", "DropCluster zero", "DropCluster mean", "DropCluster position")


def all_parts(data_dir: str | None, *, dry: bool) -> list[Part]:
    """List the parts.

    Args:
        data_dir: of CIFAR-10.
        dry: in small, for any machine; of the goals what must hold there too.

    Returns:
        The parts.
    """
    parts = [
        start(dry),
        tests(dry),
        reclustering(dry),
        step(dry),
        turns(dry),
        turns(dry, means=True),
        step(dry, compiled=True),
        memory(dry),
        saved(dry),
        accuracy(data_dir, dry),
    ]
    return [in_small(part) for part in parts] if dry else parts


def in_small(part: Part) -> Part:
    """Give a part the time that it may need anywhere, and leave goals that only a GPU can meet."""
    goals = [goal if goal.anywhere else replace(goal, at_most=None, at_least=None) for goal in part.goals]
    return replace(part, limit=PATIENCE * part.limit, goals=goals)


def start(dry: bool) -> Part:
    goals = [
        Goal("packages that are missing", "number_missing", at_most=0, anywhere=True),
        Goal("GPUs that FAISS sees", "faiss_gpus", at_least=1),
        Goal("FAISS imported, s", "import_faiss_s"),
        Goal("first fit, s", "first_fit_s"),
        Goal("held by FAISS, MiB", "faiss_mib", at_most=512),
    ]
    return Part("start", ["benchmarks.gpu.start"], 90, goals)


def tests(dry: bool) -> Part:
    whole = {"file": "all"}
    goals = [
        Goal("failed", "bad", at_most=0, anywhere=True),
        Goal("passed", "passed", at_least=60, where=whole),
        Goal("left out", "skipped", at_most=0, where=whole),
    ]
    return Part("tests", ["benchmarks.gpu.correctness", *(["--files=1"] if dry else [])], 150, goals)


def step(dry: bool, *, compiled: bool = False) -> Part:
    """At batch 256 in bf16, channels last: DropCluster on every conv2 of a ResNet-50."""
    words = ["--model=resnet10t", "--batch_size=2", "--size=64", "--repeats=2"] if dry else []
    if compiled:
        words.append(f"--compile={'aot_eager' if dry else 'inductor'}")
    own, gathering = {"case": "DropCluster"}, {"case": "DropCluster, gathering"}
    goals = [
        Goal("DropCluster, ratio to none", "ratio", at_most=1.02, where=own),
        Goal("DropCluster, peak memory", "peak_ratio", at_most=1.02, where=own),
    ]
    if not compiled:
        goals += [
            Goal("gathering too, ratio", "ratio", at_most=1.06, where=gathering),
            Goal("gathering too, peak memory", "peak_ratio", at_most=1.02, where=gathering),
            Goal("Dropout2d, ratio", "ratio", where={"case": "nn.Dropout2d"}),
            Goal("timm's DropBlock, ratio", "ratio", where={"case": "timm DropBlock2d per map"}),
        ]
    name, limit = ("compiled step", 170) if compiled else ("step", 70)
    return Part(name, ["benchmarks.gpu.step", *words], limit, goals)


def turns(dry: bool, *, means: bool = False) -> Part:
    """The same in Lightning's loop, with an optimiser, by turns with steps that do not drop."""
    small = ["--model=resnet10t", "--batch_size=2", "--size=64", "--pairs=8"]
    words = small if dry else ["--batch_size=256", "--precision=bf16-mixed", "--channels_last=true"]
    if means:
        words = [*words, "--fill=mean", "--scope=position"]
    goals = [Goal("DropCluster, ratio to none", "seconds.ratio", at_most=None if means else 1.02)]
    return Part("turns with means" if means else "turns", ["benchmarks.cost.turns", *words], 50, goals)


def reclustering(dry: bool) -> Part:
    """All conv2 layers of a ResNet-50 at 224 px."""
    words = ["--part=model", *(["--quick=true", "--samples=64", "--maps=4"] if dry else ["--repeats=5"])]
    goals = [
        Goal("cold, s", "median_s", at_most=0.3, where={"case": "cold"}),
        Goal("warm, s", "median_s", at_most=0.3, where={"case": "warm"}),
        Goal("cold, sparse maps, s", "median_s", at_most=2.0, where={"case": "cold, sparse maps"}),
        Goal("searches, cold", "searches", at_most=800, where={"benchmark": "searches", "case": "cold"}),
        Goal("searches, warm", "searches", at_most=400, where={"benchmark": "searches", "case": "warm"}),
        Goal("torch alone, cold, s", "median_s", where={"case": "torch, cold"}),
        Goal("cold, ratio to flash-kmeans", "times_flash", at_most=2.0),
        Goal("inertia, ratio to flash-kmeans", "inertia_to_flash", at_most=1.01),
    ]
    return Part("reclustering", ["benchmarks.cost.reclustering", *words], 90, goals)


def memory(dry: bool) -> Part:
    """What dropping adds, as a share of the activations that it masks."""
    words = ["--quick=true"] if dry else ["--batch_size=256", "--size=224"]
    kinds = ("labels and sizes", "saved for backward", "peak")
    goals = [Goal(f"{kind}, share", "ratio", at_most=0.05, where={"case": kind}) for kind in kinds]
    return Part("memory", ["benchmarks.cost.memory", *words], 40, goals)


def saved(dry: bool) -> Part:
    """What compiled code keeps for backward, as a share of the activation."""
    words = ["--samples=4", "--channels=4", "--size=8"] if dry else []
    goals = [Goal("no more than without", "more_than_plain", at_most=0.05, where={"fill": "zero"})]
    return Part("saved", ["benchmarks.cost.saved", *words], 40, goals)


def accuracy(data_dir: str | None, dry: bool) -> Part:
    """CIFAR-10 within seconds a training; figures of the digits mean nothing."""
    small = ["--train_samples=256", "--epochs=2", "--batch_size=64", "--widths=[8,16,16]", "--data=digits"]
    words = small if dry else [f"--data_dir={data_dir}"] if data_dir else []
    none = {"benchmark": "fast training, paired", "case": "none"}
    goals = [
        # 0.94 with the original images; JPEGs of them cost a point or two.
        Goal("none, accuracy", "accuracy", at_least=0.91, where=none),
        Goal("none, s", "seconds", at_most=12, where={"case": "none"}),
        Goal("seeds", "seeds", where=none),
    ]
    goals += [Goal(f"{name}, gain", "gain", where={"case": name}) for name in PAIRED]
    command = ["benchmarks.gpu.accuracy", *words, "--seconds=" + ("0" if dry else "{seconds}")]
    return Part("accuracy", command, 150, goals)
