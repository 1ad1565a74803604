"""Stopping and continuing: the weights must not differ by a single bit."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from common.callbacks.last_checkpoint import LastCheckpoint
from common.callbacks.preemption import Preemption
from common.cli import execute, main
from common.errors import PreemptedError
from experiments.e_mim.module import EMIMPretrain

DROPOUT = "--model.encoder.dropout=0.2"


def weights(folder):
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


def newest():
    return max(Path("runs/e_mim/pretrain").iterdir(), key=lambda path: path.stat().st_mtime)


def assert_equal(a, b):
    difference = max(float((a[key].double() - b[key].double()).abs().max()) for key in a)
    assert difference == 0.0


def at_step(monkeypatch, step, action):
    """Do something in the middle of one training step."""
    training_step = EMIMPretrain.training_step
    done = []

    def wrapped(self, batch, batch_idx):
        if self.trainer.fit_loop.total_batch_idx == step and not done:
            done.append(step)
            action()
        return training_step(self, batch, batch_idx)

    monkeypatch.setattr(EMIMPretrain, "training_step", wrapped)


def stop_and_resume(arguments, monkeypatch, step, action, expected):
    with monkeypatch.context() as patch:
        at_step(patch, step, action)
        with pytest.raises(expected):
            execute(arguments)
    folder = newest()
    resumed = execute([*arguments, "--ckpt_path", str(folder)])
    assert resumed == folder
    return folder


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


class Killed(Exception):
    pass


def kill():
    raise Killed


@pytest.mark.parametrize(
    ("more", "step", "action"),
    [
        pytest.param([], 3, terminate, id="inside an epoch", marks=pytest.mark.slow),
        pytest.param([], 5, terminate, id="last step of an epoch", marks=pytest.mark.slow),
        pytest.param([], 6, kill, id="epoch boundary", marks=pytest.mark.slow),
        pytest.param(["--data.num_workers=2"], 3, terminate, id="two workers", marks=pytest.mark.slow),
        pytest.param(["--data.num_workers=2"], 6, kill, id="two workers, boundary", marks=pytest.mark.slow),
        pytest.param(["--trainer.accumulate_grad_batches=2"], 2, terminate, id="accumulation", marks=pytest.mark.slow),
        pytest.param(
            ["--trainer.accumulate_grad_batches=4"], 5, terminate, id="rest of an epoch", marks=pytest.mark.slow
        ),
        pytest.param(
            ["--trainer.max_epochs=-1", "--trainer.max_steps=10"], 8, terminate, id="by steps", marks=pytest.mark.slow
        ),
    ],
)
def test_resumed_equals_uninterrupted(pretrain_arguments, monkeypatch, more, step, action):
    arguments = pretrain_arguments(DROPOUT, *more)
    whole = weights(execute(arguments))
    folder = stop_and_resume(arguments, monkeypatch, step, action, PreemptedError if action is terminate else Killed)
    assert_equal(weights(folder), whole)


@pytest.mark.slow
def test_two_uninterrupted_runs_are_equal_and_another_seed_is_not(pretrain_arguments):
    first, second = (weights(execute(pretrain_arguments(DROPOUT))) for _ in range(2))
    assert_equal(first, second)
    other = weights(execute(pretrain_arguments(DROPOUT, "--seed_everything=4")))
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.slow
def test_a_stop_inside_validation(pretrain_arguments, monkeypatch):
    arguments = pretrain_arguments(DROPOUT)
    whole = weights(execute(arguments))
    step = EMIMPretrain.validation_step

    def wrapped(self, batch, batch_idx):
        if self.trainer.global_step == 6 and not self.trainer.sanity_checking:
            terminate()
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(EMIMPretrain, "validation_step", wrapped)
        patch.setattr("datamodules.volumes.datamodule.VolumeDataModule.validation_loader", _one_by_one)
        with pytest.raises(PreemptedError):
            execute(arguments)
    folder = newest()
    assert torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 6
    execute([*arguments, "--ckpt_path", str(folder)])
    assert_equal(weights(folder), whole)


def _one_by_one(self, dataset, draws=1, batch_size=None):
    from datamodules.base import ArchiveDataModule

    return ArchiveDataModule.validation_loader(self, dataset, draws, 1)


@pytest.mark.slow
def test_a_second_signal_and_one_during_the_save_change_nothing(pretrain_arguments, monkeypatch):
    arguments = pretrain_arguments(DROPOUT)
    whole = weights(execute(arguments))
    save = LastCheckpoint.save

    def interrupted(self, trainer):
        terminate()
        save(self, trainer)
        os.kill(os.getpid(), signal.SIGUSR1)

    def twice():
        terminate()
        terminate()

    with monkeypatch.context() as patch:
        patch.setattr(LastCheckpoint, "save", interrupted)
        at_step(patch, 2, twice)
        with pytest.raises(PreemptedError):
            execute(arguments)
    folder = newest()
    execute([*arguments, "--ckpt_path", str(folder)])
    assert_equal(weights(folder), whole)


@pytest.mark.slow
def test_a_resumed_run_goes_on_in_its_folder(pretrain_arguments, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    folder = stop_and_resume(pretrain_arguments(), monkeypatch, 3, terminate, PreemptedError)
    assert signal.getsignal(signal.SIGTERM) is before
    steps = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
    column = steps[0].index("step")
    assert [steps[0].count(name) for name in ("step", "train/loss")] == [1, 1]
    # The step that was stopped at is trained and saved; its own row is not written any more.
    assert {int(line[column]) for line in steps[1:]} >= set(range(12)) - {3}
    assert not list((folder / "checkpoints").glob("*.tmp"))


@pytest.mark.slow
def test_ctrl_c_saves_says_how_to_go_on_and_exits_with_130(pretrain_arguments, monkeypatch, capfd):
    arguments = pretrain_arguments(DROPOUT)
    whole = weights(execute(arguments))
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(SystemExit) as stop:
            main(arguments)
    assert stop.value.code == 130
    folder = newest()
    printed = capfd.readouterr()
    assert f"stopped on request at step 4; resume with RESUME={folder}" in printed.out
    assert "Ctrl-C again quits at once" in printed.err
    execute([*arguments, "--ckpt_path", str(folder)])
    assert_equal(weights(folder), whole)


def test_a_second_ctrl_c_quits_at_once(tmp_path, monkeypatch):
    codes = []
    monkeypatch.setattr("common.callbacks.preemption.os._exit", codes.append)
    stop = Preemption(LastCheckpoint(tmp_path))
    stop._handle(signal.SIGINT, None)
    assert (stop.requested, codes) == (130, [])
    stop._handle(signal.SIGTERM, None)
    stop._handle(signal.SIGINT, None)
    assert (stop.requested, codes) == (130, [130])
    first = Preemption(LastCheckpoint(tmp_path))
    first._handle(signal.SIGTERM, None)
    first._handle(signal.SIGINT, None)
    assert (first.requested, codes) == (143, [130])


def test_ctrl_c_before_training_is_one_line(pretrain_arguments, monkeypatch, capsys):
    def interrupted(arguments):
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("common.cli.execute", interrupted)
    with pytest.raises(SystemExit) as stop:
        main(pretrain_arguments())
    signal.signal(signal.SIGINT, before)
    assert stop.value.code == 130
    assert capsys.readouterr().err == "stopped by Ctrl-C outside training: nothing new was saved\n"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_the_command_exits_with_143(pretrain_arguments, number):
    arguments = pretrain_arguments("--trainer.max_epochs=1000")
    process = subprocess.Popen([sys.executable, "-m", "common.cli", *arguments], stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list(Path("runs").glob("e_mim/pretrain/*/checkpoints/last.ckpt")):
        time.sleep(0.5)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "stopped on request at step" in output
    assert torch.load(newest() / "checkpoints/last.ckpt", weights_only=True)["global_step"] > 0
