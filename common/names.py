"""Untrusted names of cases, studies, subjects and runs, made safe as parts of paths and on one line of text."""

import hashlib
import re
from collections import Counter
from collections.abc import Container, Iterable

#: Most bytes of a name: enough for any archive, with room for the suffixes of files.
MAX_BYTES = 100
#: Letters kept of a name that must be changed; the check sum that follows takes 33 more.
_KEPT = 60
_PLAIN = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_-])?")
#: Names of devices under Windows, whatever their suffix: shared folders are read from there too.
_DEVICE = re.compile(r"(?:con|prn|aux|nul|com[0-9]|lpt[0-9])(?:\..*)?", re.IGNORECASE)


def safe_name(text: str, twins: Container[str] = ()) -> str:
    """Turn any text into one part of a path: no two texts share a name, and none leaves its folder.

    An ordinary id stays as it is: ASCII letters, digits, ``.``, ``_`` and ``-``, at most :data:`MAX_BYTES`. Any other
    text becomes its legible part, ``~`` and a check sum of the whole, so ``sub-01/ses-1`` becomes
    ``sub-01_ses-1~<32 digits>``. No ordinary id holds a ``~``.

    Args:
        text: A name from a file, a table or a configuration; it may hold anything.
        twins: Ordinary ids that get the check sum too, those that share a folder and differ in nothing but case (see
            :func:`case_twins`): a function of one text cannot know that there is another.
    """
    ordinary = _PLAIN.fullmatch(text) and len(text) <= MAX_BYTES and not _DEVICE.fullmatch(text)
    if ordinary and text not in twins:
        return text
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    kept = re.sub(r"[^A-Za-z0-9._-]+", "_", text[:_KEPT]).lstrip(".-").rstrip(".") or "_"
    return f"{kept}~{digest}"


def case_twins(names: Iterable[str]) -> frozenset[str]:
    """Return the names that equal another one but for upper and lower case: one file where the file system folds it."""
    names = set(names)
    counts = Counter(name.casefold() for name in names)
    return frozenset(name for name in names if counts[name.casefold()] > 1)


def printable(text: object) -> str:
    r"""Return a text that can be printed and stored anywhere, on one line.

    Control characters, which could colour or rewrite a terminal, and bytes of file names that are no UTF-8 are written
    as escapes such as ``\x1b``.
    """
    letters = str(text)
    if letters.isprintable():
        return letters
    return "".join(a if a.isprintable() else a.encode("unicode_escape").decode() for a in letters)
