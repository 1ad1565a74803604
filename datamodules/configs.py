"""Settings that data modules share, in groups: each is one constructor argument and one section of a configuration.

Settings that depend on the machine or come first, such as ``root``, ``batch_size`` and ``num_workers``, remain
separate arguments.
"""

from dataclasses import dataclass
from typing import Literal

#: One value for all channels, or one per channel.
Channelwise = float | tuple[float, float, float]


def three_values(value: Channelwise) -> tuple[float, float, float]:
    """Return one value for each of three channels."""
    red, green, blue = (value,) * 3 if isinstance(value, int | float) else value
    return red, green, blue


@dataclass(frozen=True)
class ImageConfig:
    """Images as input to a network.

    Args:
        size: Height and width.
        mean: Subtracted from pixels in [0, 1]: one value for all channels, or one per channel.
        std: Divisor after that.
    """

    size: tuple[int, int] = (224, 224)
    mean: Channelwise = 0.4978
    std: Channelwise = 0.2449


def check_crop_scale(scale: tuple[float, float] | None) -> None:
    """Check the range of a crop's share of the image area.

    Raises:
        ValueError: the shares do not increase, or lie outside (0, 1].
    """
    if scale is not None and not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"`crop_scale` must be two increasing shares in (0, 1], got {list(scale)}.")


@dataclass(frozen=True)
class CacheConfig:
    """The cache of images.

    Args:
        format: ``"npy"``, or ``"none"`` to decode the sources at every access.
        side: Shorter side of the copies, in pixels.
    """

    format: Literal["npy", "none"] = "npy"
    side: int = 256


@dataclass(frozen=True)
class SplitConfig:
    """Which patients train, validate and test.

    Args:
        fractions: Shares of patients for train, val and test, if neither a file nor the archive defines the split.
        file: Table with ``split`` and ``case_id`` or ``patient_id``, such as ``medmim split`` writes, or that with
            rules for joining names; see :class:`datamodules.splits.SplitFile`.
        seed: Seed of the split only, so that runs of several seeds share their test patients.
    """

    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    file: str | dict[str, str] | None = None
    seed: int = 0


@dataclass(frozen=True)
class LoaderConfig:
    """How samples are drawn, and how many may be faulty.

    Args:
        draws: Draws per case in an epoch of training.
        max_fault_fraction: Share of faulty samples at which training stops (never fewer than 5 samples).
    """

    draws: int = 1
    max_fault_fraction: float = 0.01
