"""Archives as people have them, each from a folder to a trained encoder in three commands: init, doctor, pretrain."""

import json

import numpy as np
import pytest
import yaml
from PIL import Image

from common.cli import execute
from common.commands import main as medmim
from datamodules.volumes.reading import write_nifti
from tests.datamodules.commands.test_init import init, next_command, tiny, written
from tests.datamodules.dicom.test_layout import noisy, write_picture

RNG = np.random.default_rng(0)


def photograph(path, size=(64, 64, 3)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 255, size, dtype=np.uint8)).save(path)


def scan(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = np.zeros((24, 24, 24), np.float32)
    data[4:20, 4:20, 4:20] = RNG.random((16, 16, 16)) * 100 + 1
    write_nifti(path, data, np.eye(4))


def write_dicom_brains(root):
    for number in range(8):
        for series, name in (("2", "t1_mprage_sag"), ("3", "T2 FLAIR AX"), ("9", "Localizer")):
            noisy(root / f"PAT{number}/S{series}", range(12 if series != "9" else 3), series=series, description=name,
                  patient=f"P{number}", study=f"1.2.{number}", frame=f"1.3.{number}")  # fmt: skip


def write_bids(root):
    for number in range(8):
        for name in ("T1w", "FLAIR"):
            scan(root / f"sub-{number:02d}/anat/sub-{number:02d}_{name}.nii.gz")
    (root / "dataset_description.json").write_text('{"Name": "own", "BIDSVersion": "1.8.0"}')
    (root / "participants.tsv").write_text(
        "participant_id\tage\n" + "".join(f"sub-{i:02d}\t{40 + i}\n" for i in range(8))
    )


def write_decathlon(root):
    for number in range(8):
        scan(root / f"imagesTr/la_{number:03d}.nii.gz")
        label = np.zeros((24, 24, 24), np.uint8)
        label[8:12, 8:12, 8:12] = 1
        (root / "labelsTr").mkdir(exist_ok=True)
        write_nifti(root / f"labelsTr/la_{number:03d}.nii.gz", label, np.eye(4))
    training = [{"image": f"./imagesTr/la_{i:03d}.nii.gz", "label": f"./labelsTr/la_{i:03d}.nii.gz"} for i in range(8)]
    said = {"modality": {"0": "MRI"}, "labels": {"0": "background", "1": "atrium"}, "training": training, "test": []}
    (root / "dataset.json").write_text(json.dumps(said))


def write_radiographs_with_a_table(root):
    lines = ["Filename;PatientID;Findings"]
    for number in range(48):
        photograph(root / f"images/x{number:03d}.png", (64, 64))
        lines.append(f"x{number:03d};{number // 2:04d};The heart is of normal size and lung {number} is clear")
    (root / "data.csv").write_text("\n".join(lines) + "\n")


def write_dicom_radiographs(root):
    for number in range(24):
        write_picture(root / f"{number:03d}/IM0", number=number + 1, patient=f"P{number}")


def write_class_folders(root):
    for grade in ("0", "1", "2"):
        for number in range(8):
            photograph(root / f"{grade}/eye{grade}{number:03d}.jpg")


def write_captions(root):
    rows = []
    for number in range(24):
        photograph(root / f"figures/f{number}.jpg")
        rows.append(json.dumps({"file": f"figures/f{number}.jpg", "words": f"A figure with {number} small cells"}))
    (root / "captions.jsonl").write_text("\n".join(rows))


CROPS = ["--data.crops.size=[16,16,16]", "--model.encoder.patch_size=8"]
#: Kind of archive: who writes it, layout, experiment, arguments of a run small enough.
KINDS = {
    "DICOM series": (write_dicom_brains, "dicom", "e_mim", CROPS),
    "BIDS": (write_bids, "bids", "e_mim", CROPS),
    "Medical Decathlon": (write_decathlon, "msd", "e_mim", CROPS),
    "radiographs with a table": (write_radiographs_with_a_table, "table", "mrm_record", ["--data.batch_size=8"]),
    "DICOM radiographs": (write_dicom_radiographs, "dicom", "mrm_genetics", ["--data.batch_size=8"]),
    "class folders": (write_class_folders, "class_folders", "mrm_genetics", ["--data.batch_size=8"]),
    "captions": (write_captions, "table", "umd", ["--data.batch_size=8"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_from_a_folder_to_an_encoder(kind, tmp_path, capsys):
    write, layout, experiment, more = KINDS[kind]
    root = tmp_path / "own"
    root.mkdir()
    write(root)
    assert init(root, "--exp", experiment) == 0, capsys.readouterr().err
    said = yaml.safe_load(written("own").read_text())
    assert said["layout"] == layout
    medmim(next_command(capsys.readouterr().out))
    assert "training would accept this archive" in capsys.readouterr().out
    folder = execute([*tiny(experiment), "--data.root", str(written("own")), *more])
    assert (folder / "checkpoints/last.ckpt").is_file()
    rows = (folder / "account.csv").read_text().splitlines()
    assert not [row for row in rows if row.startswith("unknown")]
    assert (folder / "archive.yaml").read_text() == written("own").read_text()
    assert json.loads((folder / "summary.json").read_text())["status"] == "finished"


@pytest.mark.slow
@pytest.mark.parametrize("experiment", ["mrm_genetics", "mrm_record", "umd"])
def test_one_table_of_photographs_feeds_three_methods(experiment, tmp_path):
    """Archives.md, case 1: a CSV of fundus images trains mrm_genetics; with texts mrm_record and umd."""
    root = tmp_path / "eyes"
    text = "" if experiment == "mrm_genetics" else ",text"
    lines = [f"image,subject{text}"]
    for number in range(32):
        photograph(root / f"{number}.png")
        lines.append(f"{number}.png,p{number}" + (f",Retina with {number} small haemorrhages" if text else ""))
    (root / "eyes.csv").write_text("\n".join(lines) + "\n")
    folder = execute([*tiny(experiment), "--data.root", str(root), "--data.batch_size=8"])
    assert (folder / "checkpoints/last.ckpt").is_file()


@pytest.mark.real_data
@pytest.mark.parametrize(("name", "words"), [
    ("dicom_pdt2", "used     t2 in 1, pd in 1 of 1 cases"), ("dicom_radiographs", "used     3 images"),
])  # fmt: skip
def test_real_dicom_is_looked_at(name, words, real_data, capsys):
    assert init(real_data(name)) == 0
    first = capsys.readouterr().out
    content = written(name).read_bytes()
    assert words in first
    assert init(real_data(name)) == 0
    assert written(name).read_bytes() == content
    capsys.readouterr()
    medmim(next_command(first))
    assert "training would accept this archive" in capsys.readouterr().out


@pytest.mark.real_data
@pytest.mark.parametrize(("name", "words"), [
    ("dicom_vendors", "subject: whose is a study?"), ("dicom_faults", "Nothing can be trained on"),
    ("dicom_fmri_mosaic", "None of 4 kinds of series is used"),
])  # fmt: skip
def test_real_dicom_that_trains_nothing_says_why(name, words, real_data, capsys):
    assert init(real_data(name)) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert words in line
    assert len(line) <= 310
