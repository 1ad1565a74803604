"""Reads volumes to the last byte: check sums, orientation, and a kind of fault for every way a file can be broken."""

import gzip
import io
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import SimpleITK as sitk
import xxhash
from numpy.typing import NDArray

from common.files import whole_file
from datamodules.limits import MAX_FOOTER_BYTES
from datamodules.members import refusal_of, suffix_of, why_missing
from datamodules.storage import fingerprint
from datamodules.volumes.headers import (
    VolumeError,
    check_affine,
    check_dtype,
    check_end,
    check_shape,
    inflate,
    mgh_header,
    nifti_header,
    squeezed,
)
from datamodules.volumes.itk_streams import check_stream, find_stream
from datamodules.volumes.voxels import STRICT, VoxelConfig

#: Part of the cache key: another decoder or reader version may give other voxels.
DECODERS = {"reader": "2", "nibabel": nib.__version__, "SimpleITK": sitk.Version.VersionString()}

#: Bytes at the start of a file that hold the header of NIfTI or MGH.
_START = 1024
_READERS = {".mha": "MetaImageIO", ".mhd": "MetaImageIO", ".nrrd": "NrrdImageIO"}
_DTYPES = {
    sitk.sitkUInt8: np.uint8,
    sitk.sitkInt8: np.int8,
    sitk.sitkUInt16: np.uint16,
    sitk.sitkInt16: np.int16,
    sitk.sitkUInt32: np.uint32,
    sitk.sitkInt32: np.int32,
    sitk.sitkUInt64: np.uint64,
    sitk.sitkInt64: np.int64,
    sitk.sitkFloat32: np.float32,
    sitk.sitkFloat64: np.float64,
    sitk.sitkComplexFloat32: np.complex64,
    sitk.sitkComplexFloat64: np.complex128,
}


class Volume(NamedTuple):
    """A volume in RAS orientation.

    Attributes:
        data: ``(X, Y, Z)``, the file's own dtype.
        affine: ``(4, 4)`` voxel to world (RAS, mm).
        source: Size in bytes and xxh3 of the file.
        file_affine: The affine before reorientation to RAS.
        background: Value around the body; None if it is not a single value or was not determined.
    """

    data: NDArray[Any]
    affine: NDArray[np.float64]
    source: dict[str, Any]
    file_affine: NDArray[np.float64]
    background: float | None = None


def _nibabel_header(path: Path, voxels: VoxelConfig, place: int | None) -> tuple[Any, NDArray[np.float64]]:
    """Read only the header and affine of a NIfTI or MGH file."""
    try:
        with path.open("rb") if suffix_of(path) == ".nii" else gzip.open(path) as file:
            start = file.read(_START)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise VolumeError("unreadable", f"the compressed data are damaged ({error})") from error
    return mgh_header(start) if suffix_of(path) == ".mgz" else nifti_header(start, path, voxels, place)


def _read_nibabel(path: Path, voxels: VoxelConfig, place: int | None) -> Volume:
    header, affine = _nibabel_header(path, voxels, place)
    shape = header.get_data_shape()
    promised = header.get_data_offset() + int(np.prod(shape)) * header.get_data_dtype().itemsize
    limit = promised + (MAX_FOOTER_BYTES if suffix_of(path) == ".mgz" else 0)
    compressed = suffix_of(path) != ".nii"
    if not compressed:
        check_end(promised, path.stat().st_size)
    content = path.read_bytes()
    raw = inflate(content, limit) if compressed else content
    check_end(promised, len(raw), exact=False)
    check_end(limit, max(len(raw), limit))
    source = {"size": len(content), "xxh3": xxhash.xxh3_128_hexdigest(content)}
    proxy = nib.arrayproxy.ArrayProxy(io.BytesIO(raw), header)
    data = np.asanyarray(proxy if place is None else proxy[..., place]).reshape(squeezed(shape, place))
    return _canonical(data, affine, source)


def _canonical(data: NDArray[Any], affine: NDArray[np.float64], source: dict[str, Any]) -> Volume:
    """Reorient to RAS, without resampling."""
    check_affine(affine)
    data = np.abs(data) if data.dtype.kind == "c" else data
    turn = nib.orientations.io_orientation(affine)
    turned = affine @ nib.orientations.inv_ornt_aff(turn, data.shape)
    return Volume(nib.orientations.apply_orientation(data, turn), turned, source, affine)


def _itk_affine(reader: Any) -> NDArray[np.float64]:
    """Return the RAS affine of an ITK image or reader (ITK's world is LPS)."""
    direction = np.array(reader.GetDirection(), dtype=np.float64).reshape(3, 3)
    affine = np.eye(4)
    affine[:3, :3] = direction * np.array(reader.GetSpacing())
    affine[:3, 3] = reader.GetOrigin()
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def _itk_reader(path: Path, voxels: VoxelConfig) -> Any:
    """Read the header of a MetaImage or NRRD file."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO(_READERS[suffix_of(path)])
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise _unreadable(error) from error
    check_dtype(_itk_dtype(reader), voxels)
    check_shape(reader.GetSize(), _itk_dtype(reader).itemsize)
    if suffix_of(path) == ".nrrd" and not reader.HasMetaDataKey("NRRD_space"):
        raise VolumeError("header", "the NRRD header names no space, so its orientation is unknown: save it with one")
    return reader


def _itk_dtype(reader: Any) -> np.dtype[Any]:
    dtype = _DTYPES.get(reader.GetPixelID())
    if dtype is None:
        raise VolumeError(
            "dtype", f"its voxels are {sitk.GetPixelIDValueAsString(reader.GetPixelID())}, not one number each"
        )
    return np.dtype(dtype)


def _unreadable(error: RuntimeError) -> VolumeError:
    reason = str(error).strip().splitlines()[-1].strip()
    return VolumeError("unreadable", f"not a readable MetaImage or NRRD file ({reason})")


def _read_itk(path: Path, voxels: VoxelConfig) -> Volume:
    reader = _itk_reader(path, voxels)
    stream = find_stream(path)
    check_stream(stream, int(np.prod(reader.GetSize())) * _itk_dtype(reader).itemsize)
    source = fingerprint(stream.path)  # headers alone may be equal in all patients
    try:
        image = reader.Execute()
    except RuntimeError as error:
        raise _unreadable(error) from error
    return _canonical(sitk.GetArrayFromImage(image).transpose(2, 1, 0), _itk_affine(image), source)


def read_volume(path: Path, voxels: VoxelConfig = STRICT, place: int | None = None) -> Volume:
    """Read a volume of one of :data:`datamodules.members.VOLUMES` to its end.

    Args:
        path: The file.
        voxels: How to handle unusual volumes. NaN is kept.
        place: Which volume of a 4-D NIfTI file, from 0; None: the file holds one volume.

    Raises:
        VolumeError: the file is missing, truncated, fails its check sum, is not a volume of real numbers with three
            axes, or contradicts its own header.
    """
    _check_file(path)
    try:
        return _read_itk(path, voxels) if suffix_of(path) in _READERS else _read_nibabel(path, voxels, place)
    except OSError as error:
        raise VolumeError("unreadable", f"the file cannot be opened ({error.strerror or error})") from error


def _check_file(path: Path) -> None:
    """Refuse missing files and unsupported formats."""
    if not path.is_file():
        raise VolumeError("missing", why_missing(path))
    if refusal := refusal_of(path):
        raise VolumeError("unreadable", refusal)


class Header(NamedTuple):
    """Shape and affine of a volume in RAS."""

    shape: tuple[int, ...]
    affine: NDArray[np.float64]


def read_header(path: Path, voxels: VoxelConfig = STRICT, place: int | None = None) -> Header:
    """Read the header alone.

    Args:
        path: The file.
        voxels: As in :func:`read_volume`.
        place: Which volume of a 4-D NIfTI file, from 0; None: the file holds one volume.

    Raises:
        VolumeError: the header is missing, broken, or not that of a volume with three axes.
    """
    _check_file(path)
    try:
        if suffix_of(path) in _READERS:
            reader = _itk_reader(path, voxels)
            shape, affine = tuple(reader.GetSize()), _itk_affine(reader)
        else:
            header, affine = _nibabel_header(path, voxels, place)
            shape = squeezed(header.get_data_shape(), place)
    except OSError as error:
        raise VolumeError("unreadable", f"the file cannot be opened ({error.strerror or error})") from error
    check_affine(affine)
    turn = nib.orientations.io_orientation(affine)
    ras_shape = tuple(int(shape[list(turn[:, 0]).index(axis)]) for axis in range(3))
    return Header(ras_shape, affine @ nib.orientations.inv_ornt_aff(turn, shape))


def to_lps(array: NDArray) -> tuple[NDArray, NDArray[np.float64]]:
    """Turn a RAS array of 1 mm to LPS, as BraTS stores it, with its affine."""
    affine = np.diag([-1.0, -1.0, 1.0, 1.0])
    affine[:2, 3] = array.shape[0] - 1, array.shape[1] - 1
    return np.ascontiguousarray(array[::-1, ::-1]), affine


def write_nifti(path: Path, data: NDArray[Any], affine: NDArray[np.float64]) -> None:
    """Write a NIfTI file under a temporary name and rename it."""
    image = nib.Nifti1Image(data, affine)
    buffer = io.BytesIO(image.to_bytes())
    content = buffer.getvalue()
    if path.name.endswith(".gz"):
        content = gzip.compress(content, compresslevel=4, mtime=0)
    with whole_file(path) as temporary:
        temporary.write_bytes(content)
