import json
from pathlib import Path

import pytest

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
        summary = {"samples": 10, "train_seconds": 2.0, "flops_per_sample": 5e11, "scalars": {}}
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
