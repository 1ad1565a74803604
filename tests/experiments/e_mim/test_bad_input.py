"""What an archive or a checkpoint can have wrong: one clear sentence, or one row and the run goes on."""

import csv
import gzip
import json
import shutil

import nibabel as nib
import numpy as np
import pytest

from common.cli import execute

ALL = "--data.split.fractions=[0.75,0.25,0.0]"


@pytest.fixture
def copy(brats_root, tmp_path):
    return shutil.copytree(brats_root, tmp_path / "archive")


def member(root, case, modality):
    return next(root.glob(f"BraTS-GLI-{case:05d}-000/*-{modality}.nii.gz"))


def rewrite(path, change):
    image = nib.load(path)
    data = change(np.asarray(image.dataobj).astype(np.float32))
    nib.save(nib.Nifti1Image(data, image.affine), path)


def rows_after_training(arguments):
    folder = execute(arguments)
    assert json.loads((folder / "summary.json").read_text())["status"] == "finished"
    return list(csv.DictReader((folder / "data_faults.csv").open()))


def test_a_root_that_is_not_brats(refusal, pretrain_arguments, tmp_path):
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday/photo.jpg").write_bytes(b"x")
    line = refusal(pretrain_arguments(root=tmp_path / "holiday"))
    assert "holiday" in line
    assert "A plain image archive gives images; e_mim needs volumes, so volumes are lacking" in line


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_byte(path):
    """Flip one byte in the middle of the compressed stream."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(bytes(content))


def not_finite(path):
    def change(data):
        data[3, 4, 5] = np.nan
        return data

    rewrite(path, change)


def other_shape(path):
    rewrite(path, lambda data: data[:, :, :-4])


def other_place(path):
    image = nib.load(path)
    affine = image.affine.copy()
    affine[0, 3] += 7
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), affine), path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "kinds"),
    [(truncate, {"unreadable"}), (flip_byte, {"unreadable", "checksum"}), (not_finite, {"nan"}),
     (other_shape, {"grid", "shape"}), (other_place, {"grid"})],
)  # fmt: skip
def test_one_broken_file_is_one_row_and_training_goes_on(copy, pretrain_arguments, damage, kinds):
    path = member(copy, 1, "t1c")
    damage(path)
    rows = rows_after_training(pretrain_arguments(ALL, "--trainer.max_epochs=1", root=copy))
    assert len(rows) == 1
    assert rows[0]["path"].endswith(path.name)
    assert rows[0]["kind"] in kinds
    assert rows[0]["detail"]


@pytest.mark.slow
def test_a_flipped_byte_that_still_unpacks_is_found_by_its_checksum(copy, pretrain_arguments):
    """gzip's own check sum is the only witness; nibabel alone may return the wrong voxels."""
    path = member(copy, 1, "t1c")
    content = bytearray(gzip.compress(gzip.decompress(path.read_bytes()), compresslevel=0))
    content[len(content) // 2] ^= 0x01
    path.write_bytes(bytes(content))
    rows = rows_after_training(pretrain_arguments(ALL, "--trainer.max_epochs=1", root=copy))
    assert [row["kind"] for row in rows] in (["unreadable"], ["checksum"])


@pytest.mark.slow
def test_a_missing_modality_trains_without_a_row(copy, pretrain_arguments):
    member(copy, 1, "t1n").unlink()
    member(copy, 4, "t2f").unlink()
    assert rows_after_training(pretrain_arguments(ALL, "--trainer.max_epochs=1", root=copy)) == []


@pytest.mark.slow
def test_a_label_outside_the_releases_set(copy, tmp_path):
    for case in (1, 4):
        rewrite(member(copy, case, "seg"), lambda data: np.where(data == 3, 4, data))
    arguments = ["fit", "--config", "experiments/e_mim/configs/finetune_brats_seg.yaml", f"--data.root={copy}",
                 "--data.crops.size=[32,32,32]", "--data.num_workers=0", "--data.batch_size=2", ALL,
                 "--model.network.feature_size=4", "--model.encoder.embed_dim=32", "--model.encoder.depth=4",
                 "--model.encoder.num_heads=2", "--trainer.max_epochs=1", "--trainer.precision=32-true",
                 "--trainer.enable_progress_bar=false"]  # fmt: skip
    rows = rows_after_training(arguments)
    assert [row["kind"] for row in rows] == ["label", "label"]
    assert all("4" in row["detail"] for row in rows)


def test_a_patient_in_two_splits(refusal, copy, pretrain_arguments, tmp_path):
    split = tmp_path / "split.csv"
    names = sorted(path.name for path in copy.iterdir() if path.is_dir())
    split.write_text("case_id,split\n" + "".join(f"{n},{'val' if n.endswith('-001') else 'train'}\n" for n in names))
    line = refusal(pretrain_arguments(f"--data.split.file={split}", root=copy))
    assert "BraTS-GLI-00006" in line
    assert "train" in line
    assert "val" in line


def test_too_many_broken_cases(refusal, copy, pretrain_arguments):
    for case in range(6):
        truncate(member(copy, case, "t1c"))
    line = refusal(pretrain_arguments(root=copy))
    assert "6 of 8 samples are faulty" in line


@pytest.mark.slow
def test_a_checkpoint_of_another_shape(refusal, pretrain_arguments):
    folder = execute(pretrain_arguments("--trainer.max_steps=1", "--trainer.limit_val_batches=1"))
    other = pretrain_arguments("--model.encoder.embed_dim=48", f"--ckpt_path={folder}")
    line = refusal(other)
    assert "32" in line
    assert "48" in line
    deeper = pretrain_arguments("--model.encoder.depth=3", f"--ckpt_path={folder}")
    assert "blocks.2" in refusal(deeper)


@pytest.mark.slow
def test_a_checkpoint_for_other_data(refusal, pretrain_arguments, lung_root):
    folder = execute(pretrain_arguments("--trainer.max_steps=1", "--trainer.limit_val_batches=1"))
    arguments = [*pretrain_arguments(f"--ckpt_path={folder}", root=lung_root), "--data.crops.size=[32,32,16]"]
    assert "8 of its 8 cases are gone" in refusal(arguments)
    assert "none of its 8 cases is there" in refusal([*arguments, "--data.changed_archive=use"])


def test_something_that_is_no_checkpoint(refusal, pretrain_arguments, tmp_path):
    (tmp_path / "weights.ckpt").write_bytes(b"not a checkpoint")
    assert "weights.ckpt" in refusal(pretrain_arguments(f"--ckpt_path={tmp_path / 'weights.ckpt'}"))
