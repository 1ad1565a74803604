import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest

import common.cli
from common.commands import execute
from common.errors import UserError
from common.sweeps import results, runner
from common.sweeps.progress import Progress

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

    def execute(arguments, name=None):
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
    monkeypatch.chdir(tmp_path)
    return path, calls


def run_study(path, *more):
    execute(["study", str(path), "--data", "/archive", *more])


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
    lines = results.table(json.loads((tmp_path / "result.json").read_text())).splitlines()
    assert lines[0] == "| arm | scored on | Dice | Never | samples | training TFLOP | training s | paper |"
    assert lines[2] == "| short | one | 0.55 ± 0.07 | not run | 0 | 0 | 0 | - |"
    assert lines[3] == "| long | one | 0.55 ± 0.07 | not run | 10 | 5 | 2 | 0.9 |"


def test_tables_in_a_readme_are_made_from_the_results(experiment, tmp_path):
    path, _ = experiment
    run_study(path, "--out", str(tmp_path / "result.json"))
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- results: result.json -->\nold\n<!-- end -->\nafter\n")
    text = results.update_readme(readme)
    assert text.startswith("before\n<!-- results: result.json -->\n| arm |")
    assert text.endswith("\n<!-- end -->\nafter\n")
    assert "old" not in text
    readme.write_text(text)
    assert results.update_readme(readme) == text


def test_one_arm_alone(experiment, tmp_path):
    path, calls = experiment
    run_study(path, "--arms", "short", "--out", str(tmp_path / "result.json"))
    assert len(calls) == 2
    with pytest.raises(UserError, match="no arm 'shrt'; it has short, long"):
        run_study(path, "--arms", "shrt")


def test_a_missing_study_and_a_silent_arm_are_refused(experiment):
    path, _ = experiment
    with pytest.raises(UserError, match="does not exist"):
        runner.read_study(Path("gone.yaml"))
    path.write_text(STUDY.replace(", score: one}]", "}]"))
    with pytest.raises(UserError, match="short has no step with a score"):
        runner.read_study(path)


FOLDS = """
title: Folds
columns: {auroc: AUROC, auroc_low: from, auroc_high: to}
seeds: [0]
folds: 2
pool: {score: score_x, target: target_x}
config: [pretrain.yaml]
arms:
  one:
    - {run: fit, name: first, args: ["--data.split.fold={fold}", "--seed_everything={seed}"]}
    - {run: test, args: ["--ckpt_path={first}", "--seed_everything={seed}"], score: held-out folds}
"""


def test_folds_are_pooled_by_rank(experiment, tmp_path, monkeypatch):
    path, calls = experiment
    path.write_text(FOLDS)
    plain = runner.run_arm

    def run_arm(steps, configs, places, columns, progress):
        rows = plain(steps, configs, places, columns, progress)
        fold = int(places["fold"])
        # The second fold's scores are all higher, which must not matter.
        lines = [f"s{fold}{i},p{fold}{i},{fold * 10 + i},{int(i >= 3)}" for i in range(6)]
        header = "subject_id,patient_id,score_x,target_x"
        (rows[0]["folder"] / "per_case.csv").write_text("\n".join([header, *lines, f"u{fold},p,3,"]))
        return rows

    monkeypatch.setattr(runner, "run_arm", run_arm)
    run_study(path, "--out", str(tmp_path / "result.json"))
    folds = [next(a for a in c if a.startswith("--data.split.fold")) for c in calls[::2]]
    assert folds == ["--data.split.fold=0", "--data.split.fold=1"]
    metrics = json.loads((tmp_path / "result.json").read_text())["rows"][0]["metrics"]
    assert metrics["auroc"] == metrics["auroc_folds"] == 1.0
    assert metrics["cases"] == 12


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

    def execute(arguments, name=None):
        folder = fitted(arguments, name)
        seed = 1.0 if "--seed_everything=1" in arguments else 0.0
        pd.DataFrame({"without": ["t1", "t2"], "dice": [0.5, seed], "n": 2}).to_csv(folder / "sets.csv", index=False)
        return folder

    monkeypatch.setattr("common.cli.execute", execute)
    path.write_text(STUDY + "breakdown: {file: sets.csv, by: without, columns: {dice: Dice}}\n")
    run_study(path, "--out", str(tmp_path / "result.json"))
    table = results.table(json.loads((tmp_path / "result.json").read_text())).splitlines()
    assert table[-4:] == [
        "| without | Dice, short | Dice, long |",
        "|---|---|---|",
        "| t1 | 0.50 ± 0.00 | 0.50 ± 0.00 |",
        "| t2 | 0.50 ± 0.71 | 0.50 ± 0.71 |",
    ]


def answers(folder, right):
    """Write the cases of a scored run."""
    pd.DataFrame({"subject_id": range(4), "patient_id": [0, 0, 1, 1], "right": right}).to_csv(folder / "per_case.csv")


@pytest.fixture
def compared(experiment, monkeypatch):
    """The study with a comparison of its arms, case by case."""
    path, calls = experiment
    fitted = common.cli.execute

    def execute(arguments, name=None):
        folder = fitted(arguments, name)
        seed = int("--seed_everything=1" in arguments)
        answers(folder, [1, 0, 1, seed] if arguments[0] == "test" else [0, seed, 1, 0])
        return folder

    monkeypatch.setattr("common.cli.execute", execute)
    path.write_text(
        STUDY + "paired: {title: long minus, reference: long, score: one, value: right, unit: patient_id}\n"
    )
    return path, calls


def test_parts_of_a_study_become_what_one_call_gives(compared, tmp_path):
    path, calls = compared
    whole, first, second, both = (tmp_path / f"{name}.json" for name in ("whole", "first", "second", "both"))
    run_study(path, "--out", str(whole))
    run_study(path, "--out", str(second), "--seeds", "1")
    run_study(path, "--out", str(first), "--seeds", "0", "--arms", "long")
    third = tmp_path / "third.json"
    run_study(path, "--out", str(third), "--seeds", "0", "--arms", "short")
    count = len(calls)
    run_study(path, "--out", str(both), "--merge", str(second), str(first), str(third))
    assert len(calls) == count, "nothing was run"
    wanted, found = json.loads(whole.read_text()), json.loads(both.read_text())
    assert found["command"].split(" && ")[1].endswith("try.yaml --data DATA --arms long --seeds 0")
    for name in ("title", "columns", "summary", "intervals", "paired"):
        assert found[name] == wanted[name]
    assert [row["arm"] for row in found["rows"]] == ["short", "long"] * 2


def test_parts_that_do_not_fit_are_refused(compared, tmp_path):
    path, _ = compared
    first, second, both = (str(tmp_path / f"{name}.json") for name in ("first", "second", "both"))
    run_study(path, "--out", first, "--seeds", "0")
    run_study(path, "--out", second, "--seeds", "1")

    def change(**more):
        result = json.loads(Path(second).read_text())
        Path(second).write_text(json.dumps(result | more))

    with pytest.raises(UserError, match=r"first\.json holds 'short' with seed 0, and so does a part before it"):
        run_study(path, "--out", both, "--merge", first, first)
    with pytest.raises(UserError, match=r"no result at .*gone\.json"):
        run_study(path, "--out", both, "--merge", first, str(tmp_path / "gone.json"))
    environment = json.loads(Path(second).read_text())["environment"]
    change(environment=environment | {"commit": "another"})
    with pytest.raises(UserError, match=r"second\.json and .*first\.json were made with different commit"):
        run_study(path, "--out", both, "--merge", first, second)
    change(environment=environment, columns={})
    with pytest.raises(UserError, match=r"second\.json is not a result of this study, or the study has changed"):
        run_study(path, "--out", both, "--merge", first, second)
    Path(second).write_text("{")
    with pytest.raises(UserError, match=r"second\.json is not a result of medmim study: Expecting"):
        run_study(path, "--out", both, "--merge", first, second)
    run = Path(json.loads(Path(first).read_text())["rows"][1]["folder"])
    run.rename(run.with_name("moved"))
    with pytest.raises(UserError, match=r"the run folder of 'long' with seed 0 is not there .* run that arm again"):
        run_study(path, "--out", both, "--merge", first)
    assert not Path(both).exists()


def test_a_result_is_not_written_over_by_one_that_lacks_some_of_it(experiment, tmp_path):
    path, calls = experiment
    out = str(tmp_path / "result.json")
    run_study(path, "--out", out, "--arms", "long")
    count = len(calls)
    with pytest.raises(UserError, match=r"result\.json holds 'long' with seed 0, which would be lost: name"):
        run_study(path, "--out", out, "--arms", "short")
    assert len(calls) == count, "said before anything is run"
    run_study(path, "--out", out)
    assert {row["arm"] for row in json.loads(Path(out).read_text())["rows"]} == {"short", "long"}


def test_a_study_that_was_stopped_goes_on(experiment, tmp_path, monkeypatch):
    path, calls = experiment
    plain = common.cli.execute

    def stopped(arguments, name=None):
        if len(calls) == 1:
            (tmp_path / f"runs/e/pretrain/{name}/checkpoints").mkdir(parents=True)
            (tmp_path / f"runs/e/pretrain/{name}/checkpoints/last.ckpt").touch()
            raise KeyboardInterrupt
        return plain(arguments, name)

    monkeypatch.setattr("common.cli.execute", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_study(path, "--out", str(tmp_path / "result.json"))
    monkeypatch.setattr("common.cli.execute", plain)
    run_study(path, "--out", str(tmp_path / "result.json"))
    assert [c[0] for c in calls] == ["validate", "fit", "test", "validate", "fit", "test"], (
        "the first was not run again"
    )
    assert calls[1][-1].startswith("--ckpt_path=runs/e/pretrain/study_"), "the fit went on from its checkpoint"
    assert not any(word.startswith("--ckpt_path=runs") for word in calls[4]), "that of another seed began anew"
    count = len(calls)
    run_study(path, "--out", str(tmp_path / "result.json"))
    assert len(calls) == count
    monkeypatch.setattr("common.sweeps.progress.source_digest", lambda: "other code")
    run_study(path, "--out", str(tmp_path / "result.json"))
    assert len(calls) == 2 * count


def test_what_a_study_needs_is_said_and_nothing_lands_in_the_package(experiment, tmp_path):
    path, _ = experiment
    with pytest.raises(UserError, match="needs a study file, such as experiments/e_mim"):
        execute(["study"])
    with pytest.raises(UserError, match=r"try\.yaml also needs --data FOLDER"):
        execute(["study", str(path)])
    run_study(path)
    (result,) = (tmp_path / "runs/e/study_try").glob("try_*.json")
    assert json.loads(result.read_text())["rows"]
    assert not (path.parent.parent.parent / "results").exists()


def test_jobs_that_need_the_same_command_wait_for_one_run_of_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls = []

    def execute(words, name):
        calls.append(words)
        time.sleep(0.3)
        (tmp_path / "run").mkdir()
        return tmp_path / "run"

    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(Progress(tmp_path / "study").run, ["fit", "--x"], execute) for _ in range(2)]
    assert [job.result() for job in jobs] == [tmp_path / "run"] * 2
    assert len(calls) == 1
