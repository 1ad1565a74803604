import json

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from common import commands
from common.errors import DataError
from datamodules.genetics.association import (
    associate,
    clump,
    combined_p,
    inverse_normal,
    linear_association,
    standardised,
)
from datamodules.genetics.genotypes import open_genotypes
from datamodules.synthetic.fundus import People, write_bed


@pytest.fixture(scope="module")
def people():
    return People(400, seed=0, variants=320, causal=2)


@pytest.fixture(scope="module")
def genotypes(people, tmp_path_factory):
    prefix = tmp_path_factory.mktemp("genotypes") / "g"
    write_bed(prefix, [str(i) for i in range(400)], people.variants, people.counts)
    return open_genotypes(str(prefix))


def test_inverse_normal_and_combination_by_hand():
    """Case 9 of the specification."""
    assert inverse_normal(np.array([3.0, 1, 2, 2])).tolist() == pytest.approx([1.0491314, -1.0491314, 0, 0], abs=1e-7)
    p = np.array([[1e-9, 0.5], [3e-8, 0.2], [0.04, 0.6]])
    assert combined_p(p).tolist() == pytest.approx([2e-9, 6e-8, 0.08])


def test_linear_model_equals_a_whole_regression(genotypes, people):
    rng = np.random.default_rng(0)
    covariates, outcome = rng.normal(size=(400, 3)), rng.normal(size=(400, 2))
    tested = linear_association(genotypes, np.arange(400), outcome, covariates)
    for variant in (0, 17, 200):
        design = np.column_stack([people.counts[:, variant], np.ones(400), covariates]).astype(float)
        for component in range(2):
            beta, *_ = np.linalg.lstsq(design, outcome[:, component], rcond=None)
            rest = outcome[:, component] - design @ beta
            error = np.sqrt(rest @ rest / (400 - 5) * np.linalg.inv(design.T @ design)[0, 0])
            assert tested.beta[variant, component] == pytest.approx(beta[0], rel=1e-8)
            assert tested.p[variant, component] == pytest.approx(2 * stats.t.sf(abs(beta[0] / error), 395), rel=1e-6)


def test_clumps_by_hand():
    rng = np.random.default_rng(0)
    base = rng.normal(size=500)
    dosage = np.column_stack([base, base + 0.1 * rng.normal(size=500), rng.normal(size=500), base, base])
    dosage = (dosage - dosage.mean(0)) / dosage.std(0)
    variants = pd.DataFrame({"chrom": ["1", "1", "1", "1", "2"], "pos": [1000, 2000, 3000, 900_000, 1000]})
    p = np.array([1e-10, 1e-9, 1e-9, 1e-8, 9e-8])
    found = clump(p, variants, dict(enumerate(dosage.T)))
    assert [(entry.lead, entry.members) for entry in found] == [(0, [1]), (2, []), (3, [])]
    assert clump(np.full(5, 0.5), variants, {}) == []


def features(people, rng, strength=1.5):
    """Image features that hold what the first causal variant does, among others that hold nothing."""
    cause = standardised(people.counts[:, people.causal[:1]].astype(np.float32))[:, 0]
    return np.column_stack([4 * (strength * cause + rng.normal(size=400)), rng.normal(size=(400, 4))])


def test_the_planted_region_is_found_and_nothing_else(genotypes, people):
    found = associate(features(people, np.random.default_rng(0)), genotypes.ids, genotypes, components=3, relatives=[])
    regions = [entry.lead for entry in found.clumps]
    assert people.causal[0] // 8 in [index // 8 for index in regions]
    assert all(abs(index - people.causal[0]) < 8 for index in regions)
    assert len(found.inflation) == 3
    assert 0.7 < found.inflation[1] < 1.4
    shuffled = np.random.default_rng(1).permutation(features(people, np.random.default_rng(0)))
    assert associate(shuffled, genotypes.ids, genotypes, components=3, relatives=[]).clumps == []


def test_persons_join_by_name_each_once_and_covariates_must_be_whole(genotypes, people):
    values = features(people, np.random.default_rng(0))
    ids = [*genotypes.ids[:300], *genotypes.ids[:50], *(f"x{i}" for i in range(50))]
    covariates = pd.DataFrame({"age": np.arange(400.0)}, index=genotypes.ids)
    covariates.loc["7", "age"] = np.nan
    found = associate(values, ids, genotypes, covariates, components=2, relatives=[("1", "2")])
    assert (found.persons, found.relatives) == (298, 1)
    with pytest.raises(DataError, match="Nobody has both"):
        associate(values, [f"y{i}" for i in range(400)], genotypes)


def test_command(genotypes, people, tmp_path, capsys):
    values = features(people, np.random.default_rng(0))
    table = pd.DataFrame({"subject_id": genotypes.ids, "split": "test", "feature": list(values)})
    table.to_parquet(tmp_path / "f.parquet")
    commands.main(["associate", "--features", str(tmp_path / "f.parquet"), "--genotypes",
                   str(genotypes.paths[0]), "--components", "2", "--out", str(tmp_path / "out")])  # fmt: skip
    facts = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert facts["regions"] >= 1
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "associations.csv", "regions.csv", "summary.json", "manhattan.png", "qq.png"}  # fmt: skip
    assert "independent regions" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        commands.main(["associate", "--features", str(tmp_path / "f.parquet"), "--genotypes",
                       str(genotypes.paths[0]), "--split", "val", "--out", str(tmp_path / "out")])  # fmt: skip


@pytest.mark.real_data
def test_hapmap_with_a_planted_effect_and_with_permuted_phenotypes(real_data):
    """The planted region is found; permuted, false positives keep to their level over the LD-pruned variants."""
    genotypes = open_genotypes(str(real_data("hapmap3_plink") / "HM3_thinned_autosomal_overlap"))
    counts = genotypes.counts()
    rng = np.random.default_rng(0)
    planted = 5000
    assert 0.2 < np.nanmean(counts[:, planted]) / 2 < 0.8
    cause = standardised(counts[:, [planted]])[:, 0]
    trait = np.column_stack([3 * (0.8 * cause + rng.normal(size=len(cause))), rng.normal(size=(len(cause), 3))])
    options = {"components": 1, "genetic": 10, "relatives": None}
    found = associate(trait, genotypes.ids, genotypes, **options)
    assert planted in [entry.lead for entry in found.clumps]
    chrom, pos = genotypes.variants["chrom"], genotypes.variants["pos"]
    for entry in found.clumps:
        assert chrom[entry.lead] == chrom[planted]
        assert abs(pos[entry.lead] - pos[planted]) < 5_000_000
    permuted = associate(rng.permutation(trait), genotypes.ids, genotypes, **options)
    assert permuted.clumps == []
    p = permuted.table["p"].to_numpy()
    for level in (0.05, 0.01):
        low, high = stats.binom.interval(0.99, len(p), level)
        assert low <= (p < level).sum() <= high
    assert 0.9 < permuted.inflation[0] < 1.1
