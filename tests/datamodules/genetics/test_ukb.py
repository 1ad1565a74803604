import pytest

from common.errors import DataError
from datamodules.genetics.ukb import genetics_of
from datamodules.tree import Tree


def touch(root, *names):
    (root / "genetics").mkdir()
    for name in names:
        (root / "genetics" / name).touch()
    return root


@pytest.mark.parametrize("stem", ["ukb_cal_chr{}_v2.bed", "ukb22418_c{}_b0_v2.bed", "ukb22828_c{}_b0_v3.bgen"])
def test_both_ways_of_naming_chromosomes_are_found(tmp_path, stem):
    root = touch(tmp_path, *(stem.format(c) for c in (1, 2, 22, "X")), "ukb22418_c1_b0_v2.bim")
    assert genetics_of(Tree(root)).genotypes == str(root / "genetics" / stem.format("{chrom}"))


def test_sex_chromosomes_alone_and_several_families_are_refused_by_name(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(DataError, match="chromosome X alone"):
        genetics_of(Tree(touch(tmp_path / "a", "ukb22418_cX_b0_v2.bed")))
    (tmp_path / "b").mkdir()
    with pytest.raises(DataError, match="several families of genotypes"):
        genetics_of(Tree(touch(tmp_path / "b", "ukb_cal_chr1_v2.bed", "ukb22418_c1_b0_v2.bed")))


def test_no_genetics_are_none(tmp_path):
    assert genetics_of(Tree(tmp_path)).genotypes is None
