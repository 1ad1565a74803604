import gzip

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from datamodules.storage import fingerprint
from datamodules.volumes.reading import VolumeError, read_header, read_volume, write_nifti


@pytest.fixture
def volume(tmp_path):
    data = np.random.default_rng(0).integers(0, 1000, (12, 10, 8)).astype(np.int16)
    path = tmp_path / "image.nii.gz"
    write_nifti(path, data, np.diag([1.0, 1.0, 2.0, 1.0]))
    return path, data


def test_reads_back(volume):
    path, data = volume
    read = read_volume(path)
    assert np.array_equal(read.data, data)
    assert read.source == fingerprint(path)
    assert read_header(path).shape == data.shape


def test_axes_are_turned_to_ras_without_moving_the_anatomy(volume, tmp_path):
    """The same head stored LPS and stored RAS gives the same array."""
    _, data = volume
    lps = np.diag([-1.0, -1.0, 2.0, 1.0])
    lps[:2, 3] = 11, 9
    write_nifti(tmp_path / "lps.nii.gz", data[::-1, ::-1], lps)
    turned = read_volume(tmp_path / "lps.nii.gz")
    assert np.array_equal(turned.data, data)
    assert nib.aff2axcodes(turned.affine) == ("R", "A", "S")
    assert np.array_equal(turned.file_affine, lps)
    assert np.allclose(read_header(tmp_path / "lps.nii.gz").affine, turned.affine)


def test_metaimage_equals_nifti(volume, tmp_path):
    """ITK's world is LPS: the affine must come out the same whichever format holds the volume."""
    path, data = volume
    image = sitk.ReadImage(str(path))
    sitk.WriteImage(image, str(tmp_path / "image.mha"))
    read = read_volume(tmp_path / "image.mha")
    assert np.array_equal(read.data, data)
    assert np.allclose(read.affine, read_volume(path).affine)
    assert np.allclose(read_header(tmp_path / "image.mha").affine, read.affine)


def test_a_truncated_file(volume):
    path, _ = volume
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(VolumeError, match="truncated") as error:
        read_volume(path)
    assert error.value.kind == "unreadable"


def test_one_flipped_byte_is_found(tmp_path):
    """Readers that stop at the last voxel return wrong voxels without a word; the check sum is never looked at."""
    data = np.random.default_rng(0).integers(0, 3, (40, 40, 40)).astype(np.int16)
    path = tmp_path / "image.nii.gz"
    write_nifti(path, data, np.eye(4))
    content = bytearray(path.read_bytes())
    silent = None
    for offset in range(len(content) // 2, len(content) // 2 + 400):
        damaged = content.copy()
        damaged[offset] ^= 1
        path.write_bytes(bytes(damaged))
        try:
            wrong = np.asanyarray(nib.load(path).dataobj)
        except Exception:
            continue
        if not np.array_equal(wrong, data):
            silent = offset
            break
    assert silent is not None
    with pytest.raises(VolumeError) as error:
        read_volume(path)
    assert error.value.kind == "checksum"


def test_what_is_no_volume(tmp_path):
    (tmp_path / "text.nii.gz").write_text("not an image")
    (tmp_path / "zip.nii.gz").write_bytes(gzip.compress(b"not an image"))
    (tmp_path / "text.mha").write_text("not an image")
    write_nifti(tmp_path / "flat.nii", np.zeros((4, 4), np.uint8), np.eye(4))
    write_nifti(tmp_path / "series.nii", np.zeros((4, 4, 4, 3), np.uint8), np.eye(4))
    expected = {"text.nii.gz": "unreadable", "zip.nii.gz": "unreadable", "text.mha": "unreadable", "flat.nii": "shape",
                "series.nii": "shape", "gone.nii": "missing"}  # fmt: skip
    for name, kind in expected.items():
        with pytest.raises(VolumeError) as error:
            read_volume(tmp_path / name)
        assert error.value.kind == kind, name


def test_a_header_that_promises_too_much_is_not_believed(tmp_path):
    image = nib.Nifti1Image(np.zeros((2, 2, 2), np.uint8), np.eye(4))
    image.header["dim"][1:4] = (30000, 30000, 30000)
    (tmp_path / "bomb.nii").write_bytes(image.header.binaryblock + bytes(100))
    with pytest.raises(VolumeError) as error:
        read_volume(tmp_path / "bomb.nii")
    assert error.value.kind == "shape"


def test_a_trailing_axis_of_one_is_fine(tmp_path):
    write_nifti(tmp_path / "x.nii", np.ones((4, 5, 6, 1), np.uint8), np.eye(4))
    assert read_volume(tmp_path / "x.nii").data.shape == (4, 5, 6)


@pytest.mark.parametrize("column", [[0, 0, 0], [np.nan, 1, 1], [1, 0, 0]], ids=["zero", "nan", "as the first"])
@pytest.mark.parametrize("read", [read_volume, read_header])
def test_an_affine_that_places_voxels_nowhere(volume, tmp_path, read, column):
    path, data = volume
    image = nib.load(path)
    image.header["sform_code"] = 1
    for row, value in zip(("srow_x", "srow_y", "srow_z"), column, strict=True):
        image.header[row] = [1.0 * (row == "srow_x"), value, 1.0 * (row == "srow_z"), 0]
    header = image.header.binaryblock + bytes(4)
    (tmp_path / "x.nii").write_bytes(header + np.asfortranarray(data).tobytes("F"))
    with pytest.raises(VolumeError, match="places its voxels nowhere") as error:
        read(tmp_path / "x.nii")
    assert error.value.kind == "unreadable"
