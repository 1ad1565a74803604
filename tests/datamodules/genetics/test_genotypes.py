import numpy as np
import pandas as pd
import pytest

from common.errors import DataError
from datamodules.genetics.genome import GenomeFiles, Kind, pair_persons, read_genome
from datamodules.genetics.genotypes import MISSING, BgenFile, allele_frequencies, counts_of, open_genotypes
from datamodules.synthetic.fundus import write_bed

VARIANTS = pd.DataFrame({"chrom": ["1", "1"], "id": ["rs1", "rs2"], "pos": [10, 20], "counted": ["A", "C"],
                         "other": ["G", "T"]})  # fmt: skip


@pytest.fixture
def triple(tmp_path):
    """Case 8 of the specification, byte by byte."""
    (tmp_path / "three.bed").write_bytes(bytes.fromhex("6c1b013807"))
    (tmp_path / "three.bim").write_text("1 rs1 0 10 A G\n01\trs2\t0\t20\tC\tT\n")
    (tmp_path / "three.fam").write_text("".join(f"{n} {n} 0 0 0 Batch_b001\n" for n in ("a", "b", "c")))
    return tmp_path / "three"


def test_bytes_by_hand(triple):
    genotypes = open_genotypes(str(triple))
    assert genotypes.ids == ["a", "b", "c"]
    assert np.array_equal(genotypes.counts(), [[2, 0], [1, np.nan], [0, 2]], equal_nan=True)
    assert genotypes.variants["chrom"].tolist() == ["1", "1"]
    assert np.array_equal(genotypes.counts(np.array([2]), np.array([1])), [[2]])
    assert np.array_equal(open_genotypes(f"{triple}.bed", step=2).counts(), [[2], [1], [0]])
    assert allele_frequencies(genotypes.counts()).tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: p.with_suffix(".bed").write_bytes(b"\x6c\x1b\x00\x38\x07"), "variant-major"),
        (lambda p: p.with_suffix(".bed").write_bytes(bytes.fromhex("6c1b0138")), "has 4 bytes"),
        (lambda p: p.with_suffix(".fam").unlink(), "three.fam is missing"),
        (lambda p: p.with_suffix(".fam").write_text("a a\nb b\na a\n"), "1 people twice, first a"),
        (lambda p: p.with_suffix(".bim").write_text("1 rs1\n"), "line 1 has 2 words, and 6 are needed"),
    ],
)
def test_damaged_files_are_refused_in_a_sentence(triple, damage, words):
    damage(triple)
    with pytest.raises(DataError, match=words):
        open_genotypes(str(triple))


def test_where_there_is_nothing(tmp_path):
    with pytest.raises(DataError, match=r"no genotypes at .*nowhere"):
        open_genotypes(str(tmp_path / "nowhere"))


def test_chromosomes_are_joined_and_the_withdrawn_left_out(tmp_path):
    counts = np.array([[0, 1], [2, MISSING], [1, 1]], dtype=np.int8)
    for chromosome in (1, 22):
        write_bed(tmp_path / f"ukb_chr{chromosome}", ["-1", "7", "8"], VARIANTS.assign(chrom=str(chromosome)), counts)
    genotypes = open_genotypes("ukb_chr{chrom}", tmp_path)
    assert genotypes.ids == ["7", "8"]
    assert genotypes.withdrawn == 1
    assert genotypes.variants["chrom"].tolist() == ["1", "1", "22", "22"]
    assert np.array_equal(genotypes.counts(variants=np.array([1, 2])), [[np.nan, 2], [1, 1]], equal_nan=True)
    write_bed(tmp_path / "ukb_chr3", ["7", "8", "9"], VARIANTS, counts)
    with pytest.raises(DataError, match="list different people"):
        open_genotypes("ukb_chr{chrom}", tmp_path)


def test_bgen(tmp_path):
    bgen = pytest.importorskip("bgen")
    path = tmp_path / "ukb_hap_chr7_v2.bgen"
    with bgen.BgenWriter(str(path), 3, samples=["a", "b", "c"], layout=2, compression="zlib") as file:
        for pos, alleles in ((5, ["A", "G"]), (6, ["C", "T", "G"])):
            probabilities = np.zeros((3, 3 if len(alleles) == 2 else 6))
            probabilities[[0, 1, 2], [0, 1, 2]] = 1
            file.add_variant(f"v{pos}", f"rs{pos}", "", pos, alleles, probabilities, ploidy=2)
    genotypes = open_genotypes(str(path))
    assert genotypes.counts().tolist() == [[0], [1], [2]]
    assert genotypes.variants.iloc[0].tolist() == ["7", "rs5", 5, "G", "A"]
    assert genotypes._files[0].multi_allelic == 1
    assert genotypes.table().dtype == np.float32


@pytest.fixture
def many_variants(tmp_path):
    """5,000 variants of four people, two of them at one position; the last has no name but its own."""
    bgen = pytest.importorskip("bgen")
    path, generator = tmp_path / "ukb_chr7.bgen", np.random.default_rng(0)
    truth = generator.integers(0, 3, (4, 5000))
    with bgen.BgenWriter(str(path), 4, samples=list("abcd"), layout=2, compression="zlib") as file:
        for number in range(5000):
            probabilities = np.eye(3)[truth[:, number]]
            alleles = ["A", "GT" if number == 8 else "G"]
            name = "" if number == 4999 else f"rs{number}"
            file.add_variant(f"v{number}", name, "07", max(number, 1) if number != 8 else 7, alleles, probabilities,
                             ploidy=2)  # fmt: skip
    return path, truth


def test_bgen_visits_what_is_wanted_and_nothing_else(many_variants, monkeypatch, capsys):
    path, truth = many_variants
    indexed = open_genotypes(str(path))
    path.with_name("ukb_chr7.bgen.bgi").unlink()
    plain = open_genotypes(str(path))
    assert "bgenix -g ukb_chr7.bgen -index" in " ".join(capsys.readouterr())
    pd.testing.assert_frame_equal(indexed.variants, plain.variants)
    assert indexed.variants["id"].iloc[-1] == "v4999"
    visited = []
    at = BgenFile._at

    def counting(file, offsets):
        for variant in at(file, offsets):
            visited.append(variant.rsid)
            yield variant

    monkeypatch.setattr(BgenFile, "_at", staticmethod(counting))
    blocks = [indexed.counts(None, np.arange(start, min(start + 2048, 5000))) for start in (0, 2048, 4096)]
    assert len(visited) == 5000
    assert np.array_equal(np.concatenate(blocks, axis=1), truth)
    assert np.array_equal(plain.counts(), truth)
    assert np.array_equal(indexed.counts(np.array([2]), np.array([7, 8])), truth[[2], 7:9])


def test_an_index_of_another_file_is_refused(many_variants):
    path, _ = many_variants
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(DataError, match="belongs to another file than ukb_chr7"):
        open_genotypes(str(path))
    path.with_name("ukb_chr7.bgen.bgi").write_text("not a database, but long enough to be looked at" * 10)
    with pytest.raises(DataError, match="cannot be read as an index"):
        open_genotypes(str(path))


def kind(values, transform="genotype", ids=None):
    values = np.array(values, dtype=np.float32)
    names = [f"f{i}" for i in range(values.shape[1])]
    return Kind("snp", ids or list("abcdefgh"[: len(values)]), names, values, transform)


def test_statistics_are_those_of_training_persons_alone():
    """Case 9: [0, 1, 2, 1] has p = 0.5 and becomes [-1.414, 0, 1.414, 0]."""
    entry = kind([[0, 0], [1, 1], [2, 0], [1, 0], [2, 2]])
    entry.fit(["a", "b", "c", "d"])
    assert entry.read("a", 5)[0][0] == pytest.approx(-1.41421356)
    assert entry.read("c", 5)[0][0] == pytest.approx(1.41421356)
    again = kind([[0, 0], [1, 1], [2, 0], [1, 0], [0, 2]])
    again.fit(["a", "b", "c", "d"])
    assert np.array_equal(entry.mean, again.mean)
    assert np.array_equal(entry.scale, again.scale)


def test_what_is_missing_is_the_mean_and_is_counted():
    entry = kind([[0, 1, 2], [np.nan, 1, 2], [2, 1, np.nan], [np.nan] * 3])
    entry.fit(["a", "b", "c"])
    assert entry.features == ["f0"]
    assert entry.dropped == 2
    assert entry.imputed == 1
    assert [x.tolist() for x in entry.read("b", 5)] == [[0.0], [False]]
    assert [x.tolist() for x in entry.read("d", 5)] == [[0.0], [False]]
    assert [x.tolist() for x in entry.read(None, 5)] == [[0.0], [False]]
    assert "d" not in entry.rows


def test_calls_in_bytes_are_the_same_features():
    floats = kind([[0, 1, 2], [np.nan, 1, 0], [2, 0, np.nan], [np.nan] * 3])
    calls = Kind("snp", list("abcd"), list(floats.features), np.where(np.isnan(floats.values), MISSING, floats.values)
                 .astype(np.int8), "genotype")  # fmt: skip
    assert calls.rows == floats.rows
    for entry in (floats, calls):
        entry.fit(["a", "b", "c"])
    for person in "abcd":
        for one, two in zip(floats.read(person, 5), calls.read(person, 5), strict=True):
            assert np.array_equal(one, two)
    assert (calls.imputed, calls.dropped) == (floats.imputed, floats.dropped)


def test_other_transforms_and_their_limits():
    entry = kind([[1.0], [3.0], [1000.0]], "z_score")
    entry.fit(["a", "b"])
    assert [float(entry.read(name, 5)[0][0]) for name in "abc"] == [-1, 1, 5]
    logs = kind([[0.0], [np.e - 1]], "log_z_score")
    logs.fit(["a", "b"])
    assert [float(logs.read(name, 5)[0][0]) for name in "ab"] == pytest.approx([-1, 1], rel=1e-5)
    with pytest.raises(DataError, match="negative"):
        kind([[-1.0], [2.0]], "log_z_score").fit(["a", "b"])


@pytest.mark.parametrize(
    ("values", "training", "words"),
    [
        ([[1, 1], [1, 1]], ["a", "b"], "None of the 2 snp features varies"),
        ([[np.nan] * 2] * 2, ["a", "b"], "training people has snp"),
        ([[0, 1], [1, 0]], ["x"], "training people has snp"),
    ],
)
def test_genetics_without_any_use_are_refused(values, training, words):
    with pytest.raises(DataError, match=words):
        kind(values).fit(training)


def test_duplicate_persons_are_refused():
    with pytest.raises(DataError, match="a person twice"):
        kind([[0, 1], [1, 0]], ids=["a", "a"])


def test_strangers_are_paired_once_and_training_keeps_its_own():
    persons = [str(i) for i in range(9)]
    small = pair_persons({"p1": "train", "p2": "train"}, persons)
    large = pair_persons({"a": "val", "p1": "train", "p2": "train", "z": "test"}, persons)
    assert {name: large[name] for name in small} == small
    assert len(set(large.values())) == 4
    with pytest.raises(DataError, match="cannot be paired"):
        pair_persons({str(i): "train" for i in range(10)}, persons)


def test_scores_need_genotypes(tmp_path):
    with pytest.raises(DataError, match="applied to genotypes"):
        read_genome(GenomeFiles(scores=str(tmp_path)))


@pytest.mark.real_data
def test_hapmap(real_data):
    folder = real_data("hapmap3_plink")
    genome = read_genome(GenomeFiles(str(folder / "HM3_thinned_autosomal_overlap")))
    (snp,) = genome.kinds
    assert snp.values.shape == (957, 14079)
    assert snp.values.dtype == np.int8
    assert np.array_equal(counts_of(snp.values), open_genotypes(str(folder / "HM3_thinned_autosomal_overlap")).counts(),
                          equal_nan=True)  # fmt: skip
    genome.fit(snp.ids[:600])
    assert snp.imputed == int((snp.values[:600] == MISSING).sum())
    assert 0 < snp.imputed < 0.003 * 600 * 14079
    values, observed = genome.read(snp.ids[700])
    assert observed.mean() > 0.99
    assert abs(values).max() <= 5


def test_scores_are_applied_with_the_training_persons_frequencies(tmp_path):
    counts = np.array([[0, 1], [2, MISSING], [2, 1]], dtype=np.int8)
    write_bed(tmp_path / "g", ["a", "b", "c"], VARIANTS, counts)
    rows = ["rs1\tA\tG\t0", "rs2\tC\tT\t10"]
    (tmp_path / "s.txt").write_text("\n".join(["#pgs_id=X", "rsID\teffect_allele\tother_allele\teffect_weight", *rows]))
    files = GenomeFiles(str(tmp_path / "g"), scores=str(tmp_path / "s.txt"), step=2)
    snp, pgs = read_genome(files, training=["a", "b"]).kinds
    assert snp.features == ["1:10:rs1"]
    assert pgs.features == ["X"]
    assert pgs.values[:, 0].tolist() == [10, 10, 10]
    counts[2, 1] = 2
    write_bed(tmp_path / "g", ["a", "b", "c"], VARIANTS, counts)
    assert read_genome(files, training=["a", "b"]).kinds[1].values[:, 0].tolist() == [10, 10, 20]
    assert read_genome(files).kinds[1].values[:, 0].tolist() == [10, 15, 20]
