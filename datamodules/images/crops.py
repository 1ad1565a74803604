"""Crops of images: choosing a box and resizing it."""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

#: Left, top, right, bottom in pixels, possibly fractional.
Box = tuple[float, float, float, float]


def random_box(
    shape: Sequence[int],
    scale: Sequence[float],
    generator: np.random.Generator,
    ratio: Sequence[float] = (3 / 4, 4 / 3),
) -> Box:
    """Draw a box as torchvision's ``RandomResizedCrop`` does: by share of the area and aspect ratio.

    Args:
        shape: Height and width.
        scale: Smallest and largest share of the area.
        generator: Random generator of the draw.
        ratio: Smallest and largest width over height.

    Returns:
        The box; if ten draws do not fit, the central one with an allowed ratio.
    """
    height, width = shape
    for _ in range(10):
        area = height * width * generator.uniform(scale[0], scale[1])
        aspect = math.exp(generator.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(generator.integers(0, width - w + 1)), int(generator.integers(0, height - h + 1))
            return (left, top, left + w, top + h)
    inner_width, inner_height = min(width, height * ratio[1]), min(height, width / ratio[0])
    left_rest, top_rest = (width - inner_width) / 2, (height - inner_height) / 2
    return (left_rest, top_rest, width - left_rest, height - top_rest)


def center_box(shape: Sequence[int], size: Sequence[int]) -> Box:
    """Return the largest central box with ``size``'s ratio, as a resize and a central crop would."""
    height, width = shape
    factor = min(height / size[0], width / size[1])
    h, w = size[0] * factor, size[1] * factor
    return ((width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2)


def cut_box(
    image: NDArray[np.uint8], box: Box, size: Sequence[int], mirror: bool = False, degrees: float = 0.0
) -> Tensor:
    """Resize a box of ``(H, W)`` to ``(1, *size)`` float32 in [0, 1], of ``(H, W, 3)`` to ``(3, *size)``.

    The resize is bicubic and antialiased.

    Boxes of whole pixels, as training draws them, use PyTorch's byte kernel, 1.6 times as fast as Pillow's; fractional
    boxes need Pillow. The two agree to within 2 of 255.

    Args:
        image: 8 bits per pixel and channel.
        box: The box to cut.
        size: Height and width of the result.
        mirror: Whether to mirror left and right.
        degrees: Rotation of the result about its centre, filled with black.
    """
    left, top = math.floor(box[0]), math.floor(box[1])
    part = np.ascontiguousarray(image[top : math.ceil(box[3]), left : math.ceil(box[2])])
    inner = (box[0] - left, box[1] - top, box[2] - left, box[3] - top)
    if inner == (0, 0, part.shape[1], part.shape[0]) and not degrees:
        resized = F.interpolate(_channels_first(part)[None], tuple(size), mode="bicubic", antialias=True)[0]
    else:
        bicubic = Image.fromarray(part).resize((size[1], size[0]), Image.Resampling.BICUBIC, box=inner)
        turned = bicubic.rotate(degrees, Image.Resampling.BILINEAR) if degrees else bicubic
        resized = _channels_first(np.array(turned))
    return (resized.flip(-1) if mirror else resized) / 255


def _channels_first(pixels: NDArray[np.uint8]) -> Tensor:
    """Turn ``(H, W)`` or ``(H, W, 3)`` into ``(1 or 3, H, W)``."""
    return torch.from_numpy(pixels)[None] if pixels.ndim == 2 else torch.from_numpy(pixels).movedim(-1, 0)
