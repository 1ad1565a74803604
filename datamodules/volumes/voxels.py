"""How odd voxels and headers are taken, and what of a volume is background."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class VoxelConfig:
    """What is done about volumes that are a fault as they are.

    Attributes:
        nan: ``zero`` sets voxels that are not a number to 0, as where NaN lies outside the body.
        complex: ``magnitude`` takes the absolute value of complex voxels.
        header: Which of two affines counts where a NIfTI file contradicts itself, or says of neither what it means.
        intensity: Intensity rule by modality, over the layout's; see :mod:`datamodules.volumes.intensity`.
    """

    nan: Literal["refuse", "zero"] = "refuse"
    complex: Literal["refuse", "magnitude"] = "refuse"
    header: Literal["refuse", "sform", "qform"] = "refuse"
    intensity: Mapping[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the settings of how files are read as plain values, for cache keys and cards."""
        return {name: value for name, value in asdict(self).items() if name != "intensity"}


#: Indices of a volume's six faces.
FACES = [(slice(None),) * axis + (edge,) for axis in range(3) for edge in (0, -1)]

#: Nothing odd is taken.
STRICT = VoxelConfig()


def background_of(data: NDArray[Any]) -> float | None:
    """Return the value that fills at least half of a volume's six faces; None where there is no such value."""
    faces = np.concatenate([data[side].ravel() for side in FACES])
    middle = len(faces) // 2
    candidates = np.partition(faces, [max(middle - 1, 0), middle])[[max(middle - 1, 0), middle]]
    common = max(candidates, key=lambda value: int((faces == value).sum()))
    return float(common) if 2 * int((faces == common).sum()) >= len(faces) else None


def negative_share(data: NDArray[Any], background: float | None) -> float:
    """Return the share of the voxels beside the background that are below 0."""
    negative = data < 0
    if background is None:
        return float(negative.mean())
    rest = data != background
    return float((negative & rest).sum() / max(int(rest.sum()), 1))
