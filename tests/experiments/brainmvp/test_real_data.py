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
        main(brain_arguments("--data.split_fractions=[1,0,0]", "--data.atlas=[240,240,155]", root=root))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "not in atlas space" in line
    assert "those of a native scan" in line
    assert "the skull is still on" in line
    with pytest.raises(DataError, match="Training would refuse this archive"):
        medmim(["doctor", "--config", "experiments/brainmvp/configs/pretrain.yaml", "--root", str(root)])
    assert "space" in capsys.readouterr().out


def test_brats_2023_is_learned_and_the_input_is_used(real_data):
    """Five patients, the sixth scored: better than a constant, and by what is in the holes and beside them."""
    root = real_data("brats2023")
    configs = [f"experiments/brainmvp/configs/{name}.yaml" for name in ("pretrain", "small")]
    medmim(["doctor", "--config", configs[0], "--root", str(root)])
    settings = [f"--data.root={root}", "--data.crop_size=[32,32,32]", "--data.crops_per_case=64",
                "--data.val_crops_per_case=24", "--model.encoder.depths=[1,1,1]", "--trainer.max_epochs=1",
                "--trainer.num_sanity_val_steps=0", "--trainer.check_val_every_n_epoch=1",
                "--trainer.enable_progress_bar=false"]  # fmt: skip
    folder = execute(["fit", *(word for name in configs for word in ("--config", name)), *settings])
    scalars = json.loads((folder / "summary.json").read_text())["scalars"]
    assert list(csv.DictReader((folder / "data_faults.csv").open())) == []
    assert scalars["collapse/floor_ratio"]["final"] < 0.8
    assert scalars["collapse/floor_ratio_control"]["final"] > 1.1
    assert scalars["probe/view_retrieval"]["final"] > 5 * scalars["probe/view_retrieval_chance"]["final"]
