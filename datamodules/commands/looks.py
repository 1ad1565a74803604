"""What ``medmim init`` sees in a few cases of an archive of volumes that it reads whole."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from common.modalities import canonical_name
from datamodules.commands.proposals import Proposal
from datamodules.examination import spread
from datamodules.registry import FileRef, Record
from datamodules.volumes.headers import VolumeError
from datamodules.volumes.modalities import respelled
from datamodules.volumes.prepare import MAX_NEGATIVE, read_image
from datamodules.volumes.reading import read_volume
from datamodules.volumes.voxels import STRICT, VoxelConfig, background_of, negative_share

#: Values of a label, at most, that are written down.
_MAX_VALUES = 12


class _Seen(NamedTuple):
    """One volume: its case's place, voxel size in mm, shape, affine, and the share of its foreground below 0."""

    case: int
    spacing: tuple[float, ...]
    shape: tuple[int, ...]
    affine: Any
    negative: float


@dataclass
class Look:
    """What was seen.

    Attributes:
        cases: Cases that were read.
        volumes: The volumes of each canonical modality, in the order in which they came.
        faults: Files by kind of fault.
        details: The first fault of each kind, in words.
        values: Values of each mask.
    """

    cases: int = 0
    volumes: dict[str, list[_Seen]] = field(default_factory=dict)
    faults: Counter[str] = field(default_factory=Counter)
    details: dict[str, str] = field(default_factory=dict)
    values: dict[str, set[int]] = field(default_factory=dict)

    def note(self, error: VolumeError) -> None:
        """Count a fault."""
        self.faults[error.kind] += 1
        self.details.setdefault(error.kind, error.detail)

    def one_grid(self) -> bool:
        """Whether the volumes of each case share a grid."""
        every = [seen for found in self.volumes.values() for seen in found]
        first = {seen.case: seen for seen in reversed(every)}
        return all(
            seen.shape == first[seen.case].shape and np.allclose(seen.affine, first[seen.case].affine, atol=1e-2)
            for seen in every
        )

    def reference(self) -> str:
        """Return the modality in most cases, and of those the one with the finest slices."""
        depths = {name: min(max(seen.spacing) for seen in found) for name, found in self.volumes.items()}
        return min(depths, key=lambda name: (-len(self.volumes[name]), round(depths[name], 2)))


def look_at(records: Sequence[Record], spelled: Mapping[str, str]) -> Look:
    """Read up to eight cases whole, from all over an archive: the modalities that are spelled out, and masks."""
    found = Look()
    for record in respelled(spread([record for record in records if record.volumes]), spelled, strict=False):
        for name, ref in record.volumes.items():
            if name in spelled and (volume := _look_at_one(ref, found)):
                found.volumes.setdefault(canonical_name(name), []).append(volume)
        for name, ref in record.masks.items():
            _look_at_mask(name, ref, found)
        found.cases += 1
    return found


def _look_at_one(ref: FileRef, found: Look) -> _Seen | None:
    try:
        # A DICOM series becomes a file of the cache when it is first read.
        path = ref.path if ref.series is None else ref.series.convert()
        volume = read_image(path, STRICT, ref.volume)
    except VolumeError as error:
        found.note(error)
        if error.kind != "nan":
            return None
        try:
            volume = read_image(path, VoxelConfig(nan="zero"), ref.volume)
        except VolumeError:
            return None
    sides = tuple(np.linalg.norm(volume.affine[:3, :3], axis=0).tolist())
    share = negative_share(volume.data, background_of(volume.data))
    return _Seen(found.cases, sides, volume.data.shape, volume.affine, share)


def _look_at_mask(name: str, ref: FileRef, found: Look) -> None:
    try:
        values = np.unique(np.rint(read_volume(ref.path, STRICT, ref.volume).data))
    except VolumeError as error:
        found.note(error)
        return
    if len(values) <= _MAX_VALUES and (values >= 0).all():
        found.values.setdefault(name, set()).update(int(value) for value in values if value)


#: What a person may set, by a word of the fault: the key it stands above, and the line.
_REMEDIES = (
    ("not finite", "voxels", "voxels: {nan: zero}  # voxels that are not a number lie within the body"),
    ("voxels.header", "voxels", "voxels: {header: sform}  # or qform: the headers contradict themselves"),
    ("complex", "voxels", "voxels: {complex: magnitude}"),
    ("volumes of shape", "modalities", 'a 4-D file gives its volumes by their places: modalities: {t1: "NAME[0]"}'),
)


def _rules(look: Look) -> tuple[dict[str, str], list[str], str]:
    """Return the intensity rules that differ from the usual one, middle voxel sizes, and why, in words."""
    rules, sizes, why = {}, [], ""
    for name, found in look.volumes.items():
        sides, share = np.median([seen.spacing for seen in found], axis=0), np.median([seen.negative for seen in found])
        sizes.append(f"{name} {' x '.join(f'{side:.2g}' for side in sides)}")
        if name == "ct":
            rules[name] = "ct"
        elif share > MAX_NEGATIVE:
            rules[name] = "standardised"
            why += f"; {share:.0%} of {name}'s foreground is negative, so standardised"
    return rules, sizes, why


def propose_voxels(look: Look, proposal: Proposal) -> str:
    """Propose grid and intensities from what was seen; return it in words."""
    rules, sizes, why = _rules(look)
    shown = f"{', '.join(sizes)} mm" if sizes else "none of which can be used"
    words = f"{look.cases} cases read{':' if sizes else ','} {shown}"
    if not look.one_grid():
        reference = look.reference()
        proposal.said["grid"] = {"reference": reference}
        words += f": not one grid, so grid.reference: {reference}"
        proposal.remarks["grid"] = "the others are resampled to its grid: they must lie in one space"
    voxels: dict[str, Any] = {"intensity": rules} if rules else {}
    if "outside the body" in look.details.get("nan", ""):
        voxels["nan"] = "zero"
    if voxels:
        proposal.said["voxels"] = voxels
    for kind, count in sorted(look.faults.items()):
        why += f"; {kind} in {count} files"
        for word, key, line in _REMEDIES:
            if word in look.details[kind] and not (kind == "nan" and "nan" in voxels):
                proposal.aside(key, line)
    return words + why
