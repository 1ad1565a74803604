"""Real archives decide whether it works. MEDMIM_DATA points to them."""

import csv
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from common.cli import execute, main
from common.errors import DataError
from datamodules.configs import SplitConfig
from datamodules.registry import open_archive
from datamodules.volumes.datamodule import CropConfig, VolumeDataModule
from datamodules.volumes.pi_cai import read_marksheet
from datamodules.volumes.prepare import prepare_case

pytestmark = pytest.mark.real_data


def test_brats_2023_is_read_voxel_by_voxel(real_data, volumes_of):
    root = real_data("brats2023")
    layout, cases = volumes_of(root)
    assert layout.name == "brats2023"
    assert len(cases) == 6
    assert {len(case.images) for case in cases} == {4}
    assert "001" in {case.case_id[-3:] for case in cases}
    case = cases[0]
    prepared = prepare_case(case, layout, layout.modalities)
    assert prepared.faults == prepared.label_faults == []
    source = nib.load(case.labels["seg"])
    counts = dict(zip(*np.unique(np.asarray(source.dataobj), return_counts=True), strict=True))
    ours = dict(zip(*np.unique(prepared.label, return_counts=True), strict=True))
    assert {k: v for k, v in counts.items() if k} == {k: v for k, v in ours.items() if k}


def test_brats_2023_trains_and_the_loss_falls(real_data, pretrain_arguments):
    folder = execute(pretrain_arguments("--data.loader.draws=8", "--data.split.fractions=[0.84,0.16,0.0]",
                                        "--trainer.max_epochs=5", "--model.optimization.optimizer.lr=1e-3",
                                        root=real_data("brats2023")))  # fmt: skip
    summary = json.loads((folder / "summary.json").read_text())
    assert list(csv.DictReader((folder / "data_faults.csv").open())) == []
    ratio = summary["scalars"]["collapse/floor_ratio"]
    assert ratio["final"] < 0.7 * ratio["first"]


def test_prostates_come_to_the_t2_grid_and_train(real_data, pretrain_arguments, volumes_of):
    root = real_data("prostatex_mha")
    layout, cases = volumes_of(root)
    assert layout.name == "pi_cai"
    assert len(cases) == 3
    prepared = prepare_case(cases[0], layout, layout.modalities)
    assert prepared.faults == []
    assert prepared.image.shape[0] == 3
    assert all(float(channel.astype(np.float32).std()) > 0 for channel in prepared.image)
    folder = execute(pretrain_arguments("--data.crops.size=[64,64,16]", "--data.split.fractions=[0.67,0.33,0.0]",
                                        "--trainer.max_epochs=1", root=root))  # fmt: skip
    assert json.loads((folder / "summary.json").read_text())["steps"] >= 1
    assert list(csv.DictReader((folder / "data_faults.csv").open())) == []


def test_the_official_marksheet(real_data):
    root = real_data("picai_labels")
    rows = read_marksheet(next(root.rglob("marksheet.csv")))
    assert len(rows) == 1500
    assert sum(row["csPCa"] == "1" for row in rows.values()) == 425


def test_a_raw_case_is_one_case_flat_too_and_only_what_shares_a_grid_is_stacked(real_data, tmp_path):
    root = real_data("tcga_fg_6692")
    (record,) = open_archive(root, needs={"volumes"}).records
    assert sorted(record.volumes) == ["flair", "t1", "t1c", "t2"]
    case = tmp_path / "raw/TCGA-FG-6692"
    case.mkdir(parents=True)
    for path in root.glob("*.nii.gz"):
        shutil.copy(path, case / f"{path.name.removesuffix('.nii.gz').rpartition('_')[2]}.nii.gz")
    data = VolumeDataModule(
        str(tmp_path / "raw"),
        crops=CropConfig((32, 32, 16)),
        split=SplitConfig((1.0, 0.0, 0.0)),
        batch_size=1,
    )
    data.prepare_data()
    data.setup("fit")
    assert [(fault.kind, Path(fault.path).name) for fault in data.ledger.faults] == [
        ("grid", "fla.nii.gz"),
        ("grid", "t2.nii.gz"),
    ]
    batch = next(iter(data.train_dataloader()))
    names = data.input_spec.channels
    assert {name for name, there in zip(names, batch["modality_mask"][0].tolist(), strict=True) if there} == {
        "t1",
        "t1c",
    }
    for name in ("t1c",):
        (case / f"{name}.nii.gz").unlink()
    with pytest.raises(DataError, match="the modalities lie on different grids"):
        train_on(tmp_path / "raw")


def train_on(root):
    """Set up a data module as a run does."""
    data = VolumeDataModule(str(root), crops=CropConfig((32, 32, 16)), split=SplitConfig((1.0, 0.0, 0.0)), batch_size=1)
    data.prepare_data()
    data.setup("fit")


def test_flat_slices_are_no_volumes(real_data, pretrain_arguments, capsys):
    with pytest.raises(SystemExit):
        main(pretrain_arguments(root=real_data("lung_mri")))
    assert "error: " in capsys.readouterr().err


def test_segmentation_of_real_tumours(real_data):
    common = ["--config", "experiments/e_mim/configs/finetune_brats_seg.yaml", f"--data.root={real_data('brats2023')}",
              "--data.crops.size=[64,64,64]", "--data.num_workers=0", "--data.batch_size=2", "--model.encoder.depth=4",
              "--model.network.feature_size=4", "--model.encoder.embed_dim=32", "--model.encoder.num_heads=2",
              "--data.split.fractions=[0.67,0.16,0.17]", "--trainer.enable_progress_bar=false"]  # fmt: skip
    folder = execute(["fit", *common, "--trainer.max_steps=4", "--trainer.check_val_every_n_epoch=1",
                      "--data.loader.draws=2"])  # fmt: skip
    tested = execute(["test", *common, f"--ckpt_path={folder}"])
    metrics = json.loads((tested / "metrics.json").read_text())
    assert metrics["n"] == 1
    assert all(np.isfinite(metrics[f"hd95_{region}"]["mean"]) for region in ("WT", "TC", "ET"))
    predicted = execute(["predict", *common, f"--ckpt_path={folder}"])
    volume = next((predicted / "predictions").glob("*.nii.gz"))
    source = next(real_data("brats2023").glob(f"{volume.name.removesuffix('.nii.gz')}/*-seg.nii.gz"))
    assert nib.load(volume).shape == nib.load(source).shape
    assert np.allclose(nib.load(volume).affine, nib.load(source).affine)
