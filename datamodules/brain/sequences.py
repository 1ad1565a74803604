"""Study and sequence from the file names of brain archives."""

from pathlib import Path

from datamodules.members import REFUSED, VOLUMES, suffix_of

SUFFIXES = (*VOLUMES, *REFUSED)
#: Suffixes that describe how a file was made, not what it shows.
_ENDINGS = ("_bias", "_unstripped")


def split_name(path: Path) -> tuple[str, str]:
    """Split a file name into study and sequence: ``case-12_T1ce.nii.gz`` is case-12 and T1ce.

    The sequence follows the last ``-`` or ``_``; a name without either is only a sequence.
    """
    stem = path.name[: len(path.name) - len(suffix_of(path))]
    for ending in _ENDINGS:
        stem = stem.removesuffix(ending)
    cut = max(stem.rfind("-"), stem.rfind("_"))
    return stem[: max(cut, 0)], stem[cut + 1 :]
