"""Headers of volumes: what they promise, and what is refused before any voxel is read."""

import io
import logging
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.freesurfer.mghformat import MGHError, MGHHeader
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError
from numpy.typing import NDArray

from datamodules.limits import MAX_HEADER_BYTES, MAX_VOLUME_BYTES
from datamodules.notes import note
from datamodules.volumes.voxels import STRICT, VoxelConfig

#: Least voxel volume relative to its edges: 1 at right angles, near 0 a flat voxel.
_MIN_VOLUME = 1e-3
#: What nibabel raises for broken headers.
_HEADER_ERRORS = (HeaderDataError, WrapStructError, ValueError, OverflowError, KeyError)
#: Swallows nibabel's messages, which would be printed next to the fault.
_QUIET = logging.getLogger("datamodules.nifti")
_QUIET.addHandler(logging.NullHandler())
_QUIET.propagate = False
_MGH_HEADER = 284
#: Tolerated differences of two affines in edges (share), axes (degrees) and centres (mm): rounding only.
_MAX_STRETCH, _MAX_ANGLE, _MAX_DISTANCE = 0.02, 1.0, 1.0
#: Codes of an sform in Talairach or MNI space.
_TEMPLATES = (3, 4)
_SETTING = ": set voxels.header: sform | qform"
#: Bytes decompressed at a time.
_PIECE = 2**20


class VolumeError(Exception):
    """A file that cannot be used.

    Args:
        kind: unreadable, checksum, header, size, dtype, shape, grid, nan, intensity, constant, label or missing.
        detail: What was found.
    """

    def __init__(self, kind: str, detail: str) -> None:
        self.kind, self.detail = kind, detail
        super().__init__(detail)


def check_shape(shape: Sequence[int], itemsize: int) -> None:
    """Refuse anything but a volume of three axes within the size limit.

    Args:
        shape: Voxels along each axis.
        itemsize: Bytes per voxel.

    Raises:
        VolumeError: ``shape``.
    """
    if len(shape) > 3 and min(shape) > 0:
        raise VolumeError("shape", f"holds {int(np.prod(shape[3:]))} volumes of shape {tuple(shape[:3])}, and one is "
                                   f"needed: split the file")  # fmt: skip
    if len(shape) != 3 or min(shape) < 1:
        raise VolumeError("shape", f"expected a volume of three axes, found shape {tuple(shape)}")
    check_room(shape, itemsize)


def check_room(shape: Sequence[float], itemsize: int = 4) -> None:
    """Refuse volumes that need more memory than :data:`datamodules.limits.MAX_VOLUME_BYTES`.

    Raises:
        VolumeError: ``shape``.
    """
    size = float(np.prod(np.asarray(shape, dtype=np.float64))) * max(itemsize, 4)
    if not size <= MAX_VOLUME_BYTES:
        edges = " x ".join(f"{edge:.0f}" for edge in shape)
        raise VolumeError("shape", f"{edges} voxels would take {size / 2**30:,.0f} GiB, and no more than "
                                   f"{MAX_VOLUME_BYTES / 2**30:.0f} GiB are opened")  # fmt: skip


def check_affine(affine: NDArray[np.float64]) -> None:
    """Refuse an affine that is not finite or not invertible: its voxels have no position.

    Raises:
        VolumeError: ``unreadable``.
    """
    edges = np.linalg.norm(affine[:3, :3], axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        volume = abs(np.linalg.det(affine[:3, :3] / edges)) if np.isfinite(affine).all() and edges.all() else 0.0
    if volume < _MIN_VOLUME:
        rows = "; ".join(" ".join(f"{value:g}" for value in row) for row in affine[:3])
        raise VolumeError("unreadable", f"the header places its voxels nowhere: its affine is ({rows}), which has no "
                                        f"inverse; write a valid sform or qform")  # fmt: skip


def check_end(promised: int, found: int, exact: bool = True) -> None:
    """Compare a file's decompressed bytes with those its header promises.

    Args:
        promised: Bytes of header and voxels.
        found: Bytes that are there.
        exact: Whether bytes after the last voxel are refused.

    Raises:
        VolumeError: ``unreadable`` if bytes are missing, ``size`` if some are left over.
    """
    if found < promised:
        raise VolumeError("unreadable", f"the file ends early (truncated): {found:,} of {promised:,} bytes")
    if exact and found > promised:
        raise VolumeError("size", f"the file goes on behind its last voxel: the header promises {promised:,} bytes; "
                                  f"header and voxels do not belong together, so write the file anew")  # fmt: skip


def inflate(content: bytes, limit: int, wbits: int = 31) -> bytes:
    """Decompress a gzip file to at most one byte more than ``limit``, and check its sums if it ends earlier.

    Args:
        content: The file; it may have several members, as bgzip writes them, and trailing zeros.
        limit: Bytes.
        wbits: As in :mod:`zlib`; 47 takes zlib's form as well.

    Raises:
        VolumeError: ``unreadable`` if it is not a gzip file or is truncated, ``checksum`` if it is damaged.
    """
    pieces: list[bytes] = []
    room, member = limit + 1, None
    try:
        for start in range(0, len(content), _PIECE):
            rest = content[start : start + _PIECE]
            while room and (member is not None or (rest := rest.lstrip(b"\0"))):
                member = member or zlib.decompressobj(wbits)
                pieces.append(member.decompress(rest, room))
                room -= len(pieces[-1])
                if not member.eof:
                    break
                rest, member = member.unused_data, None
    except zlib.error as error:
        kind = "unreadable" if "header" in str(error) else "checksum"
        raise VolumeError(kind, f"the compressed data are damaged ({error})") from error
    if room and (member is not None or not pieces):
        raise VolumeError("unreadable", "the file ends early (truncated)")
    return b"".join(pieces)


def squeezed(shape: Sequence[int], place: int | None = None) -> tuple[int, ...]:
    """Return a shape without trailing axes of length 1 after the third.

    Args:
        shape: Voxels along each axis.
        place: Which volume of a 4-D file is meant, from 0; None: the file holds one volume.

    Raises:
        VolumeError: the file has fewer volumes.
    """
    if place is not None:
        count = int(np.prod(np.asarray(shape[3:], dtype=np.int64)))
        if len(shape) > 4 or place >= count:
            raise VolumeError("shape", f"it holds {count} volumes, and volume {place + 1} is wanted")
        return tuple(shape[:3])
    return tuple(shape[:3]) if len(shape) > 3 and set(shape[3:]) == {1} else tuple(shape)


def check_dtype(dtype: np.dtype[Any], voxels: VoxelConfig) -> None:
    """Refuse voxels that are not single real numbers that float32 can represent.

    Raises:
        VolumeError: ``dtype``.
    """
    if dtype.fields is not None:
        raise VolumeError("dtype", f"its voxels are colours or records ({', '.join(dtype.names or ())}), not one "
                                   f"number each: write out the channel you mean")  # fmt: skip
    if dtype.kind == "c" and voxels.complex == "refuse":
        raise VolumeError("dtype", "its voxels are complex: set voxels.complex: magnitude, or write the magnitude out")
    if dtype == np.uint64:
        raise VolumeError("dtype", "its voxels are uint64, of which float32 would lose digits: write it as float32")


def nifti_header(
    start: bytes, path: Path, voxels: VoxelConfig = STRICT, place: int | None = None
) -> tuple[nib.Nifti1Header, NDArray[np.float64]]:
    """Parse the first bytes of a NIfTI-1 or NIfTI-2 file; extensions are ignored.

    Args:
        start: At least the bytes of the header.
        path: The file.
        voxels: How to resolve a header that contradicts itself.
        place: Which volume of a 4-D file is meant; None: the file holds one volume.

    Returns:
        The header and the affine to use.

    Raises:
        VolumeError: it is not a NIfTI header, contradicts itself, or exceeds a limit.
    """
    kind = nib.Nifti2Header if _header_size(start) == nib.Nifti2Header.sizeof_hdr else nib.Nifti1Header
    block = start[: kind.sizeof_hdr]
    try:
        # Four zeros end the header, so that no extension is read: its length is untrusted input, too.
        header = kind.from_fileobj(io.BytesIO(block + bytes(4)), check=False)
        raw = header.copy()  # nibabel's check repairs negative edges
        header.check_fix(_QUIET, error_level=40)
        offset, dtype = header.get_data_offset(), header.get_data_dtype()
    except _HEADER_ERRORS as error:
        raise VolumeError("unreadable", f"not a readable NIfTI file ({_first_line(error)})") from error
    check_dtype(dtype, voxels)
    check_shape(squeezed(header.get_data_shape(), place), dtype.itemsize)
    if not kind.sizeof_hdr <= offset <= MAX_HEADER_BYTES:
        raise VolumeError("header", f"vox_offset is {offset}, where no voxels can lie: write the file anew")
    return header, nifti_affine(raw, path, voxels)


def nifti_affine(header: nib.Nifti1Header, path: Path, voxels: VoxelConfig = STRICT) -> NDArray[np.float64]:
    """Return the affine that places a header's voxels.

    Args:
        header: As stored in the file.
        path: The file.
        voxels: How to resolve a header that contradicts itself.

    Raises:
        VolumeError: ``header`` if it contradicts itself or gives no position.
    """
    sform, qform, zooms = header.get_sform(), _qform(header), np.asarray(header["pixdim"][1:4], dtype=np.float64)
    if voxels.header != "refuse":
        return sform if voxels.header == "sform" else qform
    codes = int(header["sform_code"]), int(header["qform_code"])
    if codes == (0, 0):
        raise VolumeError(
            "header", f"neither sform nor qform has a code, so nothing says where its voxels lie{_SETTING}"
        )
    if not (zooms > 0).all():
        raise VolumeError("header", f"pixdim is {_edges(zooms)}, which no voxel can be{_SETTING}")
    if codes[0] in _TEMPLATES and codes[1] == 1:
        note("the sform is a template's and was used; the qform is the scanner's", path)
        return sform
    affine = sform if codes[0] else qform
    check_affine(affine)
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.allclose(lengths, zooms, rtol=_MAX_STRETCH, atol=0):
        raise VolumeError("header", f"sform says {_edges(lengths)} mm, qform and pixdim {_edges(zooms)}{_SETTING}")
    if min(codes) > 0:
        _compare(sform, qform, squeezed(header.get_data_shape()))
    return affine


def _qform(header: nib.Nifti1Header) -> NDArray[np.float64]:
    """Return the qform; all NaN if its quaternion or edges are invalid."""
    try:
        return header.get_qform()
    except (ValueError, HeaderDataError):
        return np.full((4, 4), np.nan)


def _compare(sform: NDArray[np.float64], qform: NDArray[np.float64], shape: Sequence[int]) -> None:
    """Refuse affines whose axes or centres differ beyond rounding."""
    with np.errstate(invalid="ignore", divide="ignore"):
        directions = [affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0) for affine in (sform, qform)]
        cosines = np.clip((directions[0] * directions[1]).sum(axis=0), -1, 1)
    angle = float(np.degrees(np.arccos(cosines)).max())
    center = np.append((np.asarray(shape[:3]) - 1) / 2, 1)
    distance = float(np.linalg.norm((sform - qform) @ center))
    if not (angle <= _MAX_ANGLE and distance <= _MAX_DISTANCE):
        raise VolumeError("header", f"sform and qform differ by {angle:.0f} degrees and {distance:.0f} mm{_SETTING}")


def _edges(lengths: NDArray[np.float64]) -> str:
    return " x ".join(f"{length:.3g}" for length in lengths)


def _header_size(start: bytes) -> int:
    sizes = [int.from_bytes(start[:4], order) for order in ("little", "big")]
    return next((size for size in sizes if size in (348, 540)), 0)


def mgh_header(start: bytes) -> tuple[MGHHeader, NDArray[np.float64]]:
    """Parse the first bytes of an MGH file.

    Returns:
        The header and its affine.

    Raises:
        VolumeError: it is not an MGH header, or it exceeds a limit.
    """
    try:
        header = MGHHeader.from_fileobj(io.BytesIO(start[:_MGH_HEADER] + bytes(64)))
        itemsize = header.get_data_dtype().itemsize
    except (*_HEADER_ERRORS, MGHError) as error:
        raise VolumeError("unreadable", f"not a readable MGH file ({_first_line(error)})") from error
    check_shape(squeezed(header.get_data_shape()), itemsize)
    return header, header.get_best_affine()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
