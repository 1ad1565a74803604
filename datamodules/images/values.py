"""From the values of a picture to 8 bits, and what is wrong with a picture."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from datamodules.limits import MAX_ASPECT

#: Percentiles that become black and white where a picture has more than 8 bits and says no window of its own. From
#: minimum to maximum, one saturated letter in a 12-bit picture would leave 6 shades of 256.
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
    """A file that is not there or cannot be opened: a mount or a permission, which may come back by itself."""


def check_size(height: int, width: int, limits: tuple[int, int]) -> None:
    """Refuse a picture by the size that its header promises.

    Args:
        height: Rows.
        width: Columns.
        limits: Pixels that the smaller side needs, and that the picture may have.

    Raises:
        ImageError: ``shape``.
    """
    min_side, max_pixels = limits
    if min(height, width) < min_side:
        raise ImageError("shape", f"{height} x {width} pixels, a side of at least {min_side} is needed")
    if height * width > max_pixels:
        raise ImageError("shape", f"the header promises {height} x {width} pixels, more than is opened here")
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ImageError("shape", f"a strip of {height} x {width} pixels is no picture")


def stretched(values: NDArray[Any], ignored: NDArray[np.bool_] | None = None) -> NDArray[np.uint8]:
    """Map the 0.5th .. 99.5th percentile to 0 .. 255; minimum and maximum where these are equal.

    Args:
        values: ``(H, W)``, more than 8 bits.
        ignored: Pixels that the percentiles leave out.

    Raises:
        ImageError: ``nan`` or ``constant``.
    """
    wide = values.astype(np.promote_types(values.dtype, np.float32))
    counted = wide if ignored is None else wide[~ignored]
    if not np.isfinite(counted).all():
        raise ImageError("nan", "there are pixels that are no number")
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
    """Bring colours of 16 bits to 8, alike in all channels: divided by 257, so that 65,535 becomes 255."""
    return np.rint(values / np.float32(257)).astype(np.uint8)
