import os

import pytest
from PIL import Image

from datamodules.images.reading import read_figure, read_gray
from datamodules.images.values import ImageError
from datamodules.tree import Tree
from datamodules.volumes.folder import find_cases


def test_odd_members_of_a_generic_folder(tmp_path):
    (tmp_path / "c00").mkdir()
    for name in ("T1.Nii.GZ", "lesion.SEG.nrrd"):
        (tmp_path / "c00" / name).touch()
    (tmp_path / "c00/t2.nii").symlink_to("c00/gone")
    os.mkfifo(tmp_path / "c00/pd.nii")
    (record,) = find_cases(Tree(tmp_path)).samples
    assert set(record.volumes) == {"T1", "t2", "pd"}
    assert record.masks["seg"].path.name == "lesion.SEG.nrrd"


def test_a_pointer_of_git_lfs_is_no_picture(tmp_path):
    (tmp_path / "image.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    with pytest.raises(ImageError, match="git lfs pull"):
        read_gray(tmp_path / "image.png")


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
