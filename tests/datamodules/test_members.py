import os

import numpy as np
import pytest
from PIL import Image

from common.errors import DataError
from datamodules import notes
from datamodules.images.reading import read_figure, read_gray
from datamodules.images.values import ImageError
from datamodules.members import check_content, members_of
from datamodules.volumes.datamodule import VolumeDataModule
from datamodules.volumes.reading import write_nifti


@pytest.fixture
def archive(tmp_path):
    """Twenty cases of one volume."""
    data = np.random.default_rng(0).integers(1, 100, (8, 8, 8)).astype(np.int16)
    for number in range(20):
        write_nifti(tmp_path / "root" / f"c{number:02d}" / "t1.nii.gz", data, np.eye(4))
    return tmp_path / "root"


def test_whatever_has_the_name_of_a_member_is_one(tmp_path, capsys):
    """What is no file must become a row, and cannot where it is not listed."""
    for name in ("a.NII.GZ", "b.nii", "._a.nii.gz", ".hidden.nii", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "link.nii").symlink_to("gone")
    (tmp_path / "folder.Nii.gz").mkdir()
    os.mkfifo(tmp_path / "pipe.nii")
    for _ in range(2):
        found = [path.name for path in members_of(tmp_path, (".nii", ".nii.gz"))]
    assert found == ["a.NII.GZ", "b.nii", "folder.Nii.gz", "link.nii", "pipe.nii"]
    notes.say_notes()
    assert "litter of file systems was ignored (._*): 1 file\n" in capsys.readouterr().out


def test_odd_members_of_a_generic_folder(archive, volumes_of):
    case = archive / "c00"
    (case / "t1.nii.gz").rename(case / "T1.Nii.GZ")
    (case / "t2.nii").symlink_to("gone")
    (case / "pd.mnc").touch()
    (case / "lesion.SEG.nrrd").touch()
    _, cases = volumes_of(archive)
    assert set(cases[0].images) == {"t1", "t2", "pd"}
    assert cases[0].labels["seg"].name == "lesion.SEG.nrrd"


def test_links_without_content(archive, capsys):
    paths = sorted(archive.glob("*/t1.nii.gz"))
    paths[0].unlink()
    paths[0].symlink_to(".git/annex/objects/xx/SHA256E-s1--0.nii.gz")
    check_content(paths, archive)
    assert "1 of 20 files are links without content: run datalad get ." in capsys.readouterr().out
    paths[1].unlink()
    paths[1].symlink_to("gone")
    with pytest.raises(DataError, match=r"^2 of 20 files are links without content: run datalad get \."):
        VolumeDataModule(str(archive)).index()


def test_pointers_of_git_lfs(archive, tmp_path):
    paths = sorted(archive.glob("*/t1.nii.gz"))
    for path in paths[:5]:
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    with pytest.raises(DataError, match="5 of 20 files are Git LFS pointers without content: run git lfs pull"):
        check_content(paths, archive)
    paths[0].rename(tmp_path / "image.png")
    with pytest.raises(ImageError, match="git lfs pull"):
        read_gray(tmp_path / "image.png")


def test_only_a_sample_of_a_large_archive_is_looked_at(archive, monkeypatch):
    monkeypatch.setattr("datamodules.members._SAMPLE", 10)
    paths = sorted(archive.glob("*/t1.nii.gz"))
    for path in paths[1::2]:
        path.unlink()
    check_content(paths, archive)


@pytest.mark.parametrize("read", [read_gray, read_figure])
def test_pictures_that_are_no_files(tmp_path, read):
    (tmp_path / "link.png").symlink_to("gone")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    Image.new("L", (40, 40)).save(tmp_path / "scan.png")
    (tmp_path / "scan.png").rename(tmp_path / "scan.dcm.gz")
    for name, words in {"link": "datalad", "pipe": "a pipe", "folder": "a folder", "scan": "gunzip"}.items():
        with pytest.raises(ImageError, match=words):
            read(next(tmp_path.glob(f"{name}.*")))
