"""What the file names of brain archives say: the study, whose it is, and the sequence."""

import re
from pathlib import Path

from datamodules.members import REFUSED, VOLUMES, is_member, suffix_of

SUFFIXES = (*VOLUMES, *REFUSED)
#: Endings that say how a file was made, not what it shows.
_ENDINGS = ("_bias", "_unstripped")

_PATIENT = re.compile(
    r"(BraTS-[A-Z]+-\d+(?=-\d{3}$)|UCSF-PDGM-\d+(?=(_FU\d+d)?(_nifti)?$)|UPENN-GBM-\d+(?=_\d+$)"
    r"|IXI\d+(?=-(Guys|HH|IOP)-\d+$)|sub-strokecase\d+(?=_ses-\d+$))",
    re.IGNORECASE,
)


def is_volume(path: Path) -> bool:
    """Whether a file is a volume by its name, and none of the shadow files (``._*``) that macOS leaves behind."""
    return is_member(path.name, SUFFIXES, path.parent)


def split_name(path: Path) -> tuple[str, str]:
    """Return the study and the sequence that a file's name says: ``case-12_T1ce.nii.gz`` is case-12 and T1ce.

    The sequence is what follows the last ``-`` or ``_``; a name without either is a sequence alone.
    """
    stem = path.name[: len(path.name) - len(suffix_of(path))]
    for ending in _ENDINGS:
        stem = stem.removesuffix(ending)
    cut = max(stem.rfind("-"), stem.rfind("_"))
    return stem[: max(cut, 0)], stem[cut + 1 :]


def patient_of(study: str) -> str:
    """Return the patient that a study's name says, without its visit; the study where the name is none we know."""
    match = _PATIENT.match(study)
    return match.group(1) if match else study
