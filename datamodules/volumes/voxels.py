"""How unusual voxels and headers are handled, and which voxels are background."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class VoxelConfig:
    """How to handle volumes that would otherwise count as faulty.

    Attributes:
        nan: ``zero`` sets NaN voxels to 0, for volumes with NaN outside the body.
        complex: ``magnitude`` takes the absolute value of complex voxels.
        header: Which affine to use if a NIfTI file's two contradict each other or neither has a code.
        intensity: Intensity rule by modality, overriding the layout's; see :mod:`datamodules.volumes.intensity`.
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

#: Refuses everything unusual.
STRICT = VoxelConfig()


def background_of(data: NDArray[Any]) -> float | None:
    """Return the value that fills at least half of a volume's six faces; None if there is none."""
    faces = np.concatenate([data[side].ravel() for side in FACES])
    middle = len(faces) // 2
    candidates = np.partition(faces, [max(middle - 1, 0), middle])[[max(middle - 1, 0), middle]]
    common = max(candidates, key=lambda value: int((faces == value).sum()))
    return float(common) if 2 * int((faces == common).sum()) >= len(faces) else None


def negative_share(data: NDArray[Any], background: float | None) -> float:
    """Return the share of foreground voxels below 0."""
    negative = data < 0
    if background is None:
        return float(negative.mean())
    rest = data != background
    return float((negative & rest).sum() / max(int(rest.sum()), 1))
