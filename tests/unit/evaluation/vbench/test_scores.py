"""VBench's scores from those of dimensions, against published rows."""

import pytest

from opensora.evaluation.vbench.published import T2V_ROWS
from opensora.evaluation.vbench.scores import I2V, T2V


@pytest.mark.parametrize("row", [row for row in T2V_ROWS if row.scores], ids=lambda row: row.model)
def test_published_totals_come_out(row):
    """From the published scores of the 16 dimensions, to the two digits that they are rounded to."""
    found = T2V.summary(row.scores)
    assert found == pytest.approx(row.summary, abs=6e-5)


def test_sizes_and_ends_of_the_scale():
    assert (len(T2V.dimensions), len(I2V.dimensions)) == (16, 9)
    best = {name: T2V.ranges.get(name, (0.0, 1.0))[1] for name in T2V.dimensions}
    assert T2V.summary(best) == pytest.approx({"total": 1, "quality": 1, "semantic": 1})
    worst = {name: I2V.ranges.get(name, (0.0, 1.0))[0] for name in I2V.dimensions}
    assert I2V.summary(worst) == pytest.approx({"total": 0, "i2v": 0, "quality": 0})
    assert I2V.summary({**worst, "camera_motion": 1.0})["i2v"] == pytest.approx(0.1 / 2.1)  # it weighs a tenth


def test_no_total_of_a_part():
    scores = dict.fromkeys(T2V.dimensions, 0.9)
    del scores["scene"]
    assert list(T2V.summary(scores)) == ["quality"]
