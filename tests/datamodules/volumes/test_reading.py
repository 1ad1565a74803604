import gzip
import os
import tracemalloc
import zlib

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from datamodules import notes
from datamodules.storage import fingerprint
from datamodules.volumes.headers import VolumeError
from datamodules.volumes.itk_streams import source_files
from datamodules.volumes.reading import read_header, read_volume, write_nifti
from datamodules.volumes.voxels import VoxelConfig


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
    image.header["vox_offset"] = 352
    (tmp_path / "bomb.nii").write_bytes(image.header.binaryblock + bytes(100))
    with pytest.raises(VolumeError) as error:
        read_volume(tmp_path / "bomb.nii")
    assert error.value.kind == "shape"


def nifti_bytes(data, behind=b"", **fields):
    """Return an uncompressed NIfTI file with header fields set by hand and bytes behind its last voxel."""
    image = nib.Nifti1Image(data, np.eye(4))
    for name, value in {"vox_offset": 352, **fields}.items():
        image.header[name] = value
    return image.header.binaryblock + bytes(4) + data.tobytes("F") + behind


def zeros(size, wbits=31):
    """Compress zeros without ever holding them."""
    packer = zlib.compressobj(9, wbits=wbits)
    return packer, lambda: b"".join(packer.compress(bytes(2**20)) for _ in range(size // 2**20)) + packer.flush()


def peak_of(path):
    """Return kind of fault, and the largest memory in MiB that Python held on the way to it."""
    tracemalloc.start()
    try:
        with pytest.raises(VolumeError) as error:
            read_volume(path)
        return error.value.kind, tracemalloc.get_traced_memory()[1] / 2**20
    finally:
        tracemalloc.stop()


def test_what_lies_behind_the_last_voxel_is_not_inflated(tmp_path):
    """Zeros behind a good header compress to a thousandth: once 3 GB of them took 6.9 GB, and went by unnoticed."""
    data = np.arange(8, dtype=np.int16).reshape(2, 2, 2)
    for name, start in {"x.nii.gz": nifti_bytes(data), "x.mgz": nib.MGHImage(data, np.eye(4)).to_bytes()}.items():
        packer, rest = zeros(64 * 2**20)
        (tmp_path / name).write_bytes(packer.compress(start) + rest())
        kind, peak = peak_of(tmp_path / name)
        assert kind == "size", name
        assert peak < 20, name


def test_headers_that_promise_more_memory_than_there_is(tmp_path):
    """Of a compressed file that is as large as it says, too: 128 GiB are 128 MB."""
    big = nifti_bytes(np.zeros((1, 1, 1), np.int16), dim=(3, 4096, 4096, 4096, 1, 1, 1, 1))
    (tmp_path / "x.nii").write_bytes(big)
    (tmp_path / "x.nii.gz").write_bytes(gzip.compress(big))
    mha = "NDims = 3\nDimSize = 9999 9999 9999\nElementType = MET_SHORT\nElementDataFile = LOCAL\n"
    (tmp_path / "x.mha").write_text(f"ObjectType = Image\nCompressedData = True\n{mha}")
    (tmp_path / "x.nrrd").write_text(
        "NRRD0004\ntype: short\ndimension: 3\nspace: RAS\nsizes: 9999 9999 9999\nendian: little\nencoding: gzip\n\n"
    )
    head = nib.MGHImage(np.zeros((1, 1, 1), np.int16), np.eye(4)).header
    head["dims"][:3] = 9999
    (tmp_path / "x.mgz").write_bytes(gzip.compress(head.binaryblock))
    for name in ("x.nii", "x.nii.gz", "x.mha", "x.nrrd", "x.mgz"):
        kind, peak = peak_of(tmp_path / name)
        assert (kind, peak < 20) == ("shape", True), name
        with pytest.raises(VolumeError, match="GiB are opened"):
            read_header(tmp_path / name)


def test_bytes_behind_the_last_voxel_are_a_fault(volume, tmp_path):
    _, data = volume
    (tmp_path / "x.nii").write_bytes(nifti_bytes(data, b"\0"))
    (tmp_path / "x.nii.gz").write_bytes(gzip.compress(nifti_bytes(data, b"\0")))
    (tmp_path / "two.nii.gz").write_bytes(gzip.compress(nifti_bytes(data)) + gzip.compress(b"more"))
    for name in ("x.mha", "packed.mha", "x.nrrd", "packed.nrrd"):
        sitk.WriteImage(sitk.GetImageFromArray(data), str(tmp_path / name), useCompression=name.startswith("packed"))
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes() + b"\0")
    for path in [path for path in tmp_path.iterdir() if path.name != "image.nii.gz"]:
        assert peak_of(path)[0] == "size", path.name


def test_a_bomb_inside_a_compressed_metaimage(tmp_path):
    for name, start in {
        "x.mha": "ObjectType = Image\nNDims = 3\nCompressedData = True\nDimSize = 2 2 2\nElementType = MET_SHORT\n"
        "ElementDataFile = LOCAL\n",
        "x.nrrd": "NRRD0004\ntype: short\ndimension: 3\nspace: RAS\nsizes: 2 2 2\nendian: little\nencoding: gzip\n\n",
    }.items():
        _, rest = zeros(64 * 2**20, 15 if name == "x.mha" else 31)
        (tmp_path / name).write_bytes(start.encode() + rest())
        kind, peak = peak_of(tmp_path / name)
        assert (kind, peak < 20) == ("size", True), name


def test_a_compressed_file_of_many_members(volume, tmp_path):
    """As bgzip writes them; zeros behind the last one are padding."""
    _, data = volume
    raw = nifti_bytes(data)
    parts = [gzip.compress(raw[start : start + 100]) for start in range(0, len(raw), 100)]
    (tmp_path / "x.nii.gz").write_bytes(b"".join(parts) + bytes(512))
    assert np.array_equal(read_volume(tmp_path / "x.nii.gz").data, data)


@pytest.mark.parametrize("name", ["x.nii", "X.NII.GZ", "x.mha", "x.mhd", "X.NRRD", "x.nrrd", "x.mgz", "x.Nii.Gz"])
def test_every_suffix_in_any_case(volume, tmp_path, name):
    path, data = volume
    affine = read_volume(path).affine
    written = tmp_path / "written" / f"x{''.join(name.lower().partition('.')[1:])}"
    written.parent.mkdir()
    if name.endswith("mgz"):
        nib.save(nib.MGHImage(data, affine), written)
    elif name.lower().endswith((".nii", ".gz")):
        write_nifti(written, data, affine)
    else:
        sitk.WriteImage(sitk.ReadImage(str(path)), str(written))
    target = written.rename(written.with_name(name))
    read = read_volume(target)
    assert np.array_equal(read.data, data)
    assert np.allclose(read.affine, affine)
    assert read_header(target).shape == data.shape


@pytest.mark.parametrize("place", ["../x.raw", "/etc/passwd", "LIST", "x%03d.raw 1 3 1", "gone.raw"])
def test_a_metaimage_whose_voxels_lie_elsewhere(volume, tmp_path, place):
    path, _ = volume
    sitk.WriteImage(sitk.ReadImage(str(path)), str(tmp_path / "x.mhd"))
    header = (tmp_path / "x.mhd").read_text().replace("x.raw", place)
    (tmp_path / "x.mhd").write_text(header)
    assert peak_of(tmp_path / "x.mhd")[0] in ("unreadable", "missing")


def test_a_nrrd_without_a_space(tmp_path):
    header = "NRRD0004\ntype: short\ndimension: 3\n{}sizes: 2 2 2\nendian: little\nencoding: raw\n\n"
    (tmp_path / "x.nrrd").write_bytes(header.format("").encode() + bytes(16))
    assert peak_of(tmp_path / "x.nrrd")[0] == "header"
    directions = "space: RAS\nspace directions: (1,0,0) (0,1,0) (0,0,1)\n"
    (tmp_path / "x.nrrd").write_bytes(header.format(directions).encode() + bytes(16))
    assert np.allclose(read_volume(tmp_path / "x.nrrd").affine, np.eye(4))


def test_a_metaimage_in_two_files_is_known_by_its_voxels(volume, tmp_path):
    """Headers of one scanner are equal in all patients."""
    path, _ = volume
    for name, shift in (("a", 0), ("b", 1)):
        (tmp_path / name).mkdir()
        sitk.WriteImage(sitk.ReadImage(str(path)) + shift, str(tmp_path / name / "x.mhd"))
    first, second = (tmp_path / name / "x.mhd" for name in ("a", "b"))
    assert first.read_text() == second.read_text()
    assert read_volume(first).source["xxh3"] != read_volume(second).source["xxh3"]
    assert source_files(first) == [first, first.with_suffix(".raw")]
    assert source_files(path) == [path]


def test_a_name_that_says_nothing(tmp_path):
    (tmp_path / "scan.txt").write_text("no volume")
    with pytest.raises(VolumeError, match=r"none of \.nii\.gz"):
        read_volume(tmp_path / "scan.txt")


def test_a_trailing_axis_of_one_is_fine(tmp_path):
    write_nifti(tmp_path / "x.nii", np.ones((4, 5, 6, 1), np.uint8), np.eye(4))
    assert read_volume(tmp_path / "x.nii").data.shape == (4, 5, 6)


@pytest.mark.parametrize("column", [[0, 0, 0], [np.nan, 1, 1], [1, 0, 0]], ids=["zero", "nan", "as the first"])
@pytest.mark.parametrize("read", [read_volume, read_header])
def test_an_affine_that_places_voxels_nowhere(volume, tmp_path, read, column):
    path, data = volume
    image = nib.load(path)
    image.header["sform_code"], image.header["vox_offset"] = 1, 352
    for row, value in zip(("srow_x", "srow_y", "srow_z"), column, strict=True):
        image.header[row] = [1.0 * (row == "srow_x"), value, 1.0 * (row == "srow_z"), 0]
    header = image.header.binaryblock + bytes(4)
    (tmp_path / "x.nii").write_bytes(header + np.asfortranarray(data).tobytes("F"))
    with pytest.raises(VolumeError, match="places its voxels nowhere") as error:
        read(tmp_path / "x.nii")
    assert error.value.kind == "unreadable"


def quaternion_about_z(degrees):
    return {"quatern_d": np.sin(np.radians(degrees) / 2)}


PLAIN = {"qform_code": 1, "sform_code": 1, "pixdim": (1, 1, 1, 1, 0, 0, 0, 0), "qoffset_x": 0.0}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, None),
        ({"pixdim": (1, 1, 1, 1.015, 0, 0, 0, 0)}, None),
        ({"pixdim": (1, 1, 1, 1.03, 0, 0, 0, 0)}, "sform says 1 x 1 x 1 mm"),
        ({"pixdim": (1, 1.3, 1.3, 10, 0, 0, 0, 0)}, r"sform says 1 x 1 x 1 mm, qform and pixdim 1.3 x 1.3 x 10: set"),
        ({"qoffset_x": 0.9}, None),
        ({"qoffset_x": 1.1}, "differ by 0 degrees and 1 mm"),
        (quaternion_about_z(0.9), None),
        (quaternion_about_z(5), "differ by 5 degrees"),
        ({"sform_code": 0, **quaternion_about_z(30)}, None),
        ({"qform_code": 0, **quaternion_about_z(30)}, None),
        ({"sform_code": 0, "qform_code": 0}, "neither sform nor qform"),
        ({"pixdim": (1, 1, 1, 0, 0, 0, 0, 0)}, "no voxel can be"),
        ({"pixdim": (1, 1, -1, 1, 0, 0, 0, 0)}, "no voxel can be"),
        ({"sform_code": 4, **quaternion_about_z(30)}, None),
        ({"vox_offset": 0}, "vox.offset"),
        ({"vox_offset": 100}, "vox.offset"),
        ({"vox_offset": np.nan}, "NaN"),
    ],
)
def test_a_header_that_contradicts_itself(volume, tmp_path, fields, message, capsys):
    """What an affine, another affine and the edges say of one voxel must agree; oblique is lawful."""
    _, data = volume
    path = tmp_path / "x.nii"
    path.write_bytes(nifti_bytes(data, **PLAIN | fields))
    if message is None:
        assert read_volume(path).data.shape == data.shape
        notes.print_notes()
        assert ("template" in capsys.readouterr().out) == (fields.get("sform_code") == 4)
        return
    for read in (read_volume, read_header):
        with pytest.raises(VolumeError, match=message) as error:
            read(path)
        assert error.value.kind in ("header", "unreadable")
    if "vox_offset" not in fields and "pixdim" in fields:
        assert np.allclose(read_volume(path, VoxelConfig(header="sform")).affine, np.eye(4))
    if "differ" in message:
        turned = read_volume(path, VoxelConfig(header="qform"))
        assert not np.allclose(turned.affine, np.eye(4))


@pytest.mark.parametrize("dtype", ["RGB", "uint64", "complex64", "complex128"])
def test_voxels_that_are_not_one_real_number_each(tmp_path, dtype):
    """The real part of a complex image was taken without a word."""
    kind = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]) if dtype == "RGB" else np.dtype(dtype)
    data = np.zeros((3, 4, 5), kind)
    if dtype.startswith("complex"):
        data += np.arange(60).reshape(3, 4, 5) * (3 + 4j)
    nib.save(nib.Nifti1Image(data, np.eye(4), dtype=kind), tmp_path / "x.nii.gz")
    for read in (read_volume, read_header):
        with pytest.raises(VolumeError) as error:
            read(tmp_path / "x.nii.gz")
        assert error.value.kind == "dtype"
    if dtype.startswith("complex"):
        read = read_volume(tmp_path / "x.nii.gz", VoxelConfig(complex="magnitude"))
        assert np.array_equal(read.data.ravel(), np.arange(60) * 5.0)


@pytest.mark.parametrize("suffix", ["mha", "nrrd"])
def test_odd_voxels_of_other_formats(tmp_path, suffix):
    path = str(tmp_path / f"x.{suffix}")
    images = [
        sitk.GetImageFromArray(np.zeros((4, 5, 6, 3), np.uint8), isVector=True),
        sitk.GetImageFromArray(np.zeros((4, 5, 6), np.uint64)),
    ]
    for image in images:
        sitk.WriteImage(image, path)
        assert peak_of(tmp_path / f"x.{suffix}")[0] == "dtype"
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((2, 4, 5, 6), np.uint8), isVector=False), path)
    assert peak_of(tmp_path / f"x.{suffix}")[0] == "shape"


def test_long_integers_keep_their_values(tmp_path):
    data = np.arange(60, dtype=np.int64).reshape(3, 4, 5) + 2**40
    nib.save(nib.Nifti1Image(data, np.eye(4), dtype=np.int64), tmp_path / "x.nii")
    assert np.array_equal(read_volume(tmp_path / "x.nii").data, data)


@pytest.mark.parametrize("name", ["x.img", "x.hdr", "x.nhdr", "x.mnc", "x.DCM.GZ"])
def test_formats_that_are_refused_say_what_to_do(tmp_path, name):
    (tmp_path / name).write_bytes(bytes(400))
    for read in (read_volume, read_header):
        with pytest.raises(VolumeError, match=r"convert|save|gunzip") as error:
            read(tmp_path / name)
        assert error.value.kind == "unreadable"


def test_what_is_there_and_is_no_file(tmp_path):
    (tmp_path / "link.nii.gz").symlink_to(tmp_path / ".git/annex/objects/gone")
    (tmp_path / "folder.nii").mkdir()
    os.mkfifo(tmp_path / "pipe.mha")
    for name, words in {"link.nii.gz": "datalad get", "folder.nii": "a folder", "pipe.mha": "a pipe"}.items():
        for read in (read_volume, read_header):
            with pytest.raises(VolumeError, match=words) as error:
                read(tmp_path / name)
            assert error.value.kind == "missing"


@pytest.mark.real_data
def test_real_files_of_odd_kinds(real_data):
    """Of archives.md, test case 8."""
    folder = real_data("odd_nifti")
    expected = {
        "anatomical.nii": None,
        "derived_complex64.nii.gz": "dtype",
        "derived_nan_background.nii.gz": None,
        "derived_sform_1mm_qform_1.3x1.3x10.nii.gz": "header",
        "derived_zscored.nii.gz": None,
        "example4d.nii.gz": "shape",
        "example_nifti2.nii.gz": "shape",
        "functional.nii": "shape",
        "reoriented_anat_moved.nii": None,
        "rgb_test_file.nii.gz": "dtype",
        "standard.nii.gz": None,
    }
    assert {path.name for path in folder.iterdir()} == set(expected)
    for name, kind in expected.items():
        if kind is None:
            assert read_volume(folder / name).data.ndim == 3
            continue
        for read in (read_volume, read_header):
            with pytest.raises(VolumeError) as error:
                read(folder / name)
            assert error.value.kind == kind, name
    with pytest.raises(VolumeError, match=r"sform says 1 x 1 x 1 mm, qform and pixdim 1.3 x 1.3 x 10: set voxels"):
        read_header(folder / "derived_sform_1mm_qform_1.3x1.3x10.nii.gz")


@pytest.mark.real_data
def test_nifti_2_and_its_equal_in_nifti_1(real_data, tmp_path):
    image = nib.load(real_data("odd_nifti") / "example_nifti2.nii.gz")
    data = np.ascontiguousarray(np.asarray(image.dataobj)[..., 0])
    for kind in (nib.Nifti1Image, nib.Nifti2Image):
        nib.save(kind(data, image.affine), tmp_path / f"{kind.__name__}.nii.gz")
    one, two = (read_volume(tmp_path / f"Nifti{number}Image.nii.gz") for number in (1, 2))
    assert np.array_equal(one.data, two.data)
    assert np.allclose(one.affine, two.affine)


@pytest.mark.real_data
def test_no_file_that_is_in_order_is_refused(real_data):
    """Contradictions are rare enough to refuse: of the samples, only those that were made to contradict themselves."""
    kinds = {}
    for path in real_data("odd_nifti").parent.rglob("*.nii*"):
        try:
            read_header(path)
        except VolumeError as error:
            kinds.setdefault(error.kind, []).append(path.name)
    assert kinds.pop("header") == ["derived_sform_1mm_qform_1.3x1.3x10.nii.gz"]
    assert set(kinds) == {"dtype", "shape"}
