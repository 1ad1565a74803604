import gzip

import numpy as np
import pandas as pd
import pytest

from common.errors import DataError
from datamodules.genetics.genotypes import open_genotypes
from datamodules.genetics.scores import apply_score, match_alleles, read_burden, read_score, read_score_table
from datamodules.synthetic.fundus import write_bed

IDS = ["p0", "p1", "p2", "p3"]
VARIANTS = pd.DataFrame(
    [("1", "rs1", 100, "A", "G"), ("1", "rs2", 200, "C", "T"), ("1", "rs3", 300, "A", "T"), ("2", "rs4", 400, "G", "A"),
     ("2", "rs5", 500, "A", "C")],
    columns=["chrom", "id", "pos", "counted", "other"],
)  # fmt: skip
COUNTS = np.array([[0, 1, 2, 0, 1], [1, 1, 0, 2, 0], [2, 0, 1, -127, 2], [1, 2, 1, 1, 1]], dtype=np.int8)
HEADER = "#pgs_id=PGS9\n#genome_build={build}\n"
COLUMNS = "rsID\tchr_name\tchr_position\teffect_allele\tother_allele\teffect_weight"


@pytest.fixture
def genotypes(tmp_path):
    write_bed(tmp_path / "g", IDS, VARIANTS, COUNTS)
    return open_genotypes(str(tmp_path / "g"))


def score_of(tmp_path, *rows, build="GRCh37", columns=COLUMNS, name="score.txt"):
    text = HEADER.format(build=build) + "\n".join([columns, *rows]) + "\n"
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


@pytest.mark.parametrize(
    ("effect", "other", "counted", "uncounted", "expected"),
    [
        ("A", "G", "A", "G", ("matched", False)),
        ("G", "A", "A", "G", ("matched", True)),
        ("T", "C", "A", "G", ("strand_flipped", False)),
        ("C", "T", "A", "G", ("strand_flipped", True)),
        ("A", "", "A", "G", ("matched", False)),
        ("C", "", "A", "G", ("strand_flipped", True)),
        ("A", "T", "A", "T", ("ambiguous", False)),
        ("C", "G", "A", "T", ("alleles", False)),
        ("A", "C", "A", "G", ("alleles", False)),
        ("AT", "A", "AT", "A", ("matched", False)),
    ],
)
def test_alleles(effect, other, counted, uncounted, expected):
    assert match_alleles(effect, other, counted, uncounted) == expected


@pytest.mark.parametrize("name", ["score.txt", "score.txt.gz"])
def test_sum_by_hand(tmp_path, genotypes, name):
    """Flipped alleles, the other strand, an ambiguous variant, one that is absent, and a call that is missing."""
    path = score_of(tmp_path, "rs1\t1\t100\tG\tA\t1.0", "\t1\t200\tG\tA\t10", "rs3\t1\t300\tA\tT\t100",
                    "rs4\t2\t400\tG\tA\t1000", "rs9\t9\t9\tA\tC\t5", "rs5\t2\t500\tG\tA\t7", name=name)  # fmt: skip
    values, why = apply_score(read_score(path), genotypes)
    imputed = 2 * 3 / 6
    expected = [2 - a + 10 * b + 1000 * d for a, b, d in ((0, 1, 0), (1, 1, 2), (2, 0, imputed), (1, 2, 1))]
    assert values.tolist() == pytest.approx(expected)
    assert why == {"matched": 3, "strand_flipped": 1, "allele_flipped": 1, "ambiguous": 1, "absent": 1, "alleles": 1,
                   "left_out": 0, "imputed": 1}  # fmt: skip
    kept, _ = apply_score(read_score(path), genotypes, keep_ambiguous=True)
    assert (kept - values).tolist() == pytest.approx([200, 0, 100, 100])
    reference, _ = apply_score(read_score(path), genotypes, reference=np.array([0, 3]))
    assert reference[2] - values[2] == pytest.approx(1000 * (2 * 0.25 - imputed))


def test_models_and_rows_that_are_no_weight_of_an_allele(tmp_path, genotypes):
    path = score_of(tmp_path, "rs1\t1\t100\tA\tG\t1\tTrue\tFalse\tFalse", "rs5\t2\t500\tA\tC\t10\tFalse\tTrue\tFalse",
                    "rs2\t1\t200\tC\tT\t100\tFalse\tFalse\tTrue",
                    columns=COLUMNS + "\tis_dominant\tis_recessive\tis_haplotype")  # fmt: skip
    values, why = apply_score(read_score(path), genotypes)
    assert values.tolist() == pytest.approx([0 + 0, 1 + 0, 1 + 10, 1 + 0])
    assert why["left_out"] == 1


def test_a_row_that_comes_twice_counts_once(tmp_path, genotypes):
    path = score_of(tmp_path, "rs1\t1\t100\tA\tG\t1", "rs1\t1\t100\tA\tG\t1")
    values, why = apply_score(read_score(path), genotypes)
    assert values.tolist() == [0, 1, 2, 1]
    assert why["duplicate"] == 1


def test_another_build(tmp_path, genotypes):
    nameless = "chr_name\tchr_position\teffect_allele\tother_allele\teffect_weight"
    path = score_of(tmp_path, "1\t100\tA\tG\t1", build="GRCh38", columns=nameless)
    with pytest.raises(DataError, match="in GRCh38, the genotypes are in GRCh37"):
        apply_score(read_score(path), genotypes, "GRCh37")
    named = score_of(tmp_path, "rs1\t1\t999\tA\tG\t1", build="GRCh38")
    assert apply_score(read_score(named), genotypes, "GRCh37")[0].tolist() == [0, 1, 2, 1]
    harmonised = score_of(tmp_path, "1\t999\tA\tG\t1\t1\t100", build="GRCh38\n#HmPOS_build=GRCh37",
                          columns=nameless + "\thm_chr\thm_pos")  # fmt: skip
    assert apply_score(read_score(harmonised, "GRCh37"), genotypes, "GRCh37")[0].tolist() == [0, 1, 2, 1]
    with pytest.raises(DataError, match="only 0 are among the genotypes"):
        apply_score(read_score(score_of(tmp_path, "rs8\t1\t8\tA\tG\t1")), genotypes)


def test_damaged_scores(tmp_path):
    with pytest.raises(DataError, match="not numbers, first 'x'"):
        read_score(score_of(tmp_path, "rs1\t1\t100\tA\tG\tx"))
    with pytest.raises(DataError, match="effect_allele"):
        read_score(score_of(tmp_path, "rs1\t1", columns="rsID\tchr_name"))


@pytest.mark.parametrize("header", ["#FID\tIID", "#IID"])
def test_tables_of_plink2(tmp_path, header):
    path = tmp_path / "PGS1.sscore"
    ids = ["a\ta", "b\tb"] if "FID" in header else ["a", "b"]
    rows = [f"{name}\t10\t5\t{value}" for name, value in zip(ids, ("0.5", "nan"), strict=True)]
    path.write_text("\n".join([f"{header}\tALLELE_CT\tNAMED_ALLELE_DOSAGE_SUM\tSCORE1_AVG", *rows]))
    names, values = read_score_table(path)
    assert names == ["a", "b"]
    assert values[0] == 0.5
    assert np.isnan(values[1])
    path.write_text("IID\tSCORE1_AVG\na\t1\na\t2\n")
    with pytest.raises(DataError, match="twice"):
        read_score_table(path)


def test_burden(tmp_path):
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "combined_burdens.h5"
    with h5py.File(path, "w") as file:
        file["G"] = np.array([[0, 1, 0], [0, 0, 0]])
    (tmp_path / "combined_burdens_iid.txt").write_text("a\nb\n")
    with pytest.raises(DataError, match="colnames"):
        read_burden(path)
    (tmp_path / "combined_burdens_colnames.txt").write_text("G1\nG2\nG3\n")
    ids, genes, values = read_burden(path)
    assert (ids, genes, values.tolist()) == (["a", "b"], ["G2"], [[1.0], [0.0]])
    (tmp_path / "combined_burdens_iid.txt").write_text("a\n")
    with pytest.raises(DataError, match="holds 2 x 3 values, its names are 1 x 3"):
        read_burden(path)


@pytest.mark.real_data
def test_real_score_equals_an_independent_computation(real_data):
    """PGS001229 on 2,504 genotypes: decoded from the bytes, summed allele by allele, in plain Python and NumPy."""
    root = real_data("pgsc_calc")
    prefix = root / "target_genomes" / "cineca_synthetic_subset"
    score = read_score(root / "scorefiles" / "PGS001229_22.txt")
    values, why = apply_score(score, open_genotypes(str(prefix)), "GRCh37")
    bim = [line.split() for line in prefix.with_suffix(".bim").read_text().splitlines()]
    people = len(prefix.with_suffix(".fam").read_text().splitlines())
    width = -(-people // 4)
    raw = np.frombuffer(prefix.with_suffix(".bed").read_bytes()[3:], dtype=np.uint8).reshape(len(bim), width)
    codes = np.stack([(raw >> shift) & 3 for shift in (0, 2, 4, 6)], axis=2).reshape(len(bim), -1)[:, :people]
    weights = {}
    for line in (root / "scorefiles" / "PGS001229_22.txt").read_text().splitlines():
        cells = line.split("\t")
        if not line.startswith("#") and cells[0] != "rsID":
            weights[int(cells[2])] = (cells[3], cells[4], float(cells[5]))
    expected, used = np.zeros(people), 0
    for (_, _, _, pos, first, second), code in zip(bim, codes, strict=True):
        effect, other, weight = weights.get(int(pos), ("", "", 0.0))
        if {effect, other} != {first, second} or {first, second} in ({"A", "T"}, {"C", "G"}):
            continue
        count = np.select([code == 0, code == 2, code == 3], [2.0, 1.0, 0.0], np.nan)
        count = np.where(np.isnan(count), np.nanmean(count), count)
        expected += weight * (count if effect == first else 2 - count)
        used += 1
    assert len(values) == 2504
    assert used == why["matched"] > 700
    assert np.abs(values - expected).max() < 1e-6
