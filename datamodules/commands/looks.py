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
    """One volume."""

    spacing: tuple[float, ...]
    shape: tuple[int, ...]
    affine: Any
    negative: float


@dataclass
class Look:
    """What was seen.

    Attributes:
        cases: Cases that were read.
        volumes: The volumes of each case by canonical modality.
        faults: Files by kind of fault.
        details: The first fault of each kind, in words.
        values: Values of each mask.
    """

    cases: int = 0
    volumes: list[dict[str, _Seen]] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    details: dict[str, str] = field(default_factory=dict)
    values: dict[str, set[int]] = field(default_factory=dict)

    def note(self, error: VolumeError) -> None:
        """Count a fault."""
        self.faults[error.kind] += 1
        self.details.setdefault(error.kind, error.detail)

    @property
    def modalities(self) -> list[str]:
        """The modalities that were seen, in the order in which they came."""
        return list(dict.fromkeys(name for case in self.volumes for name in case))

    def spacing(self, name: str) -> str:
        """Return the middle voxel size of a modality, in words."""
        sides = np.median([case[name].spacing for case in self.volumes if name in case], axis=0)
        return " x ".join(f"{side:.2g}" for side in sides)

    def negative(self, name: str) -> float:
        """Return the middle share of a modality's foreground that is below 0."""
        return float(np.median([case[name].negative for case in self.volumes if name in case]))

    def one_grid(self) -> bool:
        """Whether the volumes of each case share a grid."""
        return all(
            seen.shape == first.shape and np.allclose(seen.affine, first.affine, atol=1e-2)
            for case in self.volumes
            for first in list(case.values())[:1]
            for seen in case.values()
        )

    def reference(self) -> str:
        """Return the modality in most cases, and of those the one with the finest slices."""
        counts = Counter(name for case in self.volumes for name in case)
        depths = {name: min(max(case[name].spacing) for case in self.volumes if name in case) for name in counts}
        return min(counts, key=lambda name: (-counts[name], round(depths[name], 2), self.modalities.index(name)))


def look_at(records: Sequence[Record], spelled: Mapping[str, str]) -> Look:
    """Read up to eight cases whole, from all over an archive.

    Args:
        records: Its records.
        spelled: What the archive calls each modality that is used.
    """
    found = Look()
    for record in respelled(spread([record for record in records if record.volumes]), spelled, strict=False):
        found.cases += 1
        seen = {}
        for name, ref in record.volumes.items():
            if name in spelled and (volume := _look_at_one(ref, found)):
                seen[canonical_name(name)] = volume
        found.volumes.append(seen)
        for name, ref in record.masks.items():
            _look_at_mask(name, ref, found)
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
    return _Seen(sides, volume.data.shape, volume.affine, share)


def _look_at_mask(name: str, ref: FileRef, found: Look) -> None:
    try:
        values = np.unique(np.rint(read_volume(ref.path, STRICT, ref.volume).data))
    except VolumeError as error:
        found.note(error)
        return
    if len(values) <= _MAX_VALUES and (values >= 0).all():
        found.values.setdefault(name, set()).update(int(value) for value in values if value)


def _rules(look: Look) -> tuple[dict[str, str], str]:
    """Return the intensity rules that differ from the usual one, and why, in words."""
    rules, words = {}, ""
    for name in look.modalities:
        share = look.negative(name)
        if name == "ct":
            rules[name] = "ct"
        elif share > MAX_NEGATIVE:
            rules[name] = "standardised"
            words += f"; {share:.0%} of {name}'s foreground is negative, so standardised"
    return rules, words


#: What a person may set, by a word of the fault: the key it stands above, and the line.
_REMEDIES = (
    ("not finite", "voxels", "voxels: {nan: zero}  # voxels that are not a number lie within the body"),
    ("voxels.header", "voxels", "voxels: {header: sform}  # or qform: the headers contradict themselves"),
    ("complex", "voxels", "voxels: {complex: magnitude}"),
    ("volumes of shape", "modalities", 'a 4-D file gives its volumes by their places: modalities: {t1: "NAME[0]"}'),
)


def propose_voxels(look: Look, proposal: Proposal) -> str:
    """Propose grid and intensities from what was seen; return it in words."""
    words = ", ".join(f"{name} {look.spacing(name)}" for name in look.modalities)
    words = f"{look.cases} cases read: {words} mm" if words else f"{look.cases} cases read, none of which can be used"
    if look.volumes and not look.one_grid():
        reference = look.reference()
        proposal.said["grid"] = {"reference": reference}
        words += f": not one grid, so grid.reference: {reference}"
        proposal.remarks["grid"] = "the others are resampled to its grid: they must lie in one space"
    rules, why = _rules(look)
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
