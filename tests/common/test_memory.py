"""Memory and open files stay flat: real trainings with two workers, sampled while they run.

A few steps by default; ``MEDMIM_MEMORY_STEPS=2000`` trains so many, and ``pytest -s`` then prints a table.
"""

import os
import re
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest

from common.cli import execute
from common.commands import execute as medmim

pytestmark = pytest.mark.slow

STEPS = int(os.environ.get("MEDMIM_MEMORY_STEPS", "60"))
RUNS = [("e_mim", "pretrain"), ("mrm_record", "pretrain"), ("brainmvp", "pretrain"), ("mrm_genetics", "pretrain"),
        ("umd", "pretrain"), ("e_mim", "finetune_brats_seg"), ("mrm_record", "finetune_viral"),
        ("umd", "finetune_roco_retrieval"), ("umd", "finetune_vqa_rad")]  # fmt: skip


def family():
    """Return this process and its children (Linux)."""
    children = [int(stat.parent.name) for stat in Path("/proc").glob("[0-9]*/stat")
                if stat.read_text().rpartition(")")[2].split()[1] == str(os.getpid())]  # fmt: skip
    return [os.getpid(), *children]


def resident():
    """Return the resident memory of all of them in MB."""
    texts = [Path(f"/proc/{pid}/status").read_text() for pid in family()]
    return sum(int(found[1]) for text in texts if (found := re.search(r"VmRSS:\s+(\d+)", text))) / 1024


def open_files():
    return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in family())


class Samples(pl.Callback):
    """Looks twenty times."""

    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step % max(STEPS // 20, 1) == 0:
            self.rows.append((trainer.global_step, resident(), open_files()))


@pytest.mark.parametrize(("experiment", "stage"), RUNS, ids=[f"{a}-{b}" for a, b in RUNS])
def test_memory_and_open_files_stay_flat(experiment, stage, tmp_path, monkeypatch):
    configs = [f"experiments/{experiment}/configs/{name}.yaml"
               for name in (stage, "smoke" if stage == "pretrain" else f"{stage}.smoke")]  # fmt: skip
    given = [word for config in configs for word in ("--config", config)]
    medmim(["synthesize", *given, "--cases", "16"])
    samples = Samples()
    monkeypatch.setattr("common.cli.FaultReport.on_train_batch_end", samples.on_train_batch_end)
    execute(["fit", *given, "--data.num_workers=2", "--trainer.max_epochs=-1", f"--trainer.max_steps={STEPS}",
             "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"])  # fmt: skip
    steps, memory, files = np.array(samples.rows, dtype=float).T
    third = max(len(steps) // 3, 2)
    slopes = [1000 * np.polyfit(steps[part], memory[part], 1)[0] for part in (slice(0, third), slice(-third, None))]
    print(f"\n| {experiment} {stage} | {memory[0]:.0f} | {memory[-1]:.0f} | {slopes[0]:+.1f} | {slopes[1]:+.1f} | "
          f"{files[third]:.0f} | {files[-1]:.0f} |")  # fmt: skip
    assert files[-1] <= files[third] + 4
    if STEPS >= 500:
        assert slopes[1] < 30  # MB per 1,000 steps
