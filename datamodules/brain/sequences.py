"""Canonical names of brain MRI sequences, whatever an archive calls them, and whose study a name says it is."""

import re
from pathlib import Path

#: The order is that of the templates in released checkpoints.
CANONICAL = ("flair", "t1", "t1c", "t2", "mra", "pd", "dwi", "adc")

_ALIASES = {
    "t1n": "t1",
    "t1ce": "t1c",
    "t1gd": "t1c",
    "t2w": "t2",
    "t2f": "flair",
    "fla": "flair",
} | {name: name for name in CANONICAL}

#: Endings that say how a file was made, not what it shows.
_ENDINGS = ("_bias", "_unstripped")
_SUFFIXES = (".nii.gz", ".nii")

_PATIENT = re.compile(
    r"(BraTS-[A-Z]+-\d+(?=-\d{3}$)|UCSF-PDGM-\d+(?=(_FU\d+d)?(_nifti)?$)|UPENN-GBM-\d+(?=_\d+$)"
    r"|IXI\d+(?=-(Guys|HH|IOP)-\d+$)|sub-strokecase\d+(?=_ses-\d+$))",
    re.IGNORECASE,
)


def canonical_name(name: str) -> str | None:
    """Return the canonical name of a sequence in any case, or None where it is none of ours."""
    return _ALIASES.get(name.lower())


def is_volume(path: Path) -> bool:
    """Whether a file is a NIfTI volume, and none of the shadow files (``._*``) that macOS leaves behind."""
    return path.name.endswith(_SUFFIXES) and not path.name.startswith(".") and path.is_file()


def split_name(path: Path) -> tuple[str, str]:
    """Return the study and the sequence that a file's name says: ``case-12_T1ce.nii.gz`` is case-12 and T1ce.

    The sequence is what follows the last ``-`` or ``_``; a name without either is a sequence alone.
    """
    stem = path.name
    for suffix in _SUFFIXES:
        stem = stem.removesuffix(suffix)
    for ending in _ENDINGS:
        stem = stem.removesuffix(ending)
    cut = max(stem.rfind("-"), stem.rfind("_"))
    return stem[: max(cut, 0)], stem[cut + 1 :]


def patient_of(study: str) -> str:
    """Return the patient that a study's name says, without its visit; the study where the name is none we know."""
    match = _PATIENT.match(study)
    return match.group(1) if match else study
