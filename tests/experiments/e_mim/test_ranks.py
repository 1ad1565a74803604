"""Two ranks with half the batch are one rank with all of it; validation neither repeats nor forgets a sample."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.cli import execute


def last(folder):
    return torch.load(Path(folder) / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


def scalars(folder):
    """Return the last value of every column of metrics.csv."""
    found = {}
    with (Path(folder) / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            found |= {name: float(value) for name, value in row.items() if value}
    return found


def run_two_ranks(arguments):
    command = [sys.executable, "-m", "common.cli", *arguments, "--trainer.accelerator=cpu", "--trainer.devices=2",
               "--trainer.strategy=ddp"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return next(line.split(": ", 1)[1] for line in done.stdout.splitlines() if line.startswith("run folder"))


@pytest.mark.ddp
@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "precision"),
    [("torch.optim.SGD", "32-true"), ("torch.optim.AdamW", "64-true")],
)
def test_two_ranks_equal_one(pretrain_arguments, optimizer, precision):
    """The third case lacks a modality, so the ranks hide different numbers of entries."""
    shared = ["--trainer.max_epochs=1", f"--trainer.precision={precision}", "--data.loader.draws=4",
              "--data.split.fractions=[0.6,0.4,0.0]", f"--model.optimization.optimizer={optimizer}",
              "--model.optimization.optimizer.lr=0.01",
              "--trainer.limit_train_batches=5", "--model.barlow_twins_weight=1.0"]  # fmt: skip
    alone = execute(pretrain_arguments(*shared, "--data.batch_size=4"))
    together = run_two_ranks(pretrain_arguments(*shared, "--data.batch_size=2"))
    first, second = last(alone), last(together)
    for key, value in first.items():
        assert torch.allclose(value.double(), second[key].double(), rtol=1e-6, atol=1e-6), key
    one, two = scalars(alone), scalars(together)
    for name in ("train/loss", "train/loss_reconstruction", "train/loss_barlow_twins"):
        assert two[name] == pytest.approx(one[name], rel=1e-5), name
    # Validation batches of two are the same on both; those of one rank hold four samples, which changes the batch sum
    # of the pyramid but nothing else.
    for name in ("val/loss_reconstruction", "collapse/floor_ratio", "collapse/floor_ratio_control", "collapse/floor"):
        assert two[name] == pytest.approx(one[name], rel=1e-5), name
    assert not (Path(together) / "data_faults.csv").read_text().splitlines()[1:]


@pytest.mark.ddp
@pytest.mark.slow
def test_fewer_validation_batches_than_ranks_and_a_fault_on_one_of_them(pretrain_arguments, brats_root, tmp_path):
    """Two validation samples make one batch, or two for two ranks; a fault that one rank meets reaches the one file."""
    import shutil

    root = shutil.copytree(brats_root, tmp_path / "copy")
    broken = sorted(root.glob("*/*-t1c.nii.gz"))[1]
    broken.write_bytes(b"broken")
    arguments = pretrain_arguments("--trainer.max_epochs=1", "--data.cache.format=none", root=root)
    folder = run_two_ranks(arguments)
    rows = (Path(folder) / "data_faults.csv").read_text().splitlines()[1:]
    assert len(rows) == 1
    assert str(broken) in rows[0]
    assert "collapse/floor_ratio" in scalars(folder)


#: A loss that is not finite on the second rank, in its third step.
POISONED = """
import sys

from common.cli import main
from experiments.e_mim.module import EMIMPretrain

step = EMIMPretrain.training_step


def poisoned(self, batch, index):
    loss = step(self, batch, index)
    return loss * float("nan") if self.global_rank == 1 and self.global_step == 2 else loss


EMIMPretrain.training_step = poisoned
main(sys.argv[1:])
"""


@pytest.mark.ddp
@pytest.mark.slow
def test_two_ranks_that_meet_nan_on_one_stop_together(pretrain_arguments, tmp_path):
    script = tmp_path / "poisoned.py"
    script.write_text(POISONED)
    arguments = pretrain_arguments("--trainer.max_epochs=3", "--safety.agree_every=2", "--data.batch_size=1")
    command = [sys.executable, str(script), *arguments, "--trainer.accelerator=cpu", "--trainer.devices=2",
               "--trainer.strategy=ddp"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    errors = {line for line in done.stderr.splitlines() if line.startswith("error: ")}
    assert len(errors) == 1
    assert "error: Stopped at step 3: the loss (loss) is not finite on rank 1, with the samples " in errors.pop()
