import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import cohen_kappa_score, roc_auc_score

import common.cli
from common import study
from common.errors import UserError

STUDY = """
title: A try
columns: {dice: Dice, missing: Never}
digits: 2
seeds: [0, 1]
config: [pretrain.yaml]
args: ["--data.root={data}", "--seed_everything={seed}"]
paper: {long: "0.9"}
arms:
  short: [{run: validate, score: one}]
  long:
    - {run: fit, name: first, config: [small.yaml]}
    - {run: test, args: ["--ckpt_path={first}"], score: one}
"""


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    """An experiment folder with a study, and a command that only writes results."""
    configs = tmp_path / "e" / "configs"
    (configs / "studies").mkdir(parents=True)
    path = configs / "studies/try.yaml"
    path.write_text(STUDY)
    calls = []

    def execute(arguments):
        calls.append(arguments)
        folder = tmp_path / f"run{len(calls)}"
        folder.mkdir()
        seed = int(next(a for a in arguments if a.startswith("--seed")).partition("=")[2])
        summary = {"samples": 10, "train_seconds": 2.0, "flops_per_sample": 5e11,
                   "scalars": {"rank": {"final": 7.0}} if arguments[0] == "fit" else {}}  # fmt: skip
        (folder / "summary.json").write_text(json.dumps(summary))
        if arguments[0] != "fit":
            (folder / "metrics.json").write_text(json.dumps({"dice": {"mean": 0.5 + seed / 10}, "n": 3}))
        return folder

    monkeypatch.setattr("common.cli.execute", execute)
    return path, calls


def run_study(path, *more):
    parser = study.argparse.ArgumentParser()
    study.add_arguments(parser)
    study.run(parser.parse_args([str(path), "--data", "/archive", *more]))


def test_arms_run_once_per_seed_and_share_their_arguments(experiment, tmp_path):
    path, calls = experiment
    run_study(path, "--out", str(tmp_path / "result.json"))
    assert [c[0] for c in calls] == ["validate", "fit", "test"] * 2
    assert all("--data.root=/archive" in c for c in calls)
    assert [c.count("--config") for c in calls[:3]] == [1, 2, 1]
    assert f"--ckpt_path={tmp_path / 'run2'}" in calls[2]
    result = json.loads((tmp_path / "result.json").read_text())
    entry = result["summary"][1]
    assert entry["dice"] == {"mean": 0.55, "std": pytest.approx(0.0707107), "n": 2}
    assert entry["cost"] == {"samples": 10, "train_seconds": 2, "flops_per_sample": 5e11}
    assert result["rows"][0]["seed"] == 0


def test_the_table_says_what_was_not_run(experiment, tmp_path):
    path, _ = experiment
    run_study(path, "--out", str(tmp_path / "result.json"))
    lines = study.table(json.loads((tmp_path / "result.json").read_text())).splitlines()
    assert lines[0] == "| arm | scored on | Dice | Never | samples | training TFLOP | training s | paper |"
    assert lines[2] == "| short | one | 0.55 ± 0.07 | not run | 0 | 0 | 0 | - |"
    assert lines[3] == "| long | one | 0.55 ± 0.07 | not run | 10 | 5 | 2 | 0.9 |"


def test_tables_in_a_readme_are_made_from_the_results(experiment, tmp_path):
    path, _ = experiment
    run_study(path, "--out", str(tmp_path / "result.json"))
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- results: result.json -->\nold\n<!-- end -->\nafter\n")
    text = study.update_readme(readme)
    assert text.startswith("before\n<!-- results: result.json -->\n| arm |")
    assert text.endswith("\n<!-- end -->\nafter\n")
    assert "old" not in text
    readme.write_text(text)
    assert study.update_readme(readme) == text


def test_one_arm_alone(experiment, tmp_path):
    path, calls = experiment
    run_study(path, "--arms", "short", "--out", str(tmp_path / "result.json"))
    assert len(calls) == 2
    with pytest.raises(UserError, match="no arm 'shrt'; it has short, long"):
        run_study(path, "--arms", "shrt")


def test_a_missing_study_and_a_silent_arm_are_refused(experiment):
    path, _ = experiment
    with pytest.raises(UserError, match="does not exist"):
        study.read_study(Path("gone.yaml"))
    path.write_text(STUDY.replace(", score: one}]", "}]"))
    with pytest.raises(UserError, match="short has no step with a score"):
        study.read_study(path)


FOLDS = """
title: Folds
columns: {auroc: AUROC, auroc_low: from, auroc_high: to}
seeds: [0]
folds: 2
pool: {score: score_x, target: target_x}
config: [pretrain.yaml]
arms:
  one:
    - {run: fit, name: first, args: ["--data.fold={fold}", "--seed_everything={seed}"]}
    - {run: test, args: ["--ckpt_path={first}", "--seed_everything={seed}"], score: held-out folds}
"""


def test_folds_are_pooled_by_rank(experiment, tmp_path, monkeypatch):
    path, calls = experiment
    path.write_text(FOLDS)
    plain = study.run_arm

    def run_arm(steps, configs, places, columns, done=None):
        rows = plain(steps, configs, places, columns)
        fold = int(places["fold"])
        # The second fold's scores are all higher, which must not matter.
        lines = [f"s{fold}{i},p{fold}{i},{fold * 10 + i},{int(i >= 3)}" for i in range(6)]
        header = "subject_id,patient_id,score_x,target_x"
        (rows[0]["folder"] / "per_case.csv").write_text("\n".join([header, *lines, f"u{fold},p,3,"]))
        return rows

    monkeypatch.setattr(study, "run_arm", run_arm)
    run_study(path, "--out", str(tmp_path / "result.json"))
    assert [next(a for a in c if a.startswith("--data.fold")) for c in calls[::2]] == ["--data.fold=0", "--data.fold=1"]
    metrics = json.loads((tmp_path / "result.json").read_text())["rows"][0]["metrics"]
    assert metrics["auroc"] == metrics["auroc_folds"] == 1.0
    assert metrics["cases"] == 12


def test_an_interval_of_noise_holds_one_half():
    generator = np.random.default_rng(0)
    persons = pd.Series(np.repeat(np.arange(60), 2))
    target, score = pd.Series(generator.integers(0, 2, 120)), pd.Series(generator.random(120))
    low, high = study.bootstrap_auroc(score, target, persons)
    assert low < 0.5 < high
    slow = []
    for _ in range(300):
        drawn = generator.integers(0, 60, 60)
        chosen = np.concatenate([np.flatnonzero(persons == person) for person in drawn])
        slow.append(roc_auc_score(target[chosen], score[chosen]))
    assert np.percentile(slow, [2.5, 97.5]) == pytest.approx([low, high], abs=0.04)
    assert (low, high) == study.bootstrap_auroc(score, target, persons)


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
    comparison = study.Comparison("full minus", "patient_id", "full", "test", value="right")
    result = study.compare(rows, comparison)
    (entry,) = result["paired"]
    assert entry["arm"] == "less"
    assert entry["mean"] == 0.25
    assert entry["low"] == 0
    assert entry["high"] == 0.5
    assert [(e["arm"], e["mean"]) for e in result["intervals"]] == [("full", 0.625), ("less", 0.375), ("elsewhere", 1)]
    with pytest.raises(UserError, match="mean or quadratic_kappa, got 'median'"):
        study.Comparison("", "patient_id", "full", "test", metric="median")


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
    comparison = study.Comparison("good minus", "patient_id", "good", "test", metric="quadratic_kappa")
    result = study.compare(rows, comparison)

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
    assert [entry["low"], entry["high"]] == pytest.approx(np.percentile(slow["gap"], [2.5, 97.5]), abs=0.04)


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
    gain = study.Comparison("gain", "patient_id", value="right", baseline="frequent_right", where={"kind": "closed"})
    (entry,) = study.compare(rows, gain)["intervals"]
    assert entry == {"arm": "full", "score": "test", "seeds": [0, 1], "mean": 0.5, "low": 0.5, "high": 0.5}
    (alone,) = study.compare(rows[:1], gain)["intervals"]
    assert (alone["mean"], alone["low"], alone["high"]) == (0.5, 0, 1)
    (everything,) = study.compare(rows, replace(gain, where={}))["intervals"]
    assert everything["mean"] == pytest.approx(0.6)
    folder = tmp_path / "1" / "per_case.csv"
    folder.write_text(folder.read_text().replace("q0,", "q9,"))
    assert study.compare(rows, gain) == {"intervals": [], "paired": []}
    assert "same cases" in capsys.readouterr().out


def test_arms_that_begin_alike_share_their_beginning(experiment, tmp_path):
    path, calls = experiment
    again = "  again:\n    - {run: fit, name: first, config: [small.yaml]}\n    - {run: validate, score: two}\n"
    path.write_text(STUDY + again)
    run_study(path, "--out", str(tmp_path / "result.json"), "--seeds", "1")
    assert [c[0] for c in calls] == ["validate", "fit", "test"], "the fit and the validation were run before"
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert [row["arm"] for row in rows] == ["short", "long", "again"]


def test_what_stands_beside_later_scores(experiment, tmp_path):
    path, _ = experiment
    path.write_text(STUDY.replace("config: [small.yaml]}", "config: [small.yaml], beside: [rank]}"))
    run_study(path, "--out", str(tmp_path / "result.json"), "--seeds", "0")
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert [row["metrics"] for row in rows] == [{"dice": 0.5}, {"rank": 7.0, "dice": 0.5}]


def test_a_table_of_the_runs_stands_with_the_arms_side_by_side(experiment, tmp_path, monkeypatch):
    path, _ = experiment
    fitted = common.cli.execute

    def execute(arguments):
        folder = fitted(arguments)
        seed = 1.0 if "--seed_everything=1" in arguments else 0.0
        pd.DataFrame({"without": ["t1", "t2"], "dice": [0.5, seed], "n": 2}).to_csv(folder / "sets.csv", index=False)
        return folder

    monkeypatch.setattr("common.cli.execute", execute)
    path.write_text(STUDY + "breakdown: {file: sets.csv, by: without, columns: {dice: Dice}}\n")
    run_study(path, "--out", str(tmp_path / "result.json"))
    table = study.table(json.loads((tmp_path / "result.json").read_text())).splitlines()
    assert table[-4:] == [
        "| without | Dice, short | Dice, long |",
        "|---|---|---|",
        "| t1 | 0.50 ± 0.00 | 0.50 ± 0.00 |",
        "| t2 | 0.50 ± 0.71 | 0.50 ± 0.71 |",
    ]
