"""Every row of the paper's ablations is a matter of switches, and trains."""

import json
from itertools import product

import pytest
import yaml

from common.cli import execute

pytestmark = pytest.mark.slow

#: Table IV at the paper's depth of 12: level l of L taps block 12 l / L.
LEVELS = {1: [12], 2: [6, 12], 3: [4, 8, 12], 4: [3, 6, 9, 12], 12: list(range(1, 13))}


def settings(folder):
    return yaml.safe_load((folder / "config.yaml").read_text())["model"]["init_args"]


@pytest.mark.parametrize("steps", list(product([False, True], repeat=3)), ids=str)
def test_table_3_masks(pretrain_arguments, steps):
    switches = [
        f"--model.masker.{n}={str(s).lower()}" for n, s in zip(("modal", "position", "patch"), steps, strict=True)
    ]
    folder = execute(pretrain_arguments(*switches, "--trainer.max_steps=1", "--trainer.limit_val_batches=1"))
    assert tuple(settings(folder)["masker"]["init_args"][n] for n in ("modal", "position", "patch")) == steps
    scalars = json.loads((folder / "summary.json").read_text())["scalars"]
    loss = scalars["train/loss_reconstruction"]["final"]
    assert loss > 0 if any(steps) else loss == 0


@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_table_4_levels(pretrain_arguments, levels):
    arguments = [a for a in pretrain_arguments() if "depth" not in a and "taps" not in a]
    taps = f"--model.taps={LEVELS[levels]}".replace(" ", "")
    folder = execute([*arguments, "--model.encoder.depth=12", taps, "--trainer.max_steps=1",
                      "--trainer.limit_val_batches=1"])  # fmt: skip
    scalars = json.loads((folder / "summary.json").read_text())["scalars"]
    logged = {name for name in scalars if name.startswith("train/loss_barlow_twins_tap")}
    assert logged == {f"train/loss_barlow_twins_tap{tap}" for tap in LEVELS[levels]}


@pytest.mark.parametrize("overlay", ["literal", "feature", "mae", "simmim"])
def test_overlays_train(pretrain_arguments, overlay):
    arguments = pretrain_arguments("--trainer.max_steps=2", "--trainer.limit_val_batches=1")
    arguments[3:3] = ["--config", f"experiments/e_mim/configs/{overlay}.yaml"]
    if overlay == "mae":
        arguments += ["--model.decoder.decoder_dim=32", "--model.decoder.depth=1", "--model.decoder.num_heads=2"]
    scalars = json.loads((execute(arguments) / "summary.json").read_text())["scalars"]
    assert ("train/loss_barlow_twins" in scalars) == (overlay in ("literal", "feature"))
    if overlay == "literal":
        assert scalars["train/loss_barlow_twins"]["first"] > 20 * scalars["train/loss_reconstruction"]["first"]
