import pytest

from benchmarks.cost.launches import CASES, LAYOUTS, count

pytest.importorskip("triton")


@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_dropping_starts_at_most_six_kernels_in_a_layer_and_step(layout, options):
    found = count(layout, **options)
    assert found["drop_kernel"] == 2
    assert sum(found.values()) <= 6
