"""A person's folder to a trained encoder: ``init`` looks, ``doctor`` agrees, and ``DATA=archives/NAME.yaml`` trains."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import xxhash
import yaml
from PIL import Image

from common.cli import execute
from common.commands import main as medmim
from datamodules.archive_file import read_archive_file
from datamodules.registry import LAYOUTS
from datamodules.volumes.reading import write_nifti

#: Samples of real archives, and what init makes of them: its layout, or the beginning of its refusal.
SAMPLES = {
    "bids_spine": "bids",
    "brats2023": "brats2023",
    "covid_cxr": "covid_cxr",
    "idrid": "idrid",
    "medicat_sample": "medicat",
    "msd_hippocampus": "msd",
    "prostatex_mha": "pi_cai",
    "rfmid": "rfmid",
    "tcga_fg_6692": "folder",
    "vqa_rad": "vqa_rad",
    "dicom_vendors_reference": "folder",
    "dicom_pdt2_reference": "folder",
    "hapmap3_plink": None,
    "lung_mri": None,
    "odd_nifti": None,
    "openi_reports": None,
    "roco": None,
    "tcga_gbmlgg": None,
    "dicom_pdt2": None,
    "dicom_vendors": None,
    "dicom_faults": None,
    "dicom_fmri_mosaic": None,
    "dicom_radiographs": None,
}
DICOM = any(entry.name == "dicom" for entry in LAYOUTS)


def init(root, *more) -> int:
    """Run ``medmim init`` and return its exit code."""
    try:
        medmim(["init", str(root), *more])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def written(name: str) -> Path:
    return Path("archives") / f"{name}.yaml"


def digest(root: Path) -> str:
    """Return a sum of every name, size and time under a root."""
    sums = xxhash.xxh3_64()
    for path in sorted(root.rglob("*")):
        facts = path.lstat()
        sums.update(f"{path} {facts.st_size} {facts.st_mtime_ns}".encode("utf-8", "surrogatepass"))
    return sums.hexdigest()


def next_command(text: str) -> list[str]:
    """Return the command that init goes on with, as the doctor's arguments."""
    (line,) = [line for line in text.splitlines() if "next: make doctor " in line]
    words = dict(word.split("=", 1) for word in shlex.split(line.partition("make doctor ")[2]))
    configs = f"experiments/{words['EXP']}/configs"
    size = ["--config", f"{configs}/{words['SIZE']}.yaml"] if "SIZE" in words else []
    return ["doctor", "--config", f"{configs}/pretrain.yaml", *size, "--root", words["DATA"],
            *shlex.split(words.get("ARGS", ""))]  # fmt: skip


@pytest.mark.real_data
@pytest.mark.parametrize("name", SAMPLES)
def test_every_real_sample(real_data, name, capsys):
    root, layout = real_data(name), SAMPLES[name]
    if name.startswith("dicom_") and layout is None and DICOM:
        pytest.skip("the samples of DICOM have tests of their own")
    before = digest(root)
    code = init(root)
    first = capsys.readouterr()
    assert digest(root) == before
    if layout is None:
        assert code == 1
        (line,) = [line for line in first.err.splitlines() if line.startswith("error: ")]
        assert len(line) <= 310
        return
    assert code == 0, first.err
    assert len(first.out.splitlines()) <= 14
    assert all(len(line) <= 310 for line in first.out.splitlines())
    content = written(name).read_bytes()
    assert read_archive_file(written(name)).content["layout"] == layout
    assert init(root) == 0
    assert written(name).read_bytes() == content
    capsys.readouterr()
    medmim(next_command(first.out))
    assert "training would accept this archive" in capsys.readouterr().out


@pytest.mark.real_data
def test_bids_spine_is_told_as_it_is(real_data, capsys):
    init(real_data("bids_spine"))
    text = capsys.readouterr().out
    assert "bids (dataset_description.json, BIDSVersion" in text
    assert "used     t1 in 3, t2 in 3, t2star in 3 of 3 cases" in text
    assert "lesion-manual in 3" in text
    assert "not one grid, so grid.reference: t1" in text
    assert "brainmvp not (" in text
    lines = written("bids_spine").read_text()
    assert "# masks: {lesion: {name: lesion-manual, values: [1]}}" in lines
    assert yaml.safe_load(lines)["grid"] == {"reference": "t1"}


RNG = np.random.default_rng(0)


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 255, (64, 64), dtype=np.uint8)).save(path)


def volume(path: Path, change=lambda data: data) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = np.zeros((24, 24, 24), np.float32)
    data[4:20, 4:20, 4:20] = RNG.random((16, 16, 16)) * 100 + 1
    write_nifti(path, change(data), np.eye(4))


def test_prefixed_names(tmp_path, capsys):
    root = tmp_path / "own"
    for case in range(8):
        for name in ("T1w", "T2w", "SWI"):
            volume(root / f"P{case:03d}/P{case:03d}_{name}.nii.gz")
    (root / "notes.mat").touch()
    assert init(root) == 0
    text = capsys.readouterr().out
    assert "t1 in 8, t2 in 8, swi in 8 of 8 cases" in text
    assert "unknown: 1 .mat" in text
    said = read_archive_file(written("own")).content
    assert said["modalities"] == {"t1": "T1w", "t2": "T2w", "swi": "SWI"}
    assert said["ignore"] == ["*.mat"]
    medmim(next_command(text))
    assert "24 used" in capsys.readouterr().out


def test_a_pattern_is_proposed_where_no_names_agree(tmp_path, capsys):
    root = tmp_path / "own"
    for case in range(8):
        for name in ("T1w", "T2w"):
            volume(root / f"S{case:02d}/{991 * case}_{name}_x{7 * case}{name[1]}.nii.gz")
    assert init(root) == 0
    text = capsys.readouterr().out
    assert "t1 in 8, t2 in 8 of 8 cases" in text
    assert read_archive_file(written("own")).content["modalities"] == {"t1": "*[_.-]T1w[_.-]*", "t2": "*[_.-]T2w[_.-]*"}
    medmim(next_command(text))


def test_voxels_are_looked_at(tmp_path, capsys):
    root = tmp_path / "own"
    for case in range(9):
        volume(root / f"S{case:02d}/T1w.nii.gz", lambda data: np.where(data > 0, data - 50, 0).astype(np.float32))
        volume(root / f"S{case:02d}/T2w.nii.gz", lambda data: np.where(data > 0, data, np.nan).astype(np.float32))
    assert init(root) == 0
    said = read_archive_file(written("own")).content
    assert said["voxels"] == {"intensity": {"t1": "standardised"}, "nan": "zero"}
    text = capsys.readouterr().out
    assert "of t1's foreground is negative, so standardised; nan in 8 files" in text
    medmim(next_command(text))


def test_visits_are_asked_about(tmp_path, capsys):
    root = tmp_path / "own"
    for case in range(6):
        for visit in (1, 2):
            volume(root / f"{case:04d}_{visit}/T1w.nii.gz")
    assert init(root) == 0
    text = written("own").read_text()
    assert "# Are 0000_1 and 0000_2 visits of one patient?" in text
    written("own").write_text(text.replace("# subject:", "subject:"))
    capsys.readouterr()
    medmim(["doctor", "--config", "experiments/e_mim/configs/pretrain.yaml", "--root", str(written("own"))])
    assert "12 cases of 6 patients" in capsys.readouterr().out


def test_whose_an_image_is_is_never_guessed(tmp_path, capsys):
    for case in range(8):
        for visit in (1, 2):
            picture(tmp_path / f"repeated/{case:04d}_{visit}.png")
        picture(tmp_path / f"single/photo{case}.png")
        picture(tmp_path / f"people/P{case:02d}/a.png")
        picture(tmp_path / f"people/P{case:02d}/b.png")
    assert init(tmp_path / "repeated") == 1
    assert "only you can answer (subject: whose is an image?)" in capsys.readouterr().err
    text = written("repeated").read_text()
    assert "# subject: {regex: " in text
    doctor = ["doctor", "--config", "experiments/mrm_genetics/configs/pretrain.yaml", "--data.batch_size=4", "--root"]
    with pytest.raises(SystemExit):
        medmim([*doctor, str(written("repeated"))])
    assert "set subject: file, folder or {regex: ...}" in capsys.readouterr().err
    written("repeated").write_text(text.replace("# subject: {", "subject: {"))
    medmim([*doctor, str(written("repeated"))])
    assert "8 samples of 8 patients" in capsys.readouterr().out
    assert init(tmp_path / "single") == 0
    assert read_archive_file(written("single")).content["subject"] == "file"
    assert init(tmp_path / "people") == 1
    assert "are the folders patients or classes?" in capsys.readouterr().err


def test_class_folders(tmp_path, capsys):
    root = tmp_path / "own"
    for name in ("0", "2", "10"):
        for number in range(6):
            picture(root / f"{name}/im{name}{number:03d}.png")
    assert init(root) == 0
    said = read_archive_file(written("own")).content
    assert said["layout"] == "class_folders"
    assert said["targets"] == {"class": {"classes": ["0", "2", "10"]}}  # in natural order
    assert said["subject"] == "file"
    assert "each image counts as a patient" in written("own").read_text()
    medmim(next_command(capsys.readouterr().out))


def write_table(root: Path) -> None:
    lines = ["Filename,PatientID,Findings,Age,Sex,Projection"]
    for number in range(48):
        picture(root / f"images/x{number:03d}.png")
        text, sex, view = "The heart is of normal size and the lungs are clear", "mf"[number % 2], "PA"[number % 2]
        lines.append(f"x{number:03d},{number // 2:04d},{text},{30 + number},{sex},{view}")
    (root / "data.csv").write_text("\n".join(lines) + "\n")


def test_a_table_of_other_column_names(tmp_path, capsys):
    root = tmp_path / "own"
    write_table(root)
    assert init(root) == 0
    said = read_archive_file(written("own")).content
    assert said["columns"] == {"image": "Filename", "subject": "PatientID", "view": "Projection", "text": "Findings"}
    assert said["root"] == str(root / "images")  # whose files the column names
    assert said["table"] == str(root / "data.csv")
    assert said["targets"] == {"Age": {"kind": "regression"}, "Sex": {"classes": ["f", "m"]}}
    text = capsys.readouterr().out
    assert "patients 24, cases 48" in text
    medmim(next_command(text))
    assert init(root, "--table", str(root / "data.csv"), "--out", "archives/again.yaml") == 0
    assert written("again").read_text() == written("own").read_text()
    capsys.readouterr()
    assert init(root, "--table", "gone.csv") == 1
    assert "There is no table gone.csv" in capsys.readouterr().err


def test_captions_in_json_lines(tmp_path, capsys):
    root = tmp_path / "own"
    rows = []
    for number in range(24):
        picture(root / f"img/f{number}.jpg")
        rows.append(
            json.dumps({"file": f"img/f{number}.jpg", "words": f"A figure, number {number}, of several small cells"})
        )
    (root / "captions.jsonl").write_text("\n".join(rows))
    assert init(root, "--exp", "umd") == 0
    said = read_archive_file(written("own")).content
    assert said["columns"] == {"image": "file", "text": "words"}
    medmim(next_command(capsys.readouterr().out))


def test_a_split_that_lost_its_zeros(tmp_path):
    root = tmp_path / "own"
    for case in range(10):
        volume(root / f"{case:04d}/T1w.nii.gz")
    (root / "parts.csv").write_text(
        "patient_id,split\n" + "".join(f"{i},{'train' if i < 8 else 'val'}\n" for i in range(10))
    )
    assert init(root) == 0
    said = read_archive_file(written("own")).content
    assert said["split"] == {"fractions": [0.8, 0.1, 0.1], "seed": 0, "file": "parts.csv", "ids": "pad"}


def test_nothing_of_a_persons_is_written_over(tmp_path, capsys):
    root = tmp_path / "own"
    for case in range(6):
        volume(root / f"S{case:02d}/T1w.nii.gz")
    assert init(root, "--out", str(root / "archive.yaml")) == 1
    assert "nothing is written" in capsys.readouterr().err
    assert init(root) == 0
    written("own").write_text("version: 1  # mine\n")
    assert init(root) == 1
    assert "give --force" in capsys.readouterr().err
    assert written("own").read_text() == "version: 1  # mine\n"
    assert init(root, "--force") == 0
    assert init(root, "--exp", "nothing") == 1
    assert init(root, "--exp", "umd") == 1
    assert "umd: no images and no text" in capsys.readouterr().err


def test_an_unknown_tree_is_refused(tmp_path, capsys):
    (tmp_path / "own").mkdir()
    (tmp_path / "own/a.bin").write_bytes(b"x")
    assert init(tmp_path / "own") == 1
    assert not Path("archives").exists()
    assert re.search("is of no known layout", capsys.readouterr().err)


def tiny(experiment: str) -> list[str]:
    configs = f"experiments/{experiment}/configs"
    return ["fit", "--config", f"{configs}/pretrain.yaml", "--config", f"{configs}/smoke.yaml",
            "--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1",
            "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]  # fmt: skip


@pytest.mark.slow
def test_volumes_train_from_an_archive_file(tmp_path):
    root = tmp_path / "own"
    for case in range(8):
        for name in ("T1w", "T2w"):
            volume(root / f"P{case:03d}/P{case:03d}_{name}.nii.gz")
    assert init(root) == 0
    folder = execute([*tiny("e_mim"), "--data.root", str(written("own")), "--data.crops.size=[16,16,16]",
                      "--model.encoder.patch_size=8"])  # fmt: skip
    assert (folder / "archive.yaml").read_text() == written("own").read_text()
    config = yaml.safe_load((folder / "config.yaml").read_text())["data"]["init_args"]
    assert config["root"] == str(root)
    assert config["modalities"] == ["t1", "t2"]
    assert config["archive"]["modalities"] == {"t1": "T1w", "t2": "T2w"}
    # The run's own configuration holds what its file said, so it goes on without it.
    written("own").unlink()
    (root / "archive.yaml").write_text("modalities: {t2: T2w}\n")
    resumed = execute(["fit", "--config", str(folder / "config.yaml"), "--ckpt_path", str(folder)])
    assert resumed == folder


@pytest.mark.slow
def test_images_train_from_an_archive_file(tmp_path):
    write_table(tmp_path / "own")
    assert init(tmp_path / "own") == 0
    folder = execute([*tiny("mrm_record"), "--data.root", str(written("own")), "--data.batch_size=8"])
    assert (folder / "archive.yaml").is_file()
    assert (folder / "checkpoints/last.ckpt").is_file()
