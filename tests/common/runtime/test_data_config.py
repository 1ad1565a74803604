import pytest

from common.errors import UserError
from common.runtime.data_config import Archive
from datamodules.volumes.datamodule import VolumeDataModule

CONFIGS = "experiments/e_mim/configs"


def test_later_configurations_win():
    section = Archive([f"{CONFIGS}/pretrain.yaml", f"{CONFIGS}/small.yaml"]).section
    assert section["class_path"] == "datamodules.volumes.datamodule.VolumeDataModule"
    assert section["init_args"]["crops"]["size"] == [64, 64, 64]


def test_switches_win_over_configurations():
    archive = Archive([f"{CONFIGS}/pretrain.yaml"], "/archive", settings=["cache.format=b2nd", "data.seed=3"])
    options = archive.section["init_args"]
    assert (options["root"], options["cache"], options["seed"]) == ("/archive", {"format": "b2nd"}, 3)
    assert options["loader"] == {"draws": 1, "val_draws": 4}, "what the configuration says besides stays"
    assert isinstance(archive.datamodule(), VolumeDataModule)


def test_what_is_wrong_is_named(tmp_path):
    with pytest.raises(UserError, match=r"gone\.yaml does not exist"):
        Archive(["gone.yaml"])
    (tmp_path / "model_only.yaml").write_text("model: {}\n")
    with pytest.raises(UserError, match="no data module"):
        Archive([str(tmp_path / "model_only.yaml")])
    with pytest.raises(UserError, match="NAME=VALUE"):
        Archive([f"{CONFIGS}/pretrain.yaml"], settings=["cache"])


@pytest.mark.parametrize("setting", ["cash=b2nd", "batch_size=many", "batch_size=0"])
def test_settings_that_cannot_be_are_one_line(setting):
    with pytest.raises(UserError) as error:
        Archive([f"{CONFIGS}/pretrain.yaml"], settings=[setting]).datamodule()
    assert setting.split("=")[0] in str(error.value)
    assert "\n" not in str(error.value)
