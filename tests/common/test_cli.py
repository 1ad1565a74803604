import errno
import json
import os
from pathlib import Path

import pytest
import yaml

from common.cli import execute, main, run_name
from common.commands import main as medmim
from common.errors import UserError

CONFIG = "experiments/e_mim/configs/pretrain.yaml"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["fit", "--config", CONFIG, "--config", "other.yaml"], ("e_mim", "pretrain")),
        (["fit", "--config=experiments/umd/configs/finetune_vqa.small.yaml"], ("umd", "finetune_vqa")),
        (["fit", "--config", "runs/e_mim/pretrain/2026-01-01_00-00-00/config.yaml"], ("e_mim", "pretrain")),
        (["fit", "--config", "mine.yaml"], ("e_mim", "run")),
        (["fit"], ("e_mim", "run")),
    ],
)
def test_run_name(arguments, expected):
    assert run_name(arguments, "experiments.e_mim.module.EMIMPretrain") == expected


def test_run_name_of_a_module_from_elsewhere():
    assert run_name(["fit"], "mine.Module") == ("custom", "run")


def test_a_run_leaves_a_complete_folder(pretrain_arguments):
    folder = execute(pretrain_arguments("--trainer.max_epochs=1"))
    assert folder.parts[:3] == ("runs", "e_mim", "pretrain")
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    expected = {"config.yaml", "environment.json", "metrics.csv", "summary.json", "data_faults.csv",
                "account.csv", "membership.csv", "checkpoints/last.ckpt", "checkpoints/best.ckpt"}  # fmt: skip
    assert expected <= files
    assert any(name.startswith("events.out.tfevents") for name in files)
    assert files - expected == {name for name in files if name.startswith("events.")}
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["model"]["init_args"]["taps"] == [1, 2]
    assert json.loads((folder / "summary.json").read_text())["status"] == "finished"


@pytest.mark.slow
def test_the_saved_configuration_runs_again(pretrain_arguments):
    folder = execute(pretrain_arguments("--trainer.max_epochs=1"))
    again = execute(["fit", "--config", str(folder / "config.yaml")])
    assert again != folder
    assert again.parent == folder.parent
    same = [json.loads((f / "summary.json").read_text())["scalars"]["train/loss"] for f in (folder, again)]
    assert same[0] == same[1]


@pytest.mark.slow
def test_names_in_the_log(pretrain_arguments):
    folder = execute(pretrain_arguments())
    scalars = json.loads((folder / "summary.json").read_text())["scalars"]
    wanted = {"train/loss", "train/loss_reconstruction", "train/loss_barlow_twins", "val/loss",
              "val/loss_reconstruction", "lr", "throughput/samples_per_second", "throughput/data_wait_fraction",
              "collapse/effective_rank", "collapse/floor_ratio", "collapse/prediction_diversity"}  # fmt: skip
    assert wanted <= scalars.keys()


@pytest.mark.slow
def test_the_curves_start_before_training(pretrain_arguments):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = execute(pretrain_arguments())
    events = EventAccumulator(str(folder)).Reload()
    assert events.Scalars("collapse/floor_ratio")[0].step == 0
    assert {"reconstruction/t1c", "reconstruction/t2w", "collapse/spectrum"} <= set(events.Tags()["images"])


def test_a_dry_run_leaves_nothing(pretrain_arguments):
    execute(pretrain_arguments("--trainer.fast_dev_run=true"))
    assert not Path("runs").exists()


@pytest.mark.slow
def test_limits_of_lightning_hold(pretrain_arguments):
    folder = execute(pretrain_arguments("--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1"))
    assert json.loads((folder / "summary.json").read_text())["steps"] == 2


def test_float16_on_a_cpu_is_refused(refusal, pretrain_arguments):
    line = refusal(pretrain_arguments("--trainer.accelerator=cpu", "--trainer.precision=16-mixed"))
    assert "float16" in line
    assert "bf16-mixed" in line
    assert not Path("runs").exists()


def test_a_run_folder_that_cannot_be_made(refusal, pretrain_arguments):
    Path("runs").write_text("")
    assert "cannot be made (Not a directory)" in refusal(pretrain_arguments())


def test_two_runs_of_one_second(monkeypatch, pretrain_arguments):
    monkeypatch.setattr("common.cli.time.strftime", lambda layout: "now")
    arguments = pretrain_arguments("--trainer.max_steps=1", "--trainer.limit_val_batches=0")
    assert [execute(arguments).name for _ in range(2)] == ["now", "now_2"]


def test_no_name_of_a_run_leads_out_of_the_folder_of_runs(monkeypatch, pretrain_arguments):
    monkeypatch.setattr("common.cli.launched_rank", lambda: 1)  # else the time of the environment is not taken
    monkeypatch.setenv("MEDMIM_RUN_TIME", "../../../victim")
    with pytest.raises(UserError):
        execute(pretrain_arguments("--trainer.precision=16-mixed", "--trainer.accelerator=cpu"))
    assert os.environ["MEDMIM_RUN_TIME"].startswith("_.._.._victim~")
    assert run_name(["fit", "--config", "configs/.yaml"], "a")[1].startswith("_~")
    assert run_name(["fit"], "experiments.a/b.Model")[0].startswith("a_b~")


def test_a_cpu_without_bfloat16_trains_in_float32(monkeypatch, pretrain_arguments, capsys):
    monkeypatch.setattr("common.cli.supports_bfloat16", lambda device: False)
    arguments = [a for a in pretrain_arguments("--trainer.accelerator=cpu") if "precision" not in a]
    folder = execute([*arguments, "--trainer.fast_dev_run=true"])
    assert "32-true instead of bf16-mixed" in capsys.readouterr().out
    assert not folder.exists()


def test_a_missing_archive_is_one_line(refusal, pretrain_arguments):
    line = refusal(pretrain_arguments("--data.root=/nowhere"))
    assert "/nowhere" in line


def test_debug_shows_the_traceback(pretrain_arguments):
    with pytest.raises(UserError):
        main(pretrain_arguments("--data.root=/nowhere", "--debug"))


def test_a_missing_checkpoint_is_one_line(refusal, pretrain_arguments):
    assert "no/such/run" in refusal(pretrain_arguments("--ckpt_path=no/such/run"))


@pytest.mark.parametrize("wrong", ["--model.tapz=[1]", "--trainer.precision=fast"])
def test_wrong_usage_exits_with_2_and_names_what_is_wrong(capsys, pretrain_arguments, wrong):
    with pytest.raises(SystemExit) as stop:
        main(pretrain_arguments(wrong))
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert any(word in line for word in ("tapz", "precision"))
    assert "--help" in line
    assert "Union" not in line


def test_a_missing_configuration_is_one_line_and_exits_with_2(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config=missing.yaml"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: The configuration missing.yaml does not exist.\n"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["--model.mask_fill=drop"], "set barlow_twins_weight to 0"),
        (["--model.taps=[99]"], "`taps` must lie in 0..2"),
        (["--data.crops.size=[50,64,64]"], "cannot be cut into patches"),
        (["--model.masker.hidden_per_position=3"], "`hidden_per_position` must be at most 2"),
    ],
)
def test_values_that_cannot_work_are_one_line(refusal, pretrain_arguments, settings, words):
    assert words in refusal(pretrain_arguments(*settings))


@pytest.mark.slow
def test_a_disk_that_fills_up_costs_no_earlier_checkpoint(pretrain_arguments, refusal, small_disk):
    folder = execute(pretrain_arguments("--trainer.max_epochs=1"))
    before = (folder / "checkpoints/last.ckpt").read_bytes()
    with small_disk(len(before) // 2):
        line = refusal(pretrain_arguments(f"--ckpt_path={folder}"))
    assert "cannot be written: the disk or the quota is full. Free some space and start the command again" in line
    assert (folder / "checkpoints/last.ckpt").read_bytes() == before
    assert not [path for path in folder.rglob(".*") if path.is_file()]
    assert execute(pretrain_arguments(f"--ckpt_path={folder}")) == folder


@pytest.mark.parametrize(
    ("error", "words"),
    [(OSError(errno.ENOSPC, "No space left on device", "a.csv"), "a.csv cannot be written or read: the disk"),
     (PermissionError(errno.EACCES, "Permission denied", "/a"), "/a cannot be written or read: permission denied")],
)  # fmt: skip
def test_what_a_library_meets_on_the_disk_is_one_line(refusal, pretrain_arguments, monkeypatch, error, words):
    def fail(*_):
        raise error

    monkeypatch.setattr("common.cli.execute", fail)
    assert words in refusal(pretrain_arguments())
    monkeypatch.setattr("common.commands.execute", fail)
    with pytest.raises(SystemExit):
        medmim(["doctor"])
    with pytest.raises(OSError, match=error.strerror):
        medmim(["--debug", "doctor"])
