from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import cohen_kappa_score

from common.errors import UserError
from common.sweeps import results
from common.sweeps.inference import difference_of


def test_arms_are_compared_case_by_case(tmp_path):
    """Two seeds; the reference is right where the other is wrong in one case of four, of two images."""
    rows = []
    for seed, arms in enumerate(
        ({"full": [1, 1, 0, 1], "less": [1, 0, 0, 1]}, {"full": [1, 1, 0, 0], "less": [0, 1, 0, 0]})
    ):
        for arm, right in arms.items():
            folder = tmp_path / f"{arm}{seed}"
            folder.mkdir()
            order = [3, 1, 0, 2] if arm == "less" else range(4)
            lines = [f"q{i},i{i // 2},{right[i]}" for i in order]
            (folder / "per_case.csv").write_text("\n".join(["subject_id,patient_id,right", *lines]))
            rows.append({"arm": arm, "score": "test", "seed": seed, "folder": folder})
    other = tmp_path / "other"
    other.mkdir()
    (other / "per_case.csv").write_text("subject_id,patient_id,right\nx,y,1")
    rows += [{"arm": "elsewhere", "score": "test", "seed": seed, "folder": other} for seed in (0, 1)]
    comparison = results.Comparison("full minus", "patient_id", "full", "test", value="right")
    result = results.compare(rows, comparison)
    (entry,) = result["paired"]
    assert entry["arm"] == "less"
    assert entry["mean"] == 0.25
    # Two patients, 0.5 and 0 apart, and equal seeds: the standard error is 0.25 x sqrt(1 / 2).
    assert [entry["low"], entry["high"]] == pytest.approx([0.25 - 0.3465, 0.25 + 0.3465], abs=0.02)
    assert entry["p_holm"] == pytest.approx(0.157, abs=0.03)
    assert entry["verdict"] == "not told apart"
    assert [(e["arm"], e["mean"]) for e in result["intervals"]] == [("full", 0.625), ("less", 0.375), ("elsewhere", 1)]
    with pytest.raises(UserError, match="mean or quadratic_kappa, got 'median'"):
        results.Comparison("", "patient_id", "full", "test", metric="median")


def test_kappas_are_compared_on_the_same_resampling(tmp_path):
    """Against resampling case by case with scikit-learn's kappa."""
    generator = np.random.default_rng(0)
    truth = np.repeat(np.arange(4), 10)
    rows, grades = [], {}
    for arm, noise in (("good", 1), ("bad", 3)):
        for seed in (0, 1):
            pred = np.clip(truth + generator.integers(-noise, noise + 1, len(truth)), 0, 4)
            grades[arm, seed] = pred
            order = generator.permutation(len(truth))
            folder = tmp_path / f"{arm}{seed}"
            folder.mkdir()
            frame = pd.DataFrame({"subject_id": order, "patient_id": order // 2, "pred": pred[order],
                                  "target": truth[order]})  # fmt: skip
            frame.to_csv(folder / "per_case.csv", index=False)
            rows.append({"arm": arm, "score": "test", "seed": seed, "folder": folder})
    comparison = results.Comparison("good minus", "patient_id", "good", "test", metric="quadratic_kappa")
    result = results.compare(rows, comparison)

    def kappa_of(arm, seed):
        return cohen_kappa_score(truth, grades[arm, seed], weights="quadratic")

    def kappa(arm, cases):
        parts = [cohen_kappa_score(truth[cases], grades[arm, s][cases], weights="quadratic") for s in (0, 1)]
        return sum(parts) / 2

    whole = np.arange(len(truth))
    assert [entry["mean"] for entry in result["intervals"]] == pytest.approx([kappa(a, whole) for a in ("good", "bad")])
    (entry,) = result["paired"]
    assert entry["mean"] == pytest.approx(kappa("good", whole) - kappa("bad", whole))
    slow: dict[str, list[float]] = {"good": [], "gap": []}
    for _ in range(600):
        persons = generator.integers(0, 20, 20)
        cases = np.concatenate([np.flatnonzero(whole // 2 == person) for person in persons])
        one, other = kappa("good", cases), kappa("bad", cases)
        slow["good"].append(one)
        slow["gap"].append(one - other)
    expected = np.percentile(slow["good"], [2.5, 97.5])
    assert [result["intervals"][0][name] for name in ("low", "high")] == pytest.approx(expected, abs=0.02)
    gaps = [kappa_of("good", seed) - kappa_of("bad", seed) for seed in (0, 1)]
    expected = difference_of(gaps, float(np.std(slow["gap"], ddof=1)))
    assert entry["p_holm"] == pytest.approx(expected.p, abs=0.05)
    assert entry["high"] - entry["low"] == pytest.approx(expected.high - expected.low, rel=0.1)


def test_the_gain_over_a_baseline_is_of_the_mean_over_seeds(tmp_path, capsys):
    """Each seed alone gains on one image and loses on the other; their mean gains one half on both, so the interval
    of the mean is a point, which no mean of the seeds' intervals is.
    """
    rows = []
    for seed, right in enumerate(([1, 1, 0, 0, 1], [0, 0, 1, 1, 1])):
        folder = tmp_path / str(seed)
        folder.mkdir()
        lines = [
            f"q{i},i{i // 2},{'open' if i == 4 else 'closed'},{right[i]},0" for i in (range(5), [3, 1, 4, 0, 2])[seed]
        ]
        (folder / "per_case.csv").write_text("\n".join(["subject_id,patient_id,kind,right,frequent_right", *lines]))
        rows.append({"arm": "full", "score": "test", "seed": seed, "folder": folder})
    gain = results.Comparison("gain", "patient_id", value="right", baseline="frequent_right", where={"kind": "closed"})
    (entry,) = results.compare(rows, gain)["intervals"]
    assert entry == {"arm": "full", "score": "test", "seeds": [0, 1], "mean": 0.5, "low": 0.5, "high": 0.5}
    (alone,) = results.compare(rows[:1], gain)["intervals"]
    assert (alone["mean"], alone["low"], alone["high"]) == (0.5, 0, 1)
    (everything,) = results.compare(rows, replace(gain, where={}))["intervals"]
    assert everything["mean"] == pytest.approx(0.6)
    folder = tmp_path / "1" / "per_case.csv"
    folder.write_text(folder.read_text().replace("q0,", "q9,"))
    assert results.compare(rows, gain) == {"intervals": [], "paired": []}
    assert "same cases" in capsys.readouterr().out
