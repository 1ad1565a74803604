"""Canonical names of the modalities of volumes, whatever an archive or a checkpoint calls them.

Figures and logs show the archive's names; channels of encoders, templates and settings are matched by canonical names.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

#: The default order of channels.
CANONICAL = (
    "flair", "t1", "t1c", "t2", "mra", "pd", "dwi", "adc", "t2star", "swi", "hbv", "unit1", "t1ir", "ct", "pet", "mri",
    "1h", "xe",
)  # fmt: skip
#: The sequences with templates in BrainMVP's released checkpoints, in their order.
TEMPLATES = CANONICAL[:8]
#: Other spellings, without ``- _ .`` and spaces. A plain ``T1`` is never read as post-contrast.
_SPELLINGS = {
    "t1": ("t1n", "t1w", "t1pre", "mprage", "spgr", "bravo"),
    "t1c": ("t1ce", "t1gd", "t1post"),
    "t2": ("t2w",),
    "flair": ("t2f", "fla", "t2flair"),
    "pd": ("pdw",),
    "t2star": ("t2starw",),
    "hbv": ("highb",),
    "mra": ("angio", "tof"),
}
_CANONICAL_OF = {name: name for name in CANONICAL} | {
    spelling: name for name, spellings in _SPELLINGS.items() for spelling in spellings
}
_IGNORED = re.compile(r"[-_.\s]")


def canonical_name(name: str) -> str:
    """Return the canonical name of a modality; an unknown one is kept in lower case.

    Args:
        name: As written, in any case; ``- _ .`` and spaces are ignored.
    """
    return _CANONICAL_OF.get(_IGNORED.sub("", name.lower()), name.strip().lower())


def canonical_order(names: Iterable[str]) -> tuple[str, ...]:
    """Return distinct canonical names in the order of channels; unknown ones come last, by name."""
    places = {name: place for place, name in enumerate(CANONICAL)}
    return tuple(sorted(set(names), key=lambda name: (places.get(name, len(places)), name)))


def clashes(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the canonical names shared by several of ``names``, with those names."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(canonical_name(name), []).append(name)
    return {name: found for name, found in groups.items() if len(found) > 1}


def canonical_channels(names: Sequence[str]) -> tuple[str, ...]:
    """Return the canonical names of a checkpoint's channels.

    Channels that would share one, no longer allowed in archives, keep their own names in lower case.
    """
    shared = clashes(names)
    return tuple(name.lower() if canonical_name(name) in shared else canonical_name(name) for name in names)


def shown_names(spellings: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """Return the modalities' names for figures and logs: the archive's, or the canonical one if it uses several.

    Args:
        spellings: Every name that an archive uses, by canonical name.
    """
    counts = {name: Counter(found) for name, found in spellings.items()}
    return {name: next(iter(found)) if len(found) == 1 else name for name, found in counts.items()}
