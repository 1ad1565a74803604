"""What the file names of brain archives say: the study and the sequence."""

from pathlib import Path

from datamodules.members import REFUSED, VOLUMES, suffix_of

SUFFIXES = (*VOLUMES, *REFUSED)
#: Endings that say how a file was made, not what it shows.
_ENDINGS = ("_bias", "_unstripped")


def split_name(path: Path) -> tuple[str, str]:
    """Return the study and the sequence that a file's name says: ``case-12_T1ce.nii.gz`` is case-12 and T1ce.

    The sequence is what follows the last ``-`` or ``_``; a name without either is a sequence alone.
    """
    stem = path.name[: len(path.name) - len(suffix_of(path))]
    for ending in _ENDINGS:
        stem = stem.removesuffix(ending)
    cut = max(stem.rfind("-"), stem.rfind("_"))
    return stem[: max(cut, 0)], stem[cut + 1 :]
