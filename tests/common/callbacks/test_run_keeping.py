"""What the callbacks of every run leave behind: throughput, faults, checkpoints, the run's record."""

import csv
import json
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch

from common.callbacks.fault_report import FaultReport
from common.callbacks.last_checkpoint import Cadence, LastCheckpoint
from common.callbacks.throughput import Throughput
from common.cli import execute
from common.errors import TooManyFaultsError
from common.faults import Fault, FaultLedger


@pytest.mark.slow
def test_throughput_counts_what_was_trained(pretrain_arguments):
    folder = execute(pretrain_arguments())
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["samples"] == summary["steps"] * 2
    assert 0 < summary["train_seconds"] <= summary["wall_seconds"]
    assert summary["flops_per_sample"] > 0
    assert 0 <= summary["scalars"]["throughput/data_wait_fraction"]["final"] <= 1


@pytest.mark.slow
def test_operations_are_counted_once(pretrain_arguments, monkeypatch):
    entered = []
    from torch.utils.flop_counter import FlopCounterMode

    enter = FlopCounterMode.__enter__
    monkeypatch.setattr(FlopCounterMode, "__enter__", lambda self: entered.append(1) or enter(self))
    execute(pretrain_arguments())
    assert len(entered) == 1


@pytest.mark.parametrize("batch", [{"name": ["a"], "image": torch.zeros(3, 2)}, (torch.zeros(3),)])
def test_batch_size_is_the_first_tensors(batch):
    assert Throughput._batch_size(batch) == 3


def saving(tmp_path, cadence, now):
    saved = []
    trainer = SimpleNamespace(global_step=0, fast_dev_run=False, is_global_zero=True, max_epochs=-1, max_steps=-1,
                              current_epoch=0, should_stop=False, loggers=[])  # fmt: skip
    trainer.save_checkpoint = lambda path, **more: saved.append((path.name, trainer.global_step))
    trainer.fit_loop = SimpleNamespace(_should_accumulate=lambda: False)
    callback = LastCheckpoint(tmp_path, cadence, clock=lambda: now[0])
    callback.on_train_start(trainer, None)
    return callback, trainer, saved


def test_a_checkpoint_every_so_many_steps_and_never_twice_at_one(tmp_path):
    callback, trainer, saved = saving(tmp_path, Cadence(every_n_steps=3, at_epoch_end="always"), [0.0])
    for step in range(1, 8):
        trainer.global_step = step
        callback.on_train_batch_end(trainer, None, None, None, step)
        if step in (3, 5):
            callback.on_train_epoch_end(trainer, None)
    assert saved == [("last.ckpt", 3), ("last.ckpt", 5), ("last.ckpt", 6)]


def test_a_checkpoint_every_so_many_minutes(tmp_path):
    now = [0.0]
    callback, trainer, saved = saving(tmp_path, Cadence(every_minutes=10), now)
    for step in range(1, 31):
        trainer.global_step, now[0] = step, 60.0 * step
        callback.on_train_batch_end(trainer, None, None, None, step)
        if step in (5, 12):
            callback.on_train_epoch_end(trainer, None)
    assert [step for _, step in saved] == [10, 20, 30]
    trainer.global_step = 31
    callback.on_train_epoch_end(trainer, None)
    assert len(saved) == 3
    trainer.max_steps = 31
    callback.on_train_epoch_end(trainer, None)
    assert saved[-1] == ("last.ckpt", 31)


def test_faults_met_while_training_are_written_and_counted(tmp_path):
    ledger = FaultLedger()
    ledger.num_samples = 100
    logged = {}
    trainer = SimpleNamespace(datamodule=SimpleNamespace(ledger=ledger), is_global_zero=True, fast_dev_run=False)
    module = SimpleNamespace(log=lambda name, value, **_: logged.update({name: value}))
    report = FaultReport(tmp_path)
    report.setup(trainer, module, "fit")
    report.on_train_batch_end(trainer, module, None, None, 0)
    assert logged == {}
    ledger.add([Fault("a.nii.gz", "nan", "1 voxel is not finite", "a")])
    report.on_train_batch_end(trainer, module, None, None, 1)
    assert logged == {"data/faulty_samples": 1.0}
    assert [row["path"] for row in csv.DictReader((tmp_path / "data_faults.csv").open())] == ["a.nii.gz"]
    ledger.add([Fault(f"{i}.nii.gz", "nan", "", str(i)) for i in range(5)])
    with pytest.raises(TooManyFaultsError):
        report.on_train_batch_end(trainer, module, None, None, 2)
    assert len(list(csv.DictReader((tmp_path / "data_faults.csv").open()))) == 6


@pytest.mark.slow
def test_the_record_names_versions_seed_and_source(pretrain_arguments):
    folder = execute(pretrain_arguments("--trainer.max_epochs=1", "--seed_everything=11"))
    facts = json.loads((folder / "environment.json").read_text())
    assert facts["seed"] == 11
    assert facts["versions"]["torch"] == version("torch")
    assert facts["world_size"] == 1
    assert {"commit", "dirty", "device"} <= facts.keys()


@pytest.mark.slow
def test_a_resumed_run_adds_to_its_summary(pretrain_arguments):
    """What a run reached and cost before it was stopped still counts."""
    folder = execute(pretrain_arguments("--trainer.max_epochs=1"))
    before = json.loads((folder / "summary.json").read_text())
    assert execute(pretrain_arguments("--trainer.max_epochs=2", f"--ckpt_path={folder}")) == folder
    after = json.loads((folder / "summary.json").read_text())
    assert after["samples"] == 2 * before["samples"]
    assert after["wall_seconds"] > before["wall_seconds"]
    ratio = "collapse/floor_ratio"
    assert after["scalars"][ratio]["first"] == before["scalars"][ratio]["first"]
    assert after["scalars"][ratio]["final"] != before["scalars"][ratio]["final"]


@pytest.mark.slow
def test_a_requeued_job_goes_on_where_it_stopped(pretrain_arguments, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    first = execute(pretrain_arguments("--trainer.max_epochs=1"))
    other = execute(pretrain_arguments("--trainer.max_epochs=1"))
    assert other != first
    monkeypatch.setenv("SLURM_JOB_ID", "18")
    third = execute(pretrain_arguments("--trainer.max_epochs=1"))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert execute(pretrain_arguments("--trainer.max_epochs=2")) == third
    monkeypatch.setenv("SLURM_JOB_ID", "19")
    assert execute(pretrain_arguments("--trainer.max_epochs=1")) not in (first, other, third)
