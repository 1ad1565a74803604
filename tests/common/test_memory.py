"""Memory and open files stay flat: real trainings with two workers, sampled while they run.

A few steps of the smallest sizes by default. ``MEDMIM_MEMORY_STEPS=2000`` trains so many,
``MEDMIM_MEMORY_SIZE=smoke`` pre-trains with that overlay, and ``pytest -s`` then prints a table.
"""

import os
from contextlib import suppress
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest

from common.cli import execute
from common.commands import execute as medmim

pytestmark = pytest.mark.slow

STEPS = int(os.environ.get("MEDMIM_MEMORY_STEPS", "10"))
SIZE = os.environ.get("MEDMIM_MEMORY_SIZE", "torture")
VIT = ["--model.encoder.embed_dim=32", "--model.encoder.depth=4", "--model.encoder.num_heads=2",
       "--data.crops.size=[32,32,32]"]  # fmt: skip
#: Volumes smaller than the synthetic ones, whose making would take most of the time.
ROOTS = {"e_mim": "brats_root", "brainmvp": "brain_root"}
#: Experiment, stage and further arguments: every pre-training, and a fine-tuning of each kind.
RUNS = [("e_mim", "pretrain", []), ("mrm_record", "pretrain", []),
        ("brainmvp", "pretrain", ["--data.atlas=[40,44,36]"]),
        ("mrm_genetics", "pretrain", []), ("umd", "pretrain", []),
        ("e_mim", "finetune_brats_seg", [*VIT, "--model.network.feature_size=4", "--data.loader.draws=8"]),
        ("mrm_record", "finetune_viral", []), ("e_mim", "finetune_idh_probe", [*VIT, "--model.num_folds=2"]),
        ("umd", "finetune_roco_retrieval", []), ("umd", "finetune_vqa_rad", [])]  # fmt: skip


def family():
    """Return the folders of this process and its children (Linux)."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            found += [folder] if str(os.getpid()) in (folder.name, parent) else []
    return found


def used():
    """Return the resident memory of all of them in MB, and how many files they hold open."""
    memory, files = 0.0, 0
    for folder in family():
        with suppress(OSError):
            memory += int((folder / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
            files += len(os.listdir(folder / "fd"))
    return memory, files


class Samples(pl.Callback):
    """Looks at every step, or sixty times in long runs."""

    def __init__(self):
        self.rows = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step % max(STEPS // 60, 1) == 0:
            self.rows.append((trainer.global_step, *used()))


@pytest.mark.parametrize(("experiment", "stage", "more"), RUNS, ids=[f"{a}-{b}" for a, b, _ in RUNS])
def test_memory_and_open_files_stay_flat(experiment, stage, more, monkeypatch, request):
    overlay = SIZE if stage == "pretrain" else f"{stage}.smoke"
    configs = [f"experiments/{experiment}/configs/{name}.yaml" for name in (stage, overlay)]
    given = [word for config in configs for word in ("--config", config)]
    if experiment in ROOTS:
        root = request.getfixturevalue(ROOTS[experiment])
        given += [f"--data.root={root}", *([f"--data.target.file={root}/idh.csv"] if "probe" in stage else [])]
    else:
        medmim(["synthesize", *given, "--cases", "12"])
    if stage == "pretrain" and SIZE == "torture":
        more = [*more, f"--data.loader.draws={16 if STEPS >= 500 else 4}"]  # or every few steps are an epoch
    samples = Samples()
    monkeypatch.setattr("common.cli.FaultReport.on_train_batch_start", samples.on_train_batch_start)
    execute(["fit", *given, *more, "--data.num_workers=2", "--trainer.max_epochs=-1", f"--trainer.max_steps={STEPS}",
             "--trainer.check_val_every_n_epoch=20", "--trainer.val_check_interval=1.0",
             "--trainer.num_sanity_val_steps=0", "--trainer.enable_progress_bar=false",
             "--trainer.accelerator=cpu"])  # fmt: skip
    steps, memory, files = np.array(samples.rows, dtype=float).T
    assert len(steps) >= 10
    third = len(steps) // 3
    slope = 1000 * np.polyfit(steps[third:], memory[third:], 1)[0]
    print(f"\n| {experiment} {stage} | {STEPS} | {memory[:third].mean():.0f} | {memory[-third:].mean():.0f} | "
          f"{slope:+.1f} | {files[third]:.0f} | {files[-1]:.0f} |")  # fmt: skip
    print("MB:", *(f"{value:.0f}" for value in memory))
    # Workers open their files in the first steps.
    assert files[-1] <= files[third] + (4 if STEPS >= 500 else 15)
    if STEPS >= 500:
        assert slope < 30  # MB per 1,000 steps
