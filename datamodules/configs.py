"""The settings that data modules share, grouped: each is one argument of a constructor, one section of a configuration.

What depends on the machine or is asked for first, such as ``root``, ``batch_size`` and ``num_workers``, stays an
argument of its own.
"""

from dataclasses import dataclass
from typing import Literal

from datamodules.checking import CacheCheck

#: One value for every channel, or one each.
Channelwise = float | tuple[float, float, float]


def three_values(value: Channelwise) -> tuple[float, float, float]:
    """Return one value for each of three channels."""
    red, green, blue = (value,) * 3 if isinstance(value, int | float) else value
    return red, green, blue


@dataclass(frozen=True)
class ImageConfig:
    """Images as a network takes them.

    Args:
        size: Height and width.
        mean: Subtracted from pixels in [0, 1]: one value for every channel, or one each.
        std: What they are divided by then.
    """

    size: tuple[int, int] = (224, 224)
    mean: Channelwise = 0.4978
    std: Channelwise = 0.2449


def check_crop_scale(scale: tuple[float, float] | None) -> None:
    """Refuse shares of an image's area that no crop can have.

    Raises:
        ValueError: they do not rise, or lie outside (0, 1].
    """
    if scale is not None and not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"`crop_scale` must be two rising shares in (0, 1], got {list(scale)}.")


@dataclass(frozen=True)
class CacheConfig:
    """Copies of images that are kept to be read quickly.

    Args:
        format: ``"npy"``, or ``"none"`` to decode the sources at every access.
        side: Shorter side of the copies, in pixels.
        check: How much of the copies is read before training; see :mod:`datamodules.checking`.
    """

    format: Literal["npy", "none"] = "npy"
    side: int = 256
    check: CacheCheck = "sampled"


@dataclass(frozen=True)
class SplitConfig:
    """Who is trained, validated and tested on.

    Args:
        fractions: Shares of patients for train, val and test where neither file nor archive says.
        file: Table with ``split`` and ``case_id`` or ``patient_id``, such as ``medmim split`` writes, or that and how
            its names join; see :class:`datamodules.splits.SplitFile`.
        seed: Seed of the split alone, so that runs of several seeds share their test patients.
    """

    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    file: str | dict[str, str] | None = None
    seed: int = 0


@dataclass(frozen=True)
class LoaderConfig:
    """How samples are drawn, and how many may be broken.

    Args:
        draws: Times that a case is drawn in an epoch of training.
        max_fault_fraction: Share of faulty samples at which training stops (never fewer than 5 samples).
        sanity_samples: Validation samples that are read before the first step, at most; larger sets are read whole
            from the first epoch on.
    """

    draws: int = 1
    max_fault_fraction: float = 0.01
    sanity_samples: int = 64
