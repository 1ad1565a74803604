import re
import shutil

import pytest

from common.commands import main
from datamodules.examination import spread

CONFIG = ["--config", "experiments/e_mim/configs/pretrain.yaml"]


def doctor(root, *more):
    main(["doctor", *CONFIG, "--root", str(root), *more])


@pytest.fixture
def copy(brats_root, tmp_path):
    return shutil.copytree(brats_root, tmp_path / "brats")


@pytest.mark.parametrize("deep", [[], ["--deep"]])
def test_a_sound_archive(brats_root, capsys, deep):
    doctor(brats_root, *deep)
    text = capsys.readouterr().out
    assert "layout brats2023: 8 cases of 7 patients" in text
    assert "t2f in 7" in text
    assert "faults: none" in text
    assert "cache: at most 0.0" in text
    assert "training would accept" in text


def test_a_few_cases_are_read_whole_and_all_when_asked(copy, capsys, monkeypatch):
    monkeypatch.setattr(spread, "__defaults__", (0,))
    path = next((copy / "BraTS-GLI-00001-000").glob("*-t1n.nii.gz"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    doctor(copy)
    assert "faults: none in the headers and in the 0 cases read whole; DEEP=1" in capsys.readouterr().out
    doctor(copy, "--deep")
    text = capsys.readouterr().out
    assert "faults: 1 of 8 cases. By kind: checksum 1." in text
    assert str(path) in text
    monkeypatch.setattr(spread, "__defaults__", (8,))
    doctor(copy)
    assert "faults: 1 of 8 cases. By kind: checksum 1." in capsys.readouterr().out


def test_members_are_chosen_from_all_over():
    assert spread(range(100)) == [0, 12, 25, 37, 50, 62, 75, 87]
    assert spread(range(3)) == [0, 1, 2]
    assert spread([]) == []


def test_faults_of_most_cases_that_were_read_whole_are_a_reason(copy, capsys, monkeypatch):
    monkeypatch.setattr(spread, "__defaults__", (7,))
    for folder in sorted(path for path in copy.iterdir() if path.is_dir())[:5]:
        path = next(folder.glob("*-t1n.nii.gz"))
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(bytes(content))
    with pytest.raises(SystemExit):
        doctor(copy)
    assert re.search("[45] of the 7 cases that were read whole are faulty", capsys.readouterr().err)


def test_it_fails_where_training_would_refuse(copy, capsys):
    for folder in sorted(p for p in copy.iterdir() if p.is_dir())[:6]:
        next(folder.glob("*-t1c.nii.gz")).write_bytes(b"x")
    with pytest.raises(SystemExit) as stop:
        doctor(copy)
    assert stop.value.code == 1
    assert "6 faulty cases, more than the 5 that are tolerated" in capsys.readouterr().err


def test_the_same_image_in_two_patients_is_a_leak(copy, capsys):
    source, target = (copy / f"BraTS-GLI-0000{i}-000" / f"BraTS-GLI-0000{i}-000-t1c.nii.gz" for i in (0, 1))
    shutil.copy(source, target)
    with pytest.raises(SystemExit):
        doctor(copy, "--deep")
    assert "1 files occur in several patients" in capsys.readouterr().err


def test_another_grid(copy, capsys):
    other = copy / "BraTS-GLI-00003-000" / "BraTS-GLI-00003-000-t2w.nii.gz"
    import nibabel as nib
    import numpy as np

    from datamodules.volumes.reading import write_nifti

    image = nib.load(other)
    write_nifti(other, np.asanyarray(image.dataobj)[:-2], image.affine)
    doctor(copy)
    assert "By kind: grid 1" in capsys.readouterr().out


def test_prepare_split_and_unknown_roots(copy, tmp_path, capsys):
    main(["prepare", *CONFIG, "--root", str(copy), "--set", "cache.format=b2nd"])
    assert "faults: none" in capsys.readouterr().out
    main(["split", *CONFIG, "--root", str(copy), "--out", str(tmp_path / "split.csv")])
    assert len((tmp_path / "split.csv").read_text().splitlines()) == 9
    with pytest.raises(SystemExit) as stop:
        main(["prepare", *CONFIG, "--root", str(tmp_path / "nowhere")])
    assert stop.value.code == 1
    assert "is not a folder" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["prepare", *CONFIG, "--root", str(copy), "--set", "cache.format=none"])
    assert "no cache" in capsys.readouterr().err


def test_wrong_usage():
    for arguments in ([], ["operate"], ["doctor"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2


def test_a_few_cases_all_broken_are_no_archive(copy, capsys):
    for folder in sorted(p for p in copy.iterdir() if p.is_dir())[5:]:
        shutil.rmtree(folder)
    for path in copy.glob("*/*.nii.gz"):
        path.write_bytes(b"x")
    with pytest.raises(SystemExit):
        doctor(copy)
    assert "none of the cases of the training split can be used" in capsys.readouterr().err


def test_less_than_a_batch_is_refused(copy, capsys):
    with pytest.raises(SystemExit):
        doctor(copy, "--set", "batch_size=16")
    assert "gives 6 samples, fewer than one batch of 16" in capsys.readouterr().err


def test_broken_labels_matter_where_labels_are_used(copy, capsys):
    for path in copy.glob("*/*-seg.nii.gz"):
        path.write_bytes(b"x")
    doctor(copy)
    assert "faults: none" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        doctor(copy, "--set", "labels.needed=true")


def test_a_study_without_its_reference_is_named(pi_cai_root, tmp_path, capsys):
    root = shutil.copytree(pi_cai_root, tmp_path / "pi_cai")
    next(root.rglob("*_t2w.mha")).unlink()
    doctor(root)
    assert "the case has no t2w" in capsys.readouterr().out
