"""Real scans: six BraTS 2023 patients, and one in native space that must be refused."""

import csv
import json

import pytest

from common.cli import execute, main
from common.commands import execute as medmim
from common.errors import DataError

pytestmark = pytest.mark.real_data


def test_a_native_scan_is_refused_with_the_reason(real_data, brain_arguments, capsys):
    root = real_data("tcga_fg_6692")
    with pytest.raises(SystemExit):
        main(brain_arguments("--data.split.fractions=[1,0,0]", "--data.atlas=[240,240,155]", root=root))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "not in atlas space" in line
    assert "those of a native scan" in line
    assert "the skull is still on" in line
    with pytest.raises(DataError, match="Training would refuse this archive"):
        medmim(["doctor", "--config", "experiments/brainmvp/configs/pretrain.yaml", "--root", str(root)])
    assert "space" in capsys.readouterr().out


def test_brats_2023_trains_and_the_loss_falls(real_data, brain_arguments):
    root = real_data("brats2023")
    medmim(["doctor", "--config", "experiments/brainmvp/configs/pretrain.yaml", "--root", str(root)])
    settings = ["--data.atlas=[160,208,112]", "--data.crops.size=[32,32,32]", "--data.loader.draws=8",
                "--data.split.fractions=[0.84,0.16,0.0]", "--trainer.max_epochs=2", "--data.loader.val_draws=8",
                "--model.optimization.optimizer.lr=1e-3"]  # fmt: skip
    folder = execute(brain_arguments(*settings, root=root))
    scalars = json.loads((folder / "summary.json").read_text())["scalars"]
    assert list(csv.DictReader((folder / "data_faults.csv").open())) == []
    ratio = scalars["collapse/floor_ratio"]
    assert ratio["final"] < ratio["first"]  # twenty steps of a network of width 8
