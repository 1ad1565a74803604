"""Images of DICOM files in 8 bits, as a viewer shows them (PS3.3 C.7.5.1.1.2, C.11.1, C.11.2, C.11.6).

Steps in order: stored values; mark padding; modality LUT or rescale; VOI LUT or window, otherwise percentiles; at most
one inversion; padding to black. Palettes and YBR become RGB, overlays are not drawn.
"""

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError
from datamodules.images.values import ImageError, high_byte, stretched, to_bytes
from datamodules.limits import MAX_DATASET_BYTES, MAX_SEGMENTED_PALETTE
from datamodules.notes import note

SUFFIXES = (".dcm", ".dicom")
#: Least number of grey levels after windowing; a window that leaves fewer does not belong to the file's values.
MIN_LEVELS = 32
#: Values at which any window has reached black or white.
_FAR = 1e9


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM, by its name or first bytes.

    Raises:
        OSError: the file cannot be opened.
    """
    if path.name.lower().endswith(SUFFIXES):
        return True
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def import_pydicom() -> Any:
    """Return pydicom.

    Raises:
        UserError: it is not installed.
    """
    try:
        import pydicom
    except ImportError as error:
        raise UserError("Reading DICOM images needs pydicom: install it with pip install 'medmim[dicom]'.") from error
    return pydicom


def read_size(path: Path) -> tuple[int, int]:
    """Read height and width from the header.

    Raises:
        ImageError: the file does not hold exactly one image.
        UserError: pydicom is not installed.
    """
    _check_deflated(path)
    names = ["Rows", "Columns", "NumberOfFrames", "SOPClassUID"]
    return _size(import_pydicom().dcmread(path, stop_before_pixels=True, specific_tags=names))


def _size(dataset: Any) -> tuple[int, int]:
    if dataset.get("Rows") is None or dataset.get("Columns") is None:
        name = dataset.SOPClassUID.name if dataset.get("SOPClassUID") else "an unknown class"
        raise ImageError("unreadable", f"a DICOM file of {name} without an image")
    if int(dataset.get("NumberOfFrames") or 1) != 1:
        raise ImageError("shape", f"expected one frame, found {dataset.NumberOfFrames}")
    return int(dataset.Rows), int(dataset.Columns)


def _check_deflated(path: Path) -> None:
    """Refuse a deflated data set above the size limit: pydicom would inflate all of it."""
    pydicom = import_pydicom()
    with path.open("rb") as file:
        if file.read(132)[128:] != b"DICM":
            return
        file.seek(0)
        pydicom.filereader.read_preamble(file, force=False)
        syntax = pydicom.filereader._read_file_meta_info(file).get("TransferSyntaxUID")
        if syntax != pydicom.uid.DeflatedExplicitVRLittleEndian:
            return
        stream = zlib.decompressobj(-zlib.MAX_WBITS)
        if len(stream.decompress(file.read(), MAX_DATASET_BYTES + 1)) > MAX_DATASET_BYTES:
            raise ImageError("shape", f"its deflated data set has more than {MAX_DATASET_BYTES / 2**20:.0f} MiB")


def read_picture(path: Path, check: Callable[[int, int], None]) -> NDArray[np.uint8]:
    """Read the image of a single-frame file.

    Args:
        path: The file.
        check: Called with height and width before decoding; may raise.

    Returns:
        ``(H, W)``, or ``(H, W, 3)`` in RGB.

    Raises:
        ImageError: there is no image, or it cannot be decoded or displayed.
        UserError: a required decoder is not installed.
    """
    _check_deflated(path)
    dataset = import_pydicom().dcmread(path)
    check(*_size(dataset))
    stored = _decode(dataset)
    meaning = dataset.PhotometricInterpretation
    if meaning == "PALETTE COLOR":
        stored = _through_palette(stored, dataset)
    if stored.ndim == 3:
        return _colours(stored, 16 if meaning == "PALETTE COLOR" else int(dataset.BitsStored))
    if meaning not in ("MONOCHROME1", "MONOCHROME2"):
        raise ImageError("unreadable", f"DICOM images of {meaning} are not supported")
    return _gray(stored, dataset)


def _decode(dataset: Any) -> NDArray[Any]:
    """Decode ``(H, W)``, or ``(H, W, 3)`` in RGB."""
    from pydicom.pixels import get_decoder, pixel_array

    syntax = dataset.file_meta.TransferSyntaxUID
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError as error:
        raise ImageError("unreadable", f"its transfer syntax, {syntax.name}, is not supported") from error
    if not decoder.is_available:
        raise UserError(
            f"Reading DICOM images of transfer syntax {syntax.name} needs further decoders: "
            "install them with pip install 'medmim[dicom]'."
        )
    if syntax.is_encapsulated:
        _check_codestream(dataset)
    try:
        return pixel_array(dataset)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ImageError("unreadable", f"its {syntax.name} cannot be decoded ({reason})") from error


def _check_codestream(dataset: Any) -> None:
    """Refuse compressed pixels whose size differs from the header's: decoders trust the codestream."""
    from pydicom.encaps import get_frame

    frame = get_frame(dataset.PixelData, 0, number_of_frames=1)
    expected = int(dataset.Rows), int(dataset.Columns), int(dataset.SamplesPerPixel)
    found = _jpeg2000_size(frame) or _jpeg_size(frame)
    if found is not None and found != expected:
        raise ImageError("shape", f"the header promises {expected[0]} x {expected[1]} x {expected[2]} values, the "
                                  f"compressed image {' x '.join(map(str, found))}")  # fmt: skip
    if len(frame) > 2 * np.prod(expected) * int(dataset.BitsAllocated) // 8 + 2**16:
        raise ImageError("shape", f"{len(frame):,} compressed bytes are more than twice the image's size")


def _jpeg2000_size(frame: bytes) -> tuple[int, int, int] | None:
    """Return rows, columns and components of a JPEG 2000 codestream, as it is or in a file's boxes."""
    start = frame.find(b"\xff\x4f\xff\x51", 0, 4096)
    if start < 0 or len(frame) < start + 42:
        return None
    right, bottom, left, top = struct.unpack_from(">4I", frame, start + 8)
    return bottom - top, right - left, struct.unpack_from(">H", frame, start + 40)[0]


def _jpeg_size(frame: bytes) -> tuple[int, int, int] | None:
    """Return rows, columns and components of a JPEG or JPEG-LS stream."""
    place = 2
    while frame[:2] == b"\xff\xd8" and place + 10 <= len(frame) and frame[place] == 0xFF:
        marker, length = frame[place + 1], int.from_bytes(frame[place + 2 : place + 4], "big")
        # Start of frame: C0 to CF except the tables among them, F7 for JPEG-LS.
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            return (*struct.unpack_from(">2H", frame, place + 5), frame[place + 9])
        place += 1 if marker == 0xFF else 2 + length
    return None


def _through_palette(stored: NDArray[Any], dataset: Any) -> NDArray[Any]:
    from pydicom.pixels import apply_color_lut

    for name in ("Red", "Green", "Blue"):
        if len(dataset.get(f"Segmented{name}PaletteColorLookupTableData") or b"") > MAX_SEGMENTED_PALETTE:
            raise ImageError("shape", f"its palette has more than {MAX_SEGMENTED_PALETTE} bytes of segments")
    return apply_color_lut(stored, dataset)[..., :3]


def _colours(stored: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    if stored.dtype == np.uint8:
        return stored
    return high_byte(stored) if bits == 16 else to_bytes(stored / (2**bits - 1))


def _gray(stored: NDArray[Any], dataset: Any) -> NDArray[np.uint8]:
    from pydicom.pixels import apply_modality_lut

    padding = _padding(stored, dataset)
    _widen_tables(dataset)
    # In 32 bits, as pydicom subtracts a table's first value in the array's dtype.
    values = apply_modality_lut(stored.astype(np.int32) if stored.dtype.kind in "iu" else stored, dataset)
    shown = _through_window(values, padding, dataset)
    if shown is None and stored.dtype == np.uint8 and int(dataset.BitsStored) <= 8 and (values == stored).all():
        shown = stored.copy()
    if shown is None:
        shown = stretched(values, padding)
    if dataset.PhotometricInterpretation == "MONOCHROME1" or dataset.get("PresentationLUTShape") == "INVERSE":
        shown = 255 - shown
    if padding is not None:
        shown[padding] = 0
    return shown


def _padding(stored: NDArray[Any], dataset: Any) -> NDArray[np.bool_] | None:
    """Mark the padding around the image; None if there is none."""
    first = dataset.get("PixelPaddingValue")
    if first is None or stored.dtype.kind not in "iu":
        return None
    last = dataset.get("PixelPaddingRangeLimit")
    # In the pixels' own type: the value may be written unsigned for signed pixels, and vice versa.
    ends = sorted(_as_stored(value, stored.dtype) for value in (first, first if last is None else last))
    padding = (stored >= ends[0]) & (stored <= ends[1])
    height, width = stored.shape
    central = padding[height // 4 : -(-3 * height // 4), width // 4 : -(-3 * width // 4)]
    if 2 * central.sum() > central.size:
        note("most of the image's centre has the padding value, which was kept", dataset.filename)
        return None
    return padding if padding.any() else None


def _as_stored(value: Any, dtype: np.dtype[Any]) -> int:
    number = int.from_bytes(value, "little") if isinstance(value, bytes) else int(value)
    return int(np.array(number % 2 ** (8 * dtype.itemsize), dtype=f"u{dtype.itemsize}").view(dtype))


def _widen_tables(dataset: Any) -> None:
    """Look tables up in 16 bits: pydicom otherwise counts their entries in 8 bits, or does not support 12."""
    for name in ("ModalityLUTSequence", "VOILUTSequence"):
        for table in dataset.get(name) or ():
            count, first, _ = table.LUTDescriptor
            table.LUTDescriptor = [count, first, 16]


def _through_window(values: NDArray[Any], padding: NDArray[np.bool_] | None, dataset: Any) -> NDArray[np.uint8] | None:
    """Apply the first VOI LUT or window; None if there is none or it leaves too few grey levels."""
    from pydicom.pixels import apply_voi_lut

    tables = dataset.get("VOILUTSequence")
    if not tables and (dataset.get("WindowCenter") is None or dataset.get("WindowWidth") is None):
        return None
    try:
        ends = np.array([-_FAR, _FAR])
        if tables:
            count, first, _ = tables[0].LUTDescriptor
            ends = np.arange(first, first + (count or 2**16))
            values = np.clip(np.rint(values), ends[0], ends[-1]).astype(np.int32)
        with np.errstate(over="ignore"):
            span, shown = apply_voi_lut(ends, dataset), apply_voi_lut(values, dataset)
        shown = to_bytes((shown - float(span.min())) / float(np.ptp(span) or 1))
    except (AttributeError, KeyError, TypeError, ValueError, NotImplementedError, struct.error):
        note("the window or VOI LUT is invalid and was not used", dataset.filename)
        return None
    if len(np.unique(shown if padding is None else shown[~padding])) < MIN_LEVELS:
        note(f"the window or VOI LUT leaves fewer than {MIN_LEVELS} of 256 and was not used", dataset.filename)
        return None
    return shown
