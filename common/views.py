"""Two views of every image or volume for methods that compare views, made on the device in one batched call.

Crops, mirrors and turns are one resampling of what the data module cut; intensities follow. Every number is a function
of the sample's key and the view, so views do not depend on the batch, the worker or the rank. There is no hue, no
solarisation and no grey-scaling: the first two make images that no device takes, such as the negative of a radiograph.

Letters: B batch, C channels, d spatial axes.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common.randomness import KeyedGenerator
from common.runtime.precision import at_least_float32
from common.types import InputSpec

#: The side at which blur is given.
_SIDE = 224


class View(NamedTuple):
    """One view of a batch.

    Attributes:
        image: ``(B, C, *space)``.
        modality_mask: bool ``(B, C)``, True = acquired and not dropped from this view.
    """

    image: Tensor
    modality_mask: Tensor


def _blend(draw: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) * draw


@dataclass(frozen=True)
class ViewConfig:
    """How views differ from the image; the defaults suit radiographs and other grey pictures.

    Args:
        area: Share of the image's area that a crop of a picture has.
        edge: Share of each edge that the box of a volume has.
        overlap: Share of the smaller box that two boxes of a volume have in common, at least.
        mirror: Spatial axes along which half of the views are mirrored; a heart has a side, so none.
        degrees: Largest angle of a turn.
        intensity: Probability of a change of brightness and contrast: a gain of 0.6 to 1.4 and a shift of up to 0.4
            standard deviations.
        gamma: Probability of a gamma of 0.7 to 1.5 on values scaled to [0, 1].
        saturation: Largest relative change of saturation, of half of the views; photographs alone.
        blur: Probability of a Gaussian blur of 0.1 to 2 pixels at a side of 224.
        noise: Probability of Gaussian noise of 0.05 standard deviations.
        drop: Probability that a modality is left out of a view; one always stays.
        separate: Whether every channel has its own brightness, contrast and gamma: modalities do, colours do not.
        background: Whether values of exactly 0 stay 0, as the air around a head.

    Raises:
        ValueError: a share or probability is outside [0, 1], or shares do not rise.
    """

    area: tuple[float, float] = (0.3, 1.0)
    edge: tuple[float, float] = (0.5, 1.0)
    overlap: float = 0.25
    mirror: tuple[int, ...] = ()
    degrees: float = 10.0
    intensity: float = 0.8
    gamma: float = 0.5
    saturation: float = 0.0
    blur: float = 0.5
    noise: float = 0.2
    drop: float = 0.0
    separate: bool = False
    background: bool = False

    def __post_init__(self) -> None:
        for name in ("overlap", "intensity", "gamma", "saturation", "blur", "noise", "drop"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`views.{name}` must lie in [0, 1], got {getattr(self, name)}.")
        for name in ("area", "edge"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                raise ValueError(f"`views.{name}` must be two rising shares in (0, 1], got {[low, high]}.")

    @classmethod
    def suiting(cls, spec: InputSpec) -> "ViewConfig":
        """Return the settings that suit volumes, photographs such as fundi, or grey pictures."""
        if len(spec.image_size) == 3:
            return cls(intensity=0.8, gamma=0.8, blur=0.3, noise=0.3, drop=0.2, separate=True, background=True)
        if "gray" in str(spec.preprocessing.get("intensity", "")):
            return cls()
        return cls(mirror=(1,), degrees=20.0, gamma=0.0, saturation=0.2)

    def check(self, channels: int) -> None:
        """Refuse settings that do not suit data of so many channels.

        Raises:
            ValueError: saturation of what has no three colours.
        """
        if self.saturation and channels != 3:
            raise ValueError(f"`views.saturation` is for colour images, and the data give {channels} channels: "
                             "set it to 0.")  # fmt: skip

    def edges(self, generator: KeyedGenerator, dims: int) -> Tensor:
        """Draw the edges of a box ``(B, d)`` as shares of the image's: ratios of 3/4 to 4/3 in pictures."""
        draw = generator.rand((len(generator.keys), dims))
        if dims > 2:
            return _blend(draw, *self.edge)
        area = _blend(draw[:, 0], *self.area)
        ratio = _blend(draw[:, 1], math.log(3 / 4), math.log(4 / 3)).exp()
        return torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], 1).clamp(max=1)

    def boxes(self, first: KeyedGenerator, second: KeyedGenerator, dims: int) -> list[tuple[Tensor, Tensor]]:
        """Draw where both boxes begin and how long they are, ``(B, d)`` each, as shares of the image."""
        long_u, long_v = self.edges(first, dims), self.edges(second, dims)
        place_u, place_v = (generator.rand(tuple(long_u.shape)) for generator in (first, second))
        begin_u = place_u * (1 - long_u)
        low, high = torch.zeros_like(long_v), 1 - long_v
        if dims > 2 and self.overlap:
            common = self.overlap ** (1 / dims) * torch.minimum(long_u, long_v)
            low, high = (begin_u + common - long_v).clamp(min=0), torch.minimum(high, begin_u + long_u - common)
        return [(begin_u, long_u), (low + place_v * (high - low).clamp(min=0), long_v)]


def _turns(angles: Tensor, dims: int) -> Tensor:
    """Return rotation matrices ``(B, d, d)`` of angles ``(B, d (d - 1) / 2)`` in radians, one per plane."""
    result = torch.eye(dims, device=angles.device).expand(len(angles), dims, dims)
    planes = [(i, j) for i in range(dims) for j in range(i + 1, dims)]
    for index, (i, j) in enumerate(planes):
        turn = torch.eye(dims, device=angles.device).repeat(len(angles), 1, 1)
        cosine, sine = angles[:, index].cos(), angles[:, index].sin()
        turn[:, i, i], turn[:, j, j], turn[:, i, j], turn[:, j, i] = cosine, cosine, -sine, sine
        result = result @ turn
    return result


def resample(image: Tensor, begin: Tensor, length: Tensor, turn: Tensor, flip: Tensor, zeros: bool) -> Tensor:
    """Cut a box out of every image, turned about its centre and mirrored, at the image's size.

    Args:
        image: ``(B, C, *space)``.
        begin: ``(B, d)``, where the box begins, as a share of each edge.
        length: ``(B, d)``, likewise its length.
        turn: ``(B, d, d)``, a rotation in pixels.
        flip: ``(B, d)``, -1 = mirrored, 1 = not.
        zeros: Whether 0 lies beyond the image; else its border goes on.

    Returns:
        ``(B, C, *space)``, float32 (float64 stays).
    """
    size = torch.tensor(image.shape[2:], device=image.device, dtype=torch.float32)
    centre = 2 * begin + length - 1
    matrix = turn * size[None, None, :] / size[None, :, None] * (length * flip)[:, None, :]
    # grid_sample counts axes from the last one.
    theta = torch.cat([matrix.flip(1, 2), centre.flip(1)[:, :, None]], 2)
    image = at_least_float32(image)
    grid = F.affine_grid(theta, list(image.shape), align_corners=False).to(image.dtype)
    return F.grid_sample(image, grid, padding_mode="zeros" if zeros else "border", align_corners=False)


def _blurred(image: Tensor, sigma: Tensor) -> Tensor:
    """Blur every image with its own Gaussian of ``sigma`` ``(B,)`` pixels, axis by axis; 0 leaves it unchanged."""
    radius = max(1, math.ceil(3 * 2 * max(image.shape[2:]) / _SIDE))
    steps = torch.arange(-radius, radius + 1, device=image.device)
    kernel = (-0.5 * (steps / sigma.clamp(min=1e-3)[:, None]) ** 2).exp()
    kernel = (kernel / kernel.sum(1, keepdim=True)).to(image.dtype).repeat_interleave(image.shape[1], 0)
    x = image.flatten(0, 1)[None]
    convolve, dims = (F.conv2d, 2) if image.ndim == 4 else (F.conv3d, 3)
    for axis in range(dims):
        shape = [len(kernel), 1] + [len(steps) if a == axis else 1 for a in range(dims)]
        pads = [radius if a == axis else 0 for a in reversed(range(dims)) for _ in range(2)]
        x = convolve(F.pad(x, pads, mode="replicate"), kernel.view(shape), groups=len(kernel))
    return x.view_as(image)


def _spread(image: Tensor, inside: Tensor) -> tuple[Tensor, ...]:
    """Return mean, standard deviation, lowest and highest value inside, ``(B, C, 1, ...)`` each."""
    axes = tuple(range(2, image.ndim))
    count = inside.sum(axes, keepdim=True).clamp(min=1)
    mean = (image * inside).sum(axes, keepdim=True) / count
    deviation = (((image - mean) * inside).square().sum(axes, keepdim=True) / count).sqrt()
    low = image.masked_fill(~inside, torch.inf).amin(axes, keepdim=True)
    high = image.masked_fill(~inside, -torch.inf).amax(axes, keepdim=True)
    nothing = low > high
    return mean, deviation, low.masked_fill(nothing, 0), high.masked_fill(nothing, 1)


def change_intensities(image: Tensor, generator: KeyedGenerator, config: ViewConfig) -> Tensor:
    """Change brightness, contrast, gamma, saturation, blur and noise of a batch ``(B, C, *space)``."""
    batch, channels = image.shape[:2]
    inside = image != 0 if config.background else torch.ones_like(image, dtype=torch.bool)
    ones = (1,) * (image.ndim - 2)

    def draw(separate: bool = False) -> Tensor:
        return generator.rand((batch, channels if separate else 1)).view(batch, -1, *ones)

    def chance(probability: float, separate: bool = False) -> Tensor:
        return draw(separate) < probability

    mean, deviation, low, high = _spread(image, inside)
    chosen, gain = chance(config.intensity, config.separate), _blend(draw(config.separate), 0.6, 1.4)
    shift = _blend(draw(config.separate), -0.4, 0.4) * deviation
    chosen_gamma, power = chance(config.gamma, config.separate), _blend(draw(config.separate), 0.7, 1.5)
    width = (high - low).clamp(min=1e-6)
    curved = ((image - low) / width).clamp(0, 1) ** power * width + low
    image = torch.where(chosen_gamma, curved, image)
    image = torch.where(chosen, (image - mean) * gain + mean + shift, image)
    vivid, saturation = chance(0.5), 1 + config.saturation * _blend(draw(), -1, 1)
    if config.saturation:
        grey = image.mean(1, keepdim=True)
        image = torch.where(vivid, grey + (image - grey) * saturation, image)
    sigma = _blend(draw(), 0.1, 2.0) * max(image.shape[2:]) / _SIDE * chance(config.blur)
    image = _blurred(image, sigma.flatten())
    noisy = chance(config.noise)
    if config.noise:
        normal = torch.erfinv(2 * (generator.rand(tuple(image.shape)) + 2.0**-25) - 1) * math.sqrt(2)
        image = torch.where(noisy, image + 0.05 * deviation * normal, image)
    return image * inside if config.background else image


def _kept_modalities(generator: KeyedGenerator, acquired: Tensor, probability: float) -> Tensor:
    """Return which acquired modalities ``(B, C)`` stay: each but one, chosen at random, may be dropped."""
    draws = generator.rand(tuple(acquired.shape)).masked_fill(~acquired, -1)
    stays = F.one_hot(draws.argmax(1), acquired.shape[1]).bool()
    return acquired & ((draws >= probability) | stays)


@torch.no_grad()
def two_views(image: Tensor, keys: Tensor, config: ViewConfig, modality_mask: Tensor | None = None) -> list[View]:
    """Make two views of every sample.

    Args:
        image: ``(B, C, *space)``, two or three axes.
        keys: int64 ``(B,)``, of (seed, epoch, subject, draw).
        config: How views differ.
        modality_mask: bool ``(B, C)``, True = acquired; None: all are.

    Returns:
        The views u and v, float32 (float64 stays).
    """
    batch, channels, *space = image.shape
    dims = len(space)
    generators = [KeyedGenerator(keys, f"view {name}") for name in "uv"]
    acquired = torch.ones((batch, channels), dtype=torch.bool, device=image.device)
    if modality_mask is not None:
        acquired = modality_mask.bool()
    views = []
    for (begin, length), generator in zip(config.boxes(generators[0], generators[1], dims), generators, strict=True):
        mirrored = generator.rand((batch, dims)) < 0.5
        allowed = torch.tensor([axis in config.mirror for axis in range(dims)], device=image.device)
        flip = torch.where(mirrored & allowed, -1.0, 1.0)
        angles = _blend(generator.rand((batch, dims * (dims - 1) // 2)), -1, 1) * math.radians(config.degrees)
        kept = _kept_modalities(generator, acquired, config.drop)
        view = resample(image, begin, length, _turns(angles, dims), flip, zeros=config.background)
        view = change_intensities(view, generator, config)
        views.append(View(view * kept.view(batch, channels, *(1 for _ in space)), kept))
    return views
