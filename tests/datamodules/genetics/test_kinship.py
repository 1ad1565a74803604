import numpy as np
import pytest

from common.errors import DataError
from datamodules.genetics.kinship import kinship, read_kinship, unrelated


def test_relatives_are_left_out_greedily():
    pairs = [("a", "d"), ("b", "d"), ("c", "d"), ("e", "f"), ("x", "y")]
    assert unrelated(pairs, list("abcdefg")) == ["a", "b", "c", "f", "g"]


def test_kinship_of_a_copy_a_child_and_a_stranger():
    rng = np.random.default_rng(1)
    frequency = rng.uniform(0.2, 0.8, 4000)
    draw = lambda: (rng.random(4000) < frequency).astype(np.float32)  # noqa: E731
    mother = np.stack([draw(), draw()])
    child = np.where(rng.random(4000) < 0.5, mother[0], mother[1]) + draw()
    counts = np.stack([mother.sum(0), mother.sum(0), child, draw() + draw()])
    counts[3, :50] = np.nan
    found = kinship(counts.astype(np.float32))
    assert found[0, 1] == pytest.approx(0.5, abs=1e-6)
    assert found[0, 2] == pytest.approx(0.25, abs=0.03)
    assert abs(found[0, 3]) < 0.04


@pytest.mark.parametrize("names", ["#IID1\tIID2\tNSNP\tKINSHIP", "ID1 ID2 IBS0 Kinship"])
def test_tables_of_kinship(names, tmp_path):
    path = tmp_path / "table"
    path.write_text(f"{names}\n1 2 0.01 0.2\n1 3 0.01 0.08\n4 5 0.01 nan\n")
    assert read_kinship(path) == [("1", "2")]


def test_a_share_of_the_genome_is_no_kinship(tmp_path):
    """KING's PropIBD is twice the kinship."""
    (tmp_path / "table").write_text("ID1 ID2 PropIBD\n1 2 0.1\n")
    with pytest.raises(DataError, match="needs the columns IID1, IID2 and KINSHIP"):
        read_kinship(tmp_path / "table")
    with pytest.raises(DataError, match="does not exist"):
        read_kinship(tmp_path / "none")
