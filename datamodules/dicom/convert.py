"""From a stack of DICOM slices to one NIfTI volume, by dcm2niix, kept in the cache.

dcm2niix is the only converter that handled two echoes, mosaics and uneven slices correctly on our samples. We check
what it writes, not its exit code, which is 0 even with warnings. Its sidecars name hospital, station and serial number
even when asked to be anonymous, so only parameters of the sequence are kept.
"""

import json
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from common.errors import UserError
from common.files import make_folder, move, remove_tree, storage_errors
from datamodules.dicom.index import Stack
from datamodules.notes import note
from datamodules.storage import cache_root
from datamodules.volumes.headers import VolumeError
from datamodules.volumes.reading import Header, read_header, turned

#: Time limit for one series, in seconds.
TIMEOUT = 600

_OPTIONS = ("-g", "i", "-ba", "y", "-b", "y", "-p", "n", "-z", "n", "-w", "0", "-f", "s%s_e%e")

#: The fields of a sidecar that are kept.
SIDECAR = (
    "EchoTime", "RepetitionTime", "InversionTime", "FlipAngle", "MagneticFieldStrength", "MRAcquisitionType",
    "ScanningSequence", "SequenceVariant", "SliceThickness", "SpacingBetweenSlices", "EchoTrainLength",
)  # fmt: skip

#: Slice distances that differ by more than this share of their median are uneven.
_UNEVEN = 0.05

#: Free text in a NIfTI-1 header: db_name, descrip (it holds the time of the scan), aux_file, intent_name.
_FREE_TEXT = ((14, 18), (148, 80), (228, 24), (328, 16))


def check_geometry(stack: Stack, uneven: str = "refuse") -> None:
    """Check the slices' places before anything is converted.

    Args:
        stack: The slices.
        uneven: ``"interpolate"`` allows slices at uneven distances; ``"refuse"`` does not.

    Raises:
        VolumeError: colour, several slices at one place, or uneven distances.
    """
    if stack.first.samples != 1:
        raise VolumeError("dtype", f"{stack.first.samples} samples per pixel: a colour picture, not a measurement")
    if stack.repeats > 1:
        raise VolumeError("shape", f"up to {stack.repeats} slices lie at one place: a series over time or direction")
    if uneven != "interpolate" and is_uneven(stack):
        low, high = stack.slice_distances().min(), stack.slice_distances().max()
        raise VolumeError("geometry", f"slice distances vary from {low:.2f} to {high:.2f} mm, a slice may be missing; "
                                      "uneven: interpolate resamples them")  # fmt: skip


def is_uneven(stack: Stack) -> bool:
    """Whether the distances between neighbouring slices differ."""
    distances = sorted(stack.slice_distances())
    return len(distances) > 1 and distances[-1] - distances[0] > _UNEVEN * distances[len(distances) // 2]


def converter() -> tuple[str, str]:
    """Return the program and its version.

    Raises:
        UserError: it is not installed.
    """
    try:
        import dcm2niix
    except ImportError as error:
        raise UserError("DICOM volumes need dcm2niix: pip install medmim[dicom].") from error
    return dcm2niix.bin, dcm2niix.__version__


def conversion_key(stack: Stack, uneven: str) -> str:
    """Return the name of the folder that holds a stack's conversion: its instances, the converter, the options.

    Size and time of change belong to it: copies that were defaced or corrected often keep their identifiers.
    """
    instances = sorted(f"{instance.sop_uid} {instance.stamp}" for instance in stack.instances)
    return _digest([*instances, converter()[1], *_OPTIONS, uneven])


def _digest(parts: Sequence[str]) -> str:
    return xxhash.xxh3_128_hexdigest("\x1f".join(parts).encode())


def convert(stack: Stack, folder: Path, uneven: str = "refuse") -> Path:
    """Return the NIfTI volume of a stack, converted on first use and kept in a folder.

    Returns:
        ``volume.nii``; ``volume.json`` beside it has the parameters of the sequence and what was corrected.

    Raises:
        VolumeError: the slices do not form a volume, or the converter wrote none.
        UserError: dcm2niix is not installed.
        StorageError: the folder cannot be written.
    """
    check_geometry(stack, uneven)
    target = folder / conversion_key(stack, uneven)
    if _is_whole(target):
        return target / "volume.nii"
    make_folder(folder)
    if target.exists():  # it was cut short or changed since
        remove_tree(target, folder)
    with storage_errors(target), tempfile.TemporaryDirectory(dir=folder, prefix=".converting-") as name:
        work = Path(name)
        for part in ("in", "out", "done"):
            (work / part).mkdir()
        for number, instance in enumerate(stack.instances):
            (work / "in" / f"{number:06}.dcm").symlink_to(Path(instance.path).resolve())
        said = _run(work)
        image, facts = _chosen(sorted((work / "out").glob("*.nii")), said, uneven)
        if is_uneven(stack) and not facts["slices_interpolated"]:
            raise VolumeError("geometry", "dcm2niix evens out no slices of this pixel type: leave the series out")
        _clear_text(image)
        _clean_sidecar(work / "out", work / "done" / "volume.json", facts | {"bytes": image.stat().st_size})
        move(image, work / "done" / "volume.nii", work)
        try:
            move(work / "done", target, folder)
        except OSError:
            # Another process was faster; its conversion is identical.
            if not _is_whole(target):
                raise
    return target / "volume.nii"


def _is_whole(folder: Path) -> bool:
    """Whether a conversion is there, as long as it was written."""
    try:
        return conversion_facts(folder / "volume.nii")["bytes"] == (folder / "volume.nii").stat().st_size
    except (OSError, ValueError, KeyError):
        return False


@dataclass(frozen=True)
class ConvertedSeries:
    """A stack of slices as a member of a case: :class:`datamodules.registry.Series`.

    Attributes:
        stack: The slices.
        uneven: See :func:`check_geometry`.
        fault: Kind and detail of what is wrong with it, known from the headers of its study; None = nothing.
    """

    stack: Stack
    uneven: str = "refuse"
    fault: tuple[str, str] | None = None

    @property
    def digest(self) -> str:
        """Hash of the instances' identifiers."""
        return _digest(sorted(instance.sop_uid for instance in self.stack.instances))

    @property
    def key(self) -> str:
        """Hash of the instances, the converter, its options, and what is known to be wrong."""
        return _digest([conversion_key(self.stack, self.uneven), *(self.fault or ())])

    def files(self) -> list[Path]:
        """Return the slices in the order of their places."""
        return [Path(instance.path) for instance in self.stack.instances]

    def convert(self) -> Path:
        """Return the volume, converted on first use.

        Raises:
            VolumeError: as :func:`convert`, or the headers said so before.
            UserError: dcm2niix is not installed.
        """
        self._check()
        path = convert(self.stack, cache_root() / "dicom" / "volumes", self.uneven)
        facts = conversion_facts(path)
        for name, words in (("tilt_corrected", "the tilt of a CT's gantry was corrected"),
                            ("slices_interpolated", "slices at uneven distances were interpolated")):  # fmt: skip
            if facts[name]:
                note(words, self.stack.first.path)
        return path

    def header(self) -> Header:
        """Return shape and affine, from the slices' headers where these have them, else by conversion.

        Raises:
            VolumeError: as :func:`convert`.
        """
        self._check()
        first, places = self.stack.first, self.stack.places()
        if len(places) < 2 or len(first.size) < 2 or len(first.spacing) < 2 or is_uneven(self.stack):
            return read_header(self.convert())
        row, column = np.array(first.orientation[:3]), np.array(first.orientation[3:])
        affine = np.eye(4)
        edges = row * first.spacing[1], column * first.spacing[0]
        affine[:3, :3] = np.stack([*edges, np.cross(row, column) * np.median(np.diff(places))], axis=1)
        affine[:3, 3] = first.position
        return turned((first.size[1], first.size[0], len(places)), np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine)

    def _check(self) -> None:
        if self.fault is not None:
            raise VolumeError(*self.fault)
        check_geometry(self.stack, self.uneven)


def _run(work: Path) -> str:
    command = [converter()[0], *_OPTIONS, "-o", str(work / "out"), str(work / "in")]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired as error:
        raise VolumeError("unreadable", f"dcm2niix did not finish within {TIMEOUT} s") from error
    return done.stdout + done.stderr


def _chosen(images: Sequence[Path], said: str, uneven: str) -> tuple[Path, dict[str, Any]]:
    """Choose among the converter's volumes: corrected for tilt; resampled to even distances only on request."""
    real = [p for p in images if not p.stem.endswith(("_ph", "_real", "_imaginary", "_imaginarya", "_reala"))]
    tilted = [p for p in real if "_Tilt" in p.stem]
    evened = [p for p in real if "_Eq" in p.stem]
    raw = [p for p in real if p not in tilted and p not in evened]
    if len(raw) > 1:
        raise VolumeError("shape", f"the series holds {len(raw)} volumes: {', '.join(p.stem for p in raw[:4])}")
    if not raw:
        warning = next((line for line in said.splitlines() if line.startswith(("Error", "Warning"))), "it wrote none")
        raise VolumeError("unreadable", f"dcm2niix made no volume of it ({warning.strip()[:160]})")
    if evened and uneven != "interpolate":
        raise VolumeError(
            "geometry", "slice distances vary, a slice may be missing; uneven: interpolate resamples them"
        )
    corrected = evened or tilted or raw
    return corrected[0], {"tilt_corrected": bool(tilted), "slices_interpolated": bool(evened)}


def _clean_sidecar(out: Path, target: Path, facts: dict[str, Any]) -> None:
    sidecar = next(iter(sorted(out.glob("*.json"))), None)
    content = json.loads(sidecar.read_text(errors="replace")) if sidecar is not None else {}
    target.write_text(json.dumps({name: content[name] for name in SIDECAR if name in content} | facts, indent=1))


def _clear_text(image: Path) -> None:
    """Blank the free text of a NIfTI-1 header."""
    with image.open("r+b") as file:
        for start, length in _FREE_TEXT:
            file.seek(start)
            file.write(bytes(length))


def conversion_facts(volume: Path) -> dict[str, Any]:
    """Return what is kept beside a converted volume."""
    return json.loads(volume.with_name("volume.json").read_text())
