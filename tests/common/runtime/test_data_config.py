from argparse import Namespace

import pytest

from common.errors import UserError
from common.runtime.data_config import data_section, make_datamodule, read_data_section
from datamodules.volumes.datamodule import VolumeDataModule

CONFIGS = "experiments/e_mim/configs"


def test_later_configurations_win():
    section = read_data_section([f"{CONFIGS}/pretrain.yaml", f"{CONFIGS}/small.yaml"])
    assert section["class_path"] == "datamodules.volumes.datamodule.VolumeDataModule"
    assert section["init_args"]["crops"]["size"] == [64, 64, 64]


def test_switches_win_over_configurations():
    args = Namespace(
        config=[f"{CONFIGS}/pretrain.yaml"], root="/archive", layout=None, set=["cache.format=b2nd", "data.seed=3"]
    )
    options = data_section(args)["init_args"]
    assert (options["root"], options["cache"], options["seed"]) == ("/archive", {"format": "b2nd"}, 3)
    assert options["loader"] == {"draws": 1, "val_draws": 4}, "what the configuration says besides stays"
    assert isinstance(make_datamodule(args), VolumeDataModule)


def test_what_is_wrong_is_named(tmp_path):
    with pytest.raises(UserError, match=r"gone\.yaml does not exist"):
        read_data_section(["gone.yaml"])
    (tmp_path / "model_only.yaml").write_text("model: {}\n")
    with pytest.raises(UserError, match="no data module"):
        read_data_section([str(tmp_path / "model_only.yaml")])
    with pytest.raises(UserError, match="NAME=VALUE"):
        data_section(Namespace(config=[f"{CONFIGS}/pretrain.yaml"], root=None, layout=None, set=["cache"]))


@pytest.mark.parametrize("setting", ["cash=b2nd", "batch_size=many", "batch_size=0"])
def test_settings_that_cannot_be_are_one_line(setting):
    args = Namespace(config=[f"{CONFIGS}/pretrain.yaml"], root=None, layout=None, set=[setting])
    with pytest.raises(UserError) as error:
        make_datamodule(args)
    assert setting.split("=")[0] in str(error.value)
    assert "\n" not in str(error.value)
