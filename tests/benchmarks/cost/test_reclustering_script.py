"""The reclustering benchmark runs, and weighs labels as it should."""

import json

import pytest
import torch
from sklearn.cluster import KMeans

from benchmarks.cost import reclustering
from benchmarks.cost.activations import exact_profiles, random_fields, sketch_of
from benchmarks.cost.peak import added_memory
from lightning_dropcluster.learning.scopes import SCOPES

CPU = torch.device("cpu")


@pytest.mark.filterwarnings("ignore:DropCluster")  # tiny maps have few distinct profiles
@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_it_writes_a_line_for_each_case(capsys):
    settings = reclustering.Settings(
        quick=True, model="test_resnet.r160_in1k", train_samples=64, samples=32, maps=2
    )
    reclustering.main(settings)
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    cases = {(record["benchmark"], record.get("case")) for record in records}
    assert {("reclustering", "FaissKMeans, sketch"), ("reclustering", "Ward, exact profiles")} <= cases
    assert {("whole model", "cold"), ("whole model", "cold, sparse maps"), ("sketch", None)} <= cases
    scopes = {record["scope"] for record in records if record.get("case") == "FaissKMeans, sketch, warm"}
    assert scopes == {"map", "position", "layer"}
    assert all(0 < r["searches"] < r["goal"] for r in records if r["benchmark"] == "searches")
    assert {("searches", "cold"), ("searches", "warm")} <= cases
    base = [record for record in records if record.get("case") == record.get("base", "")]
    assert base
    assert all(record["inertia_ratio"] == record["times_faster"] == 1.0 for record in base)


def test_inertia_is_that_of_sklearn():
    profiles = exact_profiles(random_fields(4, 8, maps=3, samples=20).now)
    for points in profiles:
        fit = KMeans(4, random_state=0).fit(points.numpy())
        found = reclustering.inertia(points[None], torch.from_numpy(fit.labels_)[None])
        assert found.item() == pytest.approx(fit.inertia_, rel=1e-4)


@pytest.mark.parametrize("scope", SCOPES)
def test_exact_profiles_are_those_of_an_exact_sketch(scope):
    outputs = random_fields(4, 8, maps=3, samples=20).now
    exact = exact_profiles(outputs, scope)
    sketched = sketch_of(outputs, exact.shape[2], scope=scope).profiles()
    torch.testing.assert_close(sketched @ sketched.mT, exact @ exact.mT)


def test_memory_is_seen_while_it_is_held():
    def hold():
        return torch.ones(2**24).sum()

    # Some times the kernel takes back as much of other memory at the same time.
    added = [added_memory(hold, CPU) for _ in range(20)]
    assert None in added or max(added) > 2**25
