"""What a run does before its first step, and does not do again at the second start."""

import csv
import json
import shutil

import pytest

from common.cli import execute
from datamodules import checking
from datamodules.volumes.datamodule import VolumeDataModule


def samples(folder):
    with (folder / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["val/samples"]]
    return {int(row["step"]): float(row["val/samples"]) for row in rows}


def test_the_first_validation_is_short_and_the_floor_is_measured_once(pretrain_arguments, monkeypatch):
    arguments = pretrain_arguments(
        "--data.loader.sanity_samples=4", "--data.loader.val_draws=4", "--data.split.fractions=[0.5,0.5,0.0]",
        "--trainer.max_epochs=1",
    )  # fmt: skip
    folder = execute(arguments)
    counts = samples(folder)
    whole = counts[max(counts)]
    assert counts[0] == 4 < whole
    assert json.loads((folder / "summary.json").read_text())["cache_checked"] == 1
    with monkeypatch.context() as patch:
        patch.setattr(VolumeDataModule, "reference_samples", lambda *_: pytest.fail("the floor was measured again"))
        again = execute([*arguments, "--model.optimization.schedule.class_path=common.optim.WarmupCosine"])
    first, second = (json.loads((run / "summary.json").read_text())["scalars"] for run in (folder, again))
    assert first["collapse/floor"]["final"] == second["collapse/floor"]["final"]
    other = execute([*arguments, "--data.crops.overhang=0.1"])  # other samples: measured anew
    assert json.loads((other / "summary.json").read_text())["scalars"]["collapse/floor"] != first["collapse/floor"]


def test_a_byte_flipped_in_an_unsampled_file_is_found_while_training(
    pretrain_arguments, monkeypatch, tmp_path, brats_root
):
    monkeypatch.setattr(checking, "SAMPLED_FILES", 1)
    monkeypatch.setenv("MEDMIM_CACHE", str(tmp_path / "own cache"))
    root = tmp_path / "archive"
    shutil.copytree(brats_root, root)
    execute(pretrain_arguments("--trainer.max_epochs=1", root=root))
    for file in (tmp_path / "own cache").rglob("label_voxels.npy"):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    folder = execute(pretrain_arguments("--trainer.max_epochs=1", "--data.loader.max_fault_fraction=1", root=root))
    with (folder / "data_faults.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows
    assert {row["kind"] for row in rows} == {"checksum"}
    assert "draws of this epoch had used it" in rows[0]["detail"]
    assert 0 < json.loads((folder / "summary.json").read_text())["cache_checked"] <= 1
