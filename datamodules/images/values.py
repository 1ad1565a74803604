"""Converting pixel values to 8 bits, and the faults of images."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from datamodules.limits import MAX_ASPECT

#: Percentiles that become black and white if an image has more than 8 bits and no window. With minimum and maximum,
#: one saturated letter in a 12-bit image would leave 6 of 256 grey levels.
PERCENTILES = (0.5, 99.5)


class ImageError(Exception):
    """A file that cannot be used.

    Args:
        kind: unreadable, checksum, shape, dtype, nan, constant, label, grid or missing.
        detail: What was found.
    """

    def __init__(self, kind: str, detail: str) -> None:
        self.kind, self.detail = kind, detail
        super().__init__(detail)


class UnreachableImageError(ImageError):
    """A missing or unreadable file: a mount or a permission, which may come back by itself."""


def check_size(height: int, width: int, limits: tuple[int, int]) -> None:
    """Check an image's size as given in its header.

    Args:
        height: Rows.
        width: Columns.
        limits: Least pixels of the smaller side, and most pixels of the image.

    Raises:
        ImageError: ``shape``.
    """
    min_side, max_pixels = limits
    if min(height, width) < min_side:
        raise ImageError("shape", f"{height} x {width} pixels, a side of at least {min_side} is needed")
    if height * width > max_pixels:
        raise ImageError("shape", f"the header promises {height} x {width} pixels, more than the limit")
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ImageError("shape", f"a strip of {height} x {width} pixels is not an image")


def stretched(values: NDArray[Any], ignored: NDArray[np.bool_] | None = None) -> NDArray[np.uint8]:
    """Map the 0.5th .. 99.5th percentile to 0 .. 255; minimum and maximum if these are equal.

    Args:
        values: ``(H, W)``, more than 8 bits.
        ignored: Pixels to exclude from the percentiles.

    Raises:
        ImageError: ``nan`` or ``constant``.
    """
    wide = values.astype(np.promote_types(values.dtype, np.float32))
    counted = wide if ignored is None else wide[~ignored]
    if not np.isfinite(counted).all():
        raise ImageError("nan", "some pixels are not numbers")
    if counted.size == 0:
        raise ImageError("constant", "every pixel is padding")
    low, high = np.percentile(counted, PERCENTILES)
    if low == high:
        low, high = counted.min(), counted.max()
    if low == high:
        raise ImageError("constant", f"every pixel is {low:g}")
    return to_bytes((wide - low) / (high - low))


def to_bytes(shares: NDArray[Any]) -> NDArray[np.uint8]:
    """Map 0 .. 1 to 0 .. 255, and clip."""
    return np.rint(np.clip(shares, 0, 1) * 255).astype(np.uint8)


def high_byte(values: NDArray[np.uint16]) -> NDArray[np.uint8]:
    """Reduce 16-bit colours to 8 bits, equally in all channels: divided by 257, so that 65,535 becomes 255."""
    return np.rint(values / np.float32(257)).astype(np.uint8)
