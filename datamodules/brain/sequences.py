"""Canonical names of brain MRI sequences, whatever an archive calls them."""

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


def canonical_name(name: str) -> str | None:
    """Return the canonical name of a sequence in any case, or None where it is none of ours."""
    name = name.lower()
    for ending in _ENDINGS:
        name = name.removesuffix(ending)
    return _ALIASES.get(name)


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
