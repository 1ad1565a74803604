"""Owners of files, by name or folder, if no table lists them."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from common.errors import DataError
from datamodules.tree import stem_of

_GROUPS = ("subject", "session", "view")


class Owner(NamedTuple):
    """The result of a rule for a file.

    Attributes:
        subject: Its subject.
        session: Visit; empty if unknown.
        view: View; empty if unknown.
    """

    subject: str
    session: str = ""
    view: str = ""


def owner_of(name: str, rule: str | Mapping[str, str]) -> Owner:
    """Return the owner of a file.

    Args:
        name: Its path under the root.
        rule: ``folder``, ``file``, or ``{"regex": ...}`` with the group subject and optionally session and view.

    Raises:
        DataError: the rule is invalid, or the expression does not match the name.
    """
    if rule == "file":
        folder = name.rpartition("/")[0]
        return Owner(f"{folder}/{stem_of(name)}" if folder else stem_of(name))
    if rule == "folder":
        return Owner(name.rpartition("/")[0] or stem_of(name))
    if not isinstance(rule, Mapping) or set(rule) != {"regex"}:
        raise DataError(f"subject: takes folder, file, a column of a table or {{regex: ...}}, not {rule!r}.")
    try:
        pattern = re.compile(rule["regex"])
    except re.error as error:
        raise DataError(f"The expression {rule['regex']!r} of subject: cannot be read: {error}.") from error
    if "subject" not in pattern.groupindex:
        raise DataError(f"The expression {rule['regex']!r} of subject: needs a group (?P<subject>...).")
    match = pattern.search(name)
    if match is None:
        raise DataError(f"The expression {rule['regex']!r} of subject: does not fit {name}.")
    return Owner(*(match.groupdict().get(group) or "" for group in _GROUPS))


def needs_rule(names: Sequence[str]) -> str | None:
    """Return a folder with several files, whose owners the tree does not tell; None if there is none."""
    counts = Counter(name.rpartition("/")[0] for name in names)
    folder, count = counts.most_common(1)[0] if counts else ("", 0)
    return (folder or ".") if count > 1 else None
