"""Reading volumes to their last byte: check sums, orientation, and every way in which a file can be broken."""

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

from datamodules.storage import fingerprint

SUFFIXES = (".nii.gz", ".nii", ".mha")

#: A header may promise any size; this many voxels (a 2048-cube holds more) is no volume of ours.
MAX_VOXELS = 2**31

#: Volume of a voxel in units of its edges, which is 1 where they are at right angles; nearer to 0 it is flat.
_MIN_VOLUME = 1e-3

#: Goes into the cache key: another decoder may give other voxels.
DECODERS = {"nibabel": nib.__version__, "SimpleITK": sitk.Version.VersionString()}


class VolumeError(Exception):
    """A file that cannot be used.

    Args:
        kind: unreadable, checksum, shape, nan, constant or missing.
        detail: What was found.
    """

    def __init__(self, kind: str, detail: str) -> None:
        self.kind, self.detail = kind, detail
        super().__init__(detail)


class Volume(NamedTuple):
    """A volume in RAS orientation.

    Attributes:
        data: ``(X, Y, Z)``, the file's own dtype.
        affine: ``(4, 4)`` voxel to world (RAS, mm).
        source: Size in bytes and xxh3 of the file.
        file_affine: The affine before the axes were turned to RAS.
    """

    data: NDArray[Any]
    affine: NDArray[np.float64]
    source: dict[str, Any]
    file_affine: NDArray[np.float64]


def _decompress(content: bytes) -> bytes:
    """Inflate a gzip file and check its CRC, which readers that stop at the last voxel never look at."""
    try:
        return gzip.decompress(content)
    except EOFError as error:
        raise VolumeError("unreadable", "the file ends early (truncated)") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        kind = "unreadable" if "Not a gzipped" in str(error) else "checksum"
        raise VolumeError(kind, f"the compressed data are damaged ({error})") from error


def _check_header(shape: tuple[int, ...]) -> None:
    if len(shape) != 3 or min(shape) < 1:
        raise VolumeError("shape", f"expected a volume of three axes, found shape {shape}")
    if int(np.prod(shape, dtype=np.int64)) > MAX_VOXELS:
        raise VolumeError("shape", f"the header promises {shape} voxels, more than is opened here")


def _check_affine(affine: NDArray[np.float64]) -> None:
    """Refuse an affine that is not finite or has no inverse: its voxels lie nowhere."""
    edges = np.linalg.norm(affine[:3, :3], axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        volume = abs(np.linalg.det(affine[:3, :3] / edges)) if np.isfinite(affine).all() and edges.all() else 0.0
    if volume < _MIN_VOLUME:
        rows = "; ".join(" ".join(f"{value:g}" for value in row) for row in affine[:3])
        raise VolumeError("unreadable", f"the header places its voxels nowhere: its affine is ({rows}), which has no "
                                        f"inverse; write a valid sform or qform")  # fmt: skip


def _squeeze(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:3] if len(shape) > 3 and set(shape[3:]) == {1} else shape


def _place_of(shape: tuple[int, ...], place: int | None) -> tuple[int, ...]:
    """Return the shape of one volume of a file.

    Raises:
        VolumeError: the file has fewer volumes.
    """
    if place is None:
        return _squeeze(shape)
    count = int(np.prod(shape[3:], dtype=np.int64))
    if len(shape) > 4 or place >= count:
        raise VolumeError("shape", f"it holds {count} volumes, and volume {place + 1} is wanted")
    return shape[:3]


def _read_nifti(path: Path, place: int | None) -> Volume:
    content = path.read_bytes()
    source = {"size": len(content), "xxh3": xxhash.xxh3_128_hexdigest(content)}
    try:
        raw = _decompress(content) if path.name.endswith(".gz") else content
        image = nib.Nifti1Image.from_bytes(raw)
        shape = _place_of(image.shape, place)
        _check_header(shape)
        data = np.asanyarray(image.dataobj)
        data = data.reshape(shape) if place is None else data.reshape((*shape, -1))[..., place]
    except VolumeError:
        raise
    except Exception as error:  # nibabel raises many kinds for broken headers; all mean the same to us
        raise VolumeError("unreadable", f"not a readable NIfTI file ({error})") from error
    return _canonical(data, image.affine, source)


def _canonical(data: NDArray[Any], affine: NDArray[np.float64], source: dict[str, Any]) -> Volume:
    """Turn the axes to RAS, without resampling."""
    _check_affine(affine)
    image = nib.as_closest_canonical(nib.Nifti1Image(_plain(data), affine))
    return Volume(np.asanyarray(image.dataobj), image.affine, source, affine)


def _plain(data: NDArray[Any]) -> NDArray[Any]:
    """Return booleans and long integers in a dtype NIfTI knows."""
    return data.astype({"b": np.uint8}.get(data.dtype.kind, np.int32)) if data.dtype in (bool, np.int64) else data


def _itk_affine(reader: Any) -> NDArray[np.float64]:
    """Return the RAS affine of an ITK image or reader (ITK's world is LPS)."""
    direction = np.array(reader.GetDirection(), dtype=np.float64).reshape(3, 3)
    affine = np.eye(4)
    affine[:3, :3] = direction * np.array(reader.GetSpacing())
    affine[:3, 3] = reader.GetOrigin()
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def _read_itk(path: Path) -> Volume:
    source = fingerprint(path)
    try:
        reader = _itk_reader(path)
        reader.ReadImageInformation()
        _check_header(tuple(reader.GetSize()))
        image = reader.Execute()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise VolumeError("unreadable", f"not a readable MetaImage file ({reason})") from error
    return _canonical(sitk.GetArrayFromImage(image).transpose(2, 1, 0), _itk_affine(image), source)


def _itk_reader(path: Path) -> Any:
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO("MetaImageIO")
    return reader


def read_volume(path: Path, place: int | None = None) -> Volume:
    """Read a ``.nii``, ``.nii.gz`` or ``.mha`` to its end.

    Args:
        path: The file.
        place: Which volume of a 4-D NIfTI file, from 0; None = the file is one.

    Raises:
        VolumeError: missing, truncated, failing its check sum, or not a volume of three axes.
    """
    if not path.is_file():
        raise VolumeError("missing", "the file is not there")
    try:
        return _read_itk(path) if path.suffix == ".mha" else _read_nifti(path, place)
    except OSError as error:
        raise VolumeError("unreadable", f"the file cannot be opened ({error.strerror or error})") from error


class Header(NamedTuple):
    """Shape and affine of a volume, turned to RAS."""

    shape: tuple[int, ...]
    affine: NDArray[np.float64]


def read_header(path: Path, place: int | None = None) -> Header:
    """Read the header alone.

    Args:
        path: The file.
        place: Which volume of a 4-D NIfTI file, from 0; None = the file is one.

    Raises:
        VolumeError: the header is missing, broken, or not of a volume of three axes.
    """
    try:
        if path.suffix == ".mha":
            reader = _itk_reader(path)
            reader.ReadImageInformation()
            shape, affine = tuple(reader.GetSize()), _itk_affine(reader)
        else:
            image = nib.Nifti1Image.from_filename(path)
            shape, affine = _place_of(image.shape, place), image.affine
    except VolumeError:
        raise
    except FileNotFoundError as error:
        raise VolumeError("missing", "the file is not there") from error
    except Exception as error:  # as in _read_nifti: every kind means a broken header
        raise VolumeError("unreadable", f"the header cannot be read ({str(error).splitlines()[0]})") from error
    _check_header(shape)
    _check_affine(affine)
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
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(data, affine)
    buffer = io.BytesIO(image.to_bytes())
    content = buffer.getvalue()
    if path.name.endswith(".gz"):
        content = gzip.compress(content, compresslevel=4, mtime=0)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)
