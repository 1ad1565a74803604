"""Reads 2D medical images to the last byte as 8 bits, grey or colour; every way of being broken has a kind.

EXIF orientation is ignored except for figures: in radiographs it has no meaning. Files with several frames or pages
are refused, as silently using one would be wrong. Pillow's ``LOAD_TRUNCATED_IMAGES`` must stay off, its default.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError, features
from torch import Tensor

from common.errors import UserError
from datamodules.images.dicom import is_dicom, read_picture, read_size
from datamodules.images.values import ImageError, UnreachableImageError, check_size, high_byte, stretched
from datamodules.limits import MAX_PIXELS, MAX_SQUARE_PIXELS
from datamodules.members import REFUSED, is_pointer, why_missing

#: Formats that are opened; not PostScript and the like, which can run programs.
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "PPM")
#: Channels of an encoder's input: grey, repeated on the device.
CHANNELS = ("red", "green", "blue")
#: Least side in pixels; smaller images are refused.
MIN_SIDE = 32
_PHOTOMETRIC = 262


def per_channel(value: float | Sequence[float]) -> Tensor:
    """Return one number, or one per channel, as ``(C, 1, 1)``."""
    return torch.tensor(value, dtype=torch.float32).reshape(-1, 1, 1)


def plain_numbers(value: float | Sequence[float]) -> float | list[float]:
    """Return one number or a list, the form in records of preprocessing."""
    return value if isinstance(value, int | float) else list(value)


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


#: Part of the cache key: another decoder or reader version may give other pixels.
DECODERS = {
    "reader": "2",
    "Pillow": Image.__version__,
    "libjpeg_turbo": features.version("libjpeg_turbo") or "",
    **{package: _installed(package) for package in ("pydicom", "python-gdcm", "pylibjpeg-openjpeg")},
}


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn any error of a decoder into an :class:`ImageError`."""
    try:
        if not path.is_file():
            raise UnreachableImageError("missing", why_missing(path))
        if path.stat().st_size == 0:
            raise ImageError("unreadable", "the file is empty")
        if path.name.lower().endswith(".dcm.gz"):
            raise ImageError("unreadable", REFUSED[".dcm.gz"])
        yield
    except (ImageError, UserError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError("shape", f"more pixels than the limit ({error})") from error
    except UnidentifiedImageError as error:
        if is_pointer(path):
            raise UnreachableImageError("missing", "a Git LFS pointer without content: run git lfs pull") from error
        raise ImageError("unreadable", "not an image of a known format, or its header is damaged") from error
    except Exception as error:  # decoders raise many exceptions for broken files; all mean the same here
        if isinstance(error, OSError) and error.errno is not None:
            detail = f"the file cannot be opened ({error.strerror or error})"
            raise UnreachableImageError("unreadable", detail) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise ImageError("unreadable", f"not a readable image ({reason})") from error


def read_header(path: Path) -> tuple[int, int]:
    """Read height and width without decoding pixels.

    Raises:
        ImageError: missing, empty, of unknown format, or above the pixel limit.
        UserError: a DICOM file, and pydicom is not installed.
    """
    with _reading(path):
        if is_dicom(path):
            height, width = read_size(path)
        else:
            with Image.open(path, formats=FORMATS) as image:
                height, width = image.height, image.width
        check_size(height, width, (1, MAX_PIXELS))
        return height, width


def reduced_size(height: int, width: int, shorter_side: int | None) -> tuple[int, int]:
    """Return the size with ``shorter_side`` as the shorter side; never enlarged."""
    scale = (shorter_side or min(height, width)) / min(height, width)
    if scale >= 1:
        return height, width
    return round(height * scale), round(width * scale)


def read_gray(
    path: Path, shorter_side: int | None = None, min_side: int = MIN_SIDE, max_pixels: int = MAX_PIXELS
) -> NDArray[np.uint8]:
    """Read an image as grayscale.

    Colour becomes luma; alpha is dropped. Grey above 8 bits is stretched from its 0.5th to 99.5th percentile; 16-bit
    colour is divided by 257. DICOM: see :mod:`datamodules.images.dicom`.

    Args:
        path: The file; DICOM is recognised by suffix or content, ``FORMATS`` by content.
        shorter_side: Shorter side of the result in pixels, aspect kept; smaller images keep their size. A JPEG is
            decoded at the smallest of 1, 1/2, 1/4 and 1/8 that is not below it.
        min_side: Images with a smaller side are refused.
        max_pixels: Larger images are refused before decoding; Pillow's own limit of
            ``2 * PIL.Image.MAX_IMAGE_PIXELS`` applies, too.

    Returns:
        ``(H, W)``.

    Raises:
        ImageError: missing, empty, truncated, damaged, too small, too large or constant.
        UserError: a DICOM file whose decoder is not installed.
    """
    return _read_whole(path, shorter_side, (min_side, max_pixels), "L")


def read_colour(
    path: Path, shorter_side: int | None = None, min_side: int = MIN_SIDE, max_pixels: int = MAX_PIXELS
) -> NDArray[np.uint8]:
    """Read an image in colour: grey becomes three equal channels, alpha is dropped; otherwise as :func:`read_gray`.

    Args:
        path: As in :func:`read_gray`.
        shorter_side: As in :func:`read_gray`.
        min_side: As in :func:`read_gray`.
        max_pixels: As in :func:`read_gray`.

    Returns:
        ``(H, W, 3)``.

    Raises:
        ImageError: as :func:`read_gray`.
        UserError: as :func:`read_gray`.
    """
    return _read_whole(path, shorter_side, (min_side, max_pixels), "RGB")


def _read_whole(path: Path, shorter_side: int | None, limits: tuple[int, int], mode: str) -> NDArray[np.uint8]:
    if shorter_side is not None and shorter_side < 1:
        raise ValueError(f"`shorter_side` must be at least 1 pixel, got {shorter_side}.")
    with _reading(path):
        image, full, box = _decode(path, shorter_side, limits, mode)
        height, width = reduced_size(*full, shorter_side)
        if (image.height, image.width) != (height, width):
            image = image.resize((width, height), Image.Resampling.BICUBIC, box)
        return _varied(np.array(image))


def read_field_of_view(path: Path, shorter_side: int | None = None, threshold: int = 20) -> NDArray[np.uint8]:
    """Read a fundus image, crop it to the field of view, and pad it with black to a square.

    Args:
        path: The file.
        shorter_side: Side of the square in pixels; None keeps the file's resolution.
        threshold: Value of the brightest channel, of 255, that a row or column must reach well inside to be kept.

    Returns:
        ``(S, S, 3)``.

    Raises:
        ImageError: as :func:`read_gray`; also ``constant`` if nothing is brighter than the threshold.
        UserError: as :func:`read_gray`.
    """
    pixels, field = _field_of_view(path, shorter_side, threshold)
    return _squared(pixels[field], shorter_side, Image.Resampling.BICUBIC)


def cut_to_field_of_view(mask: NDArray[np.uint8], path: Path, shorter_side: int | None = None) -> NDArray[np.uint8]:
    """Crop and pad a mask as :func:`read_field_of_view` does its image.

    Args:
        mask: ``(H, W)`` on the grid of the image's file.
        path: The image.
        shorter_side: Side of the square in pixels; None keeps the file's resolution.

    Returns:
        ``(S, S)``.

    Raises:
        ImageError: as :func:`read_field_of_view`.
    """
    pixels, field = _field_of_view(path, shorter_side)
    size = (pixels.shape[1], pixels.shape[0])
    reduced = np.array(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
    return _squared(reduced[field], shorter_side, Image.Resampling.NEAREST)


def _field_of_view(
    path: Path, shorter_side: int | None, threshold: int = 20
) -> tuple[NDArray[np.uint8], tuple[slice, slice]]:
    """Read a fundus image and find the rows and columns of its field of view."""
    # Twice the side, so that the cropped image is not smaller than requested.
    pixels = read_colour(path, None if shorter_side is None else 2 * shorter_side)
    bright = pixels.max(-1) > threshold
    # One hundredth of a line, so that speckles and printed letters do not count as the eye.
    rows, columns = (np.flatnonzero(bright.sum(axis) > max(bright.shape[axis] / 100, 2)) for axis in (1, 0))
    if not len(rows) or not len(columns):
        raise ImageError("constant", f"nothing is brighter than {threshold} of 255, so there is no field of view")
    return pixels, (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))


def _squared(pixels: NDArray[np.uint8], shorter_side: int | None, resampling: Image.Resampling) -> NDArray[np.uint8]:
    """Pad ``(H, W)`` or ``(H, W, 3)`` with black to a square and downscale it."""
    side = max(pixels.shape[:2])
    if side**2 > MAX_SQUARE_PIXELS:
        raise ImageError("shape", f"{pixels.shape[0]} x {pixels.shape[1]} pixels cannot be an eye's photograph: padded "
                                  f"to a square, they exceed the limit")  # fmt: skip
    above, left = (side - pixels.shape[0]) // 2, (side - pixels.shape[1]) // 2
    square = np.zeros((side, side, *pixels.shape[2:]), dtype=np.uint8)
    square[above : above + pixels.shape[0], left : left + pixels.shape[1]] = pixels
    if shorter_side is not None and side > shorter_side:
        square = np.array(Image.fromarray(square).resize((shorter_side, shorter_side), resampling))
    return square


def read_figure(
    path: Path, shorter_side: int | None = None, min_side: int = MIN_SIDE, max_pixels: int = MAX_PIXELS
) -> NDArray[np.uint8]:
    """Read a paper's figure in colour: transparent parts become white, EXIF orientation is applied.

    Args:
        path: As in :func:`read_gray`.
        shorter_side: As in :func:`read_gray`.
        min_side: As in :func:`read_gray`.
        max_pixels: As in :func:`read_gray`.

    Returns:
        ``(H, W, 3)``.

    Raises:
        ImageError: as :func:`read_gray`.
        UserError: as :func:`read_gray`.
    """
    with _reading(path):
        if is_dicom(path):
            return read_colour(path, shorter_side, min_side, max_pixels)
    with _reading(path), Image.open(path, formats=FORMATS) as image:
        check_size(image.height, image.width, (min_side, max_pixels))
        if image.format == "PNG":
            _check_png(path)
        _check_kind(image)
        figure = ImageOps.exif_transpose(_on_white(image))
        height, width = reduced_size(figure.height, figure.width, shorter_side)
        if (figure.height, figure.width) != (height, width):
            figure = figure.resize((width, height), Image.Resampling.BICUBIC)
        return _varied(np.array(figure))


class ImageReader(NamedTuple):
    """How files are decoded.

    Attributes:
        name: Part of cache keys; empty for grey.
        channels: Number of channels.
        read: Reads a file, downscaled to a shorter side if one is given.
    """

    name: str
    channels: int
    read: Callable[[Path, int | None], NDArray[np.uint8]]


GRAY = ImageReader("", 1, read_gray)
COLOUR = ImageReader("colour", 3, read_colour)
FIGURE = ImageReader("figure", 3, read_figure)
FUNDUS = ImageReader("field of view", 3, read_field_of_view)


def read_reduced(
    path: Path, shorter_side: int, min_side: int = MIN_SIDE, max_pixels: int = MAX_PIXELS
) -> tuple[NDArray[np.uint8], float]:
    """Read an image like :func:`read_gray`, but keep the scale at which it was decoded.

    Args:
        path: The file.
        shorter_side: Least pixels of the shorter side; only JPEGs are decoded at a smaller scale.
        min_side: As in :func:`read_gray`.
        max_pixels: As in :func:`read_gray`.

    Returns:
        ``(H, W)`` and its scale relative to the file.

    Raises:
        ImageError: as :func:`read_gray`.
        UserError: as :func:`read_gray`.
    """
    with _reading(path):
        gray, full, box = _decode(path, shorter_side, (min_side, max_pixels), "L")
        return _varied(np.array(gray)), 1.0 if box is None else box[2] / full[1]


def _varied(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if (pixels == pixels[0, 0]).all():
        raise ImageError("constant", f"every pixel is {pixels[0, 0].tolist()}")
    return pixels


def _decode(path: Path, shorter_side: int | None, limits: tuple[int, int], mode: str) -> "_Decoded":
    """Decode to ``L`` or ``RGB``."""
    if not is_dicom(path):
        return _read_picture(path, shorter_side, limits, mode)
    pixels = read_picture(path, lambda height, width: check_size(height, width, limits))
    return _Decoded(Image.fromarray(pixels).convert(mode), (pixels.shape[0], pixels.shape[1]))


class _Decoded(NamedTuple):
    """A decoded image, the height and width of its file, and the box (pixels) it occupies."""

    image: Image.Image
    full: tuple[int, int]
    box: tuple[float, float, float, float] | None = None


def _read_picture(path: Path, shorter_side: int | None, limits: tuple[int, int], mode: str) -> _Decoded:
    with Image.open(path, formats=FORMATS) as image:
        full = (image.height, image.width)
        check_size(*full, limits)
        if image.format == "PNG":
            _check_png(path)
        _check_kind(image)
        drafted = None
        if shorter_side is not None and min(full) > shorter_side:
            drafted = image.draft(mode, (shorter_side, shorter_side))
        # The last row and column of a draft may reach beyond the image, hence the box.
        converted = _to_gray(image) if mode == "L" else _to_colour(image)
        return _Decoded(converted, full, drafted[1] if drafted else None)


def _check_png(path: Path) -> None:
    """Verify the check sums of a PNG's chunks, which decoding ignores."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            image.verify()
    except SyntaxError as error:
        kind = "checksum" if "bad" in str(error) else "unreadable"
        raise ImageError(kind, f"the file is damaged or ends early ({error})") from error


def _check_kind(image: Image.Image) -> None:
    """Refuse files with several images or with ambiguous colours."""
    if _is_series(image):
        frames = getattr(image, "n_frames", 1)
        raise ImageError("shape", f"holds {frames} frames or pages; one image is needed: save that one")
    if image.mode == "CMYK" and (_is_deep(image) or (image.format == "JPEG" and "adobe" not in image.info)):
        raise ImageError("dtype", "CMYK colours, which may or may not be inverted: save it as RGB")
    if any("LA;16" in str(tile.args) for tile in getattr(image, "tile", ())):
        raise ImageError("dtype", "16-bit grey with transparency is not supported: save it without transparency")


def _is_series(image: Image.Image) -> bool:
    """Whether there is a second image; thumbnails in a TIFF do not count."""
    if getattr(image, "n_frames", 1) == 1 or image.format == "MPO":  # a camera's second frame is a preview
        return False
    if image.format != "TIFF":
        return True
    size = image.size
    image.seek(1)
    second = image.size
    image.seek(0)
    return second == size


def _is_deep(image: Image.Image) -> bool:
    """Whether Pillow would reduce 16-bit colour, or grey with transparency, to the high byte."""
    tiles = getattr(image, "tile", ())
    return not image.mode.startswith("I") and any(";16" in str(tile.args) for tile in tiles)


def _shallow(image: Image.Image) -> Image.Image:
    """Convert an image to 8 bits per channel."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        # Pillow inverts white-is-zero TIFFs only for 8 bits.
        white_is_zero = image.format == "TIFF" and image.tag_v2.get(_PHOTOMETRIC) == 0  # type: ignore[attr-defined]
        gray = stretched(np.asarray(image))
        return Image.fromarray(255 - gray if white_is_zero else gray)
    if not _is_deep(image):
        return image
    reader = sitk.ImageFileReader()
    reader.SetFileName(image.filename)  # type: ignore[attr-defined]
    reader.SetImageIO(f"{image.format}ImageIO")
    try:
        values = sitk.GetArrayFromImage(reader.Execute())
    except RuntimeError as error:
        raise ImageError("unreadable", str(error).strip().splitlines()[-1].strip()) from error
    shallow = Image.fromarray(high_byte(values))
    shallow.info["exif"] = image.info.get("exif", b"")
    return shallow


def _to_gray(image: Image.Image) -> Image.Image:
    image = _shallow(image)
    if image.mode == "L":
        image.load()  # the file is about to be closed
        return image
    return _to_colour(image).convert("L")


def _to_colour(image: Image.Image) -> Image.Image:
    image = _shallow(image)
    # Via RGBA a palette keeps the colours of transparent entries; dropping alpha then exposes them.
    return image.convert("RGBA" if image.mode in ("P", "PA") else "RGB").convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    """Convert to ``RGB``, with transparent parts on white; EXIF is kept."""
    image = _shallow(image)
    if image.mode not in ("P", "PA", "LA", "RGBA") and "transparency" not in image.info:
        return _to_colour(image)
    layered = image.convert("RGBA")
    flat = Image.alpha_composite(Image.new("RGBA", layered.size, "white"), layered).convert("RGB")
    flat.info["exif"] = image.info.get("exif", b"")
    return flat
