"""``archive.yaml``: what a person says about an archive. One schema names every key; ``medmim init`` proposes a file.

The command line wins over this file, and this file over an experiment's configuration. Values are text as written, so
that ``01`` is not 1 and ``no`` is a word; numbers are numbers where a key asks for one.
"""

import contextlib
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

import yaml

from common.errors import DataError
from common.modalities import clashes
from datamodules.files import decoded, read_bytes, short
from datamodules.registry import Settings, entry_of

#: The file that is looked for in a root.
NAME = "archive.yaml"
VERSION = 1
_MAX_BYTES = 2**20
#: Keys of the file that say how its layout is read; they are attributes of :class:`datamodules.registry.Settings`.
LAYOUT_KEYS = ("modalities", "ignore", "masks", "subject", "table", "columns", "pipeline", "runs", "missing", "series",
               "frame", "uneven", "min_slices")  # fmt: skip
#: Keys that no configuration has a place for: data modules take them as ``archive``.
OWN_KEYS = (*LAYOUT_KEYS, "session", "grid", "targets")
#: Values that say what goes without saying, so that no layout needs to know the key.
_PLAIN = {"subject": "sub", "session": "ses", "missing": "refuse", "uneven": "refuse"}
#: The room that makes rules of what stands under ``series``; imported only where there are some.
_SERIES_ROOM = "datamodules.dicom.rules"

#: Checks a value and returns it as it is used; raises :class:`_Wrong` where it is of another type.
Check = Callable[[Any, str], Any]


class _Wrong(Exception):
    """A value that a key cannot have; the text says which and why."""


def _refuse(where: str, wanted: str, value: Any) -> NoReturn:
    raise _Wrong(f"{where} must be {wanted}, got {short(repr(value), 50)}")


def _text(value: Any, where: str) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        _refuse(where, "text", value)
    return value


def _number(value: Any, where: str) -> float:
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            if math.isfinite(number := float(value)):
                return number
    _refuse(where, "a number", value)


def _whole(least: int) -> Check:
    def check(value: Any, where: str) -> int:
        if isinstance(value, bool) or not re.fullmatch(r"[0-9]{1,9}", str(value)) or int(value) < least:
            _refuse(where, f"a whole number from {least} on", value)
        return int(value)

    return check


def _one_of(*words: str) -> Check:
    return lambda value, where: value if value in words else _refuse(where, " or ".join(words), value)


def _list_of(check: Check, count: int | None = None, least: int = 0) -> Check:
    def checked(value: Any, where: str) -> list[Any]:
        if not isinstance(value, list | tuple) or (count is not None and len(value) != count) or len(value) < least:
            how_many = f"{count} " if count else f"{least} or more " if least else ""
            _refuse(where, f"a list of {how_many}values, such as [a, b]", value)
        return [check(item, f"{where}[{place}]") for place, item in enumerate(value)]

    return checked


def _mapping_of(check: Check) -> Check:
    def checked(value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            _refuse(where, "a mapping, such as {name: value}", value)
        return {_text(key, f"a name under {where}"): check(item, f"{where}.{key}") for key, item in value.items()}

    return checked


def _fields(needed: Sequence[str] = (), **checks: Check) -> Check:
    """Make the check of a mapping with fixed keys; null says nothing."""

    def checked(value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            _refuse(where or "it", f"a mapping with {', '.join(list(checks)[:4])} and the like", value)
        for key in value:
            if key not in checks:
                near = get_close_matches(str(key), checks, 1, 0.5)
                hint = f"the nearest key is {near[0]}" if near else f"known keys are {', '.join(checks)}"
                raise _Wrong(f"{f'{where} has' if where else 'there is'} no key {short(repr(key), 40)}; {hint}")
        if lacking := [key for key in needed if value.get(key) is None]:
            raise _Wrong(f"{where} lacks {lacking[0]}")
        path = f"{where}." if where else ""
        return {key: checks[key](item, f"{path}{key}") for key, item in value.items() if item is not None}

    return checked


def _layout(value: Any, where: str) -> str:
    name = _text(value, where)
    return name if name == "auto" else entry_of(name).name


def _modalities(value: Any, where: str) -> dict[str, str]:
    found: dict[str, str] = _mapping_of(_text)(value, where)
    for name, given in clashes(found).items():
        raise _Wrong(f"{where} names {name} twice, as {' and '.join(given)}")
    return found


def _subject(value: Any, where: str) -> str | dict[str, str]:
    if not isinstance(value, Mapping):
        return _text(value, where)
    rule: dict[str, str] = _fields(("regex",), regex=_text)(value, where)
    try:
        groups = re.compile(rule["regex"]).groupindex
    except (re.error, RecursionError, OverflowError) as error:
        raise _Wrong(f"the expression of {where} cannot be read ({short(str(error), 60)})") from error
    if "subject" not in groups:
        raise _Wrong(f"the expression of {where} needs a group (?P<subject>...)")
    return rule


def _three(wanted: str, holds: Callable[[list[float]], bool]) -> Check:
    def check(value: Any, where: str) -> list[float]:
        numbers: list[float] = _list_of(_number, 3)(value, where)
        return numbers if holds(numbers) else _refuse(where, wanted, value)

    return check


def _inside(value: Any, where: str) -> str:
    name = _text(value, where)
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        _refuse(where, "a place under the root", value)
    return name


def _version(value: Any, where: str) -> int:
    return VERSION if str(value) == str(VERSION) else _refuse(where, f"{VERSION}, the only version there is", value)


def _series(value: Any, where: str) -> list[Mapping[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(rule, Mapping) for rule in value):
        _refuse(where, "a list of rules, such as {description: mprage, modality: t1}", value)
    try:
        _parse_series(value)
    except (DataError, TypeError) as error:
        raise _Wrong(str(error).removesuffix(".")) from error
    return value


_TARGET = _fields(table=_text, column=_text, kind=_one_of("classification", "regression"),
                  classes=_list_of(_text, least=2), merge=_mapping_of(_list_of(_text, least=1)))  # fmt: skip
_SHARES = _three("three shares that sum to 1 (train, val, test)",
                 lambda shares: min(shares) >= 0 and math.isclose(sum(shares), 1, abs_tol=1e-6))  # fmt: skip
_SPACING = _three("three lengths above 0 in mm", lambda sides: min(sides) > 0)
_SPLIT = _fields(file=_text, fractions=_SHARES, seed=_whole(0), ids=_one_of("exact", "pad"),
                 unlisted=_one_of("refuse", "ignore"))  # fmt: skip
_VOXELS = _fields(intensity=_mapping_of(_text), nan=_one_of("refuse", "zero"), complex=_one_of("refuse", "magnitude"),
                  header=_one_of("refuse", "sform", "qform"))  # fmt: skip
#: Every key there is, and what it may hold.
SCHEMA: dict[str, Check] = {
    "version": _version,
    "root": _text,
    "layout": _layout,
    "modalities": _modalities,
    "ignore": _list_of(_text),
    "masks": _mapping_of(_fields(name=_text, values=_list_of(_whole(0), least=1))),
    "targets": _mapping_of(_TARGET),
    "subject": _subject,
    "session": _text,
    "split": _SPLIT,
    "grid": _fields(reference=_text, spacing=_SPACING),
    "voxels": _VOXELS,
    "series": _series,
    "pipeline": _inside,
    "runs": _one_of("all"),
    "frame": _whole(0),
    "uneven": _one_of("refuse", "interpolate"),
    "min_slices": _whole(1),
    "missing": _one_of("refuse", "ignore"),
    "table": _text,
    "columns": _mapping_of(_text),
}


def checked(content: Any, source: object = "data.archive") -> dict[str, Any]:
    """Check what is said about an archive, and return it with numbers where they belong and without what is null.

    Raises:
        DataError: an unknown key (names the nearest), or a value of another type.
    """
    try:
        found: dict[str, Any] = _fields((), **SCHEMA)(content, "")
    except (_Wrong, DataError) as error:
        raise DataError(f"{short(str(source), 90)}: {short(str(error).removesuffix('.'), 190)}.") from error
    return found


class _Loader(yaml.SafeLoader):
    """Reads every value as text but null; a key that comes twice and an alias are refused."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Return the next node (PyYAML hook)."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias (*name), which is not read")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping (PyYAML hook)."""
        names = [key.value for key, _ in node.value if isinstance(key.value, str)]
        if twice := [name for name in names if names.count(name) > 1]:
            raise yaml.YAMLError(f"the key {short(repr(twice[0]), 40)} stands there twice")
        return super().construct_mapping(node, deep)


class _TextLoader(_Loader):
    yaml_implicit_resolvers = {
        sign: [(tag, pattern) for tag, pattern in resolvers if tag == "tag:yaml.org,2002:null"]
        for sign, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def parsed(text: str, source: object) -> dict[str, Any]:
    """Parse and check the text of an archive file.

    Raises:
        DataError: it is no YAML, or as :func:`checked`.
    """
    try:
        content = yaml.load(text, _TextLoader)
        if isinstance(content, dict) and content.get("series"):
            content["series"] = yaml.load(text, _Loader)["series"]
    except (yaml.YAMLError, ValueError, TypeError, RecursionError, OverflowError) as error:
        problem = getattr(error, "problem", None) or str(error)
        mark = getattr(error, "problem_mark", None)
        place = f" in line {mark.line + 1}" if mark else ""
        raise DataError(f"{short(str(source), 90)} is not a valid YAML file{place}: {short(problem, 100)}.") from error
    return checked(content, source)


@dataclass(frozen=True)
class ArchiveFile:
    """An archive file that was read.

    Attributes:
        path: The file.
        root: The archive's folder.
        content: What it says, by key.
    """

    path: Path
    root: Path
    content: Mapping[str, Any]

    def located(self, name: str) -> str:
        """Return where a table lies that the file names: under the root, or else beside the file itself."""
        plain = os.path.expanduser(name)
        places = [os.path.join(folder, plain) for folder in (self.root, self.path.parent)]
        return next((os.path.realpath(place) for place in places if os.path.isfile(place)), plain)


def read_archive_file(path: Path) -> ArchiveFile:
    """Read an archive file. Its root is the folder it lies in, where it names none.

    Raises:
        DataError: it cannot be read, is no YAML, has an unknown key or a wrong value, or no such root is there.
    """
    content = parsed(decoded(read_bytes(path, _MAX_BYTES), str(path)), path)
    root = os.path.realpath(os.path.join(path.parent, os.path.expanduser(content.get("root", "."))))
    if not os.path.isdir(root):  # unlike Path.is_dir, it takes any text
        raise DataError(f"{short(str(path), 90)}: its root {short(root, 120)} is not a folder.")
    return ArchiveFile(path, Path(root), content)


def archive_file_of(root: str | Path) -> ArchiveFile | None:
    """Return the archive file that a person's ``root`` is, or that lies in it; None where there is none.

    Raises:
        DataError: as :func:`read_archive_file`, or the file in a root describes another one.
    """
    path = Path(root).expanduser()
    if path.is_file():
        return read_archive_file(path)
    if not (path / NAME).is_file():
        return None
    found = read_archive_file(path / NAME)
    if found.root != path.resolve():
        raise DataError(f"{short(str(found.path), 90)} says root: {short(str(found.root), 90)}, not the folder that it "
                        f"lies in: correct it, or name the file itself.")  # fmt: skip
    return found


def _parse_series(rules: Sequence[Mapping[str, Any]]) -> Any:
    return import_module(_SERIES_ROOM).parse_rules(rules)


def settings_of(content: Mapping[str, Any]) -> Settings:
    """Return what a layout has to heed of what is said about an archive.

    Raises:
        DataError: no layout knows a key.
    """
    said = {key: value for key, value in content.items() if _PLAIN.get(key) != value}
    if "session" in said:
        said["columns"] = {"session": said["session"], **said.get("columns", {})}
    said = {key: value for key, value in said.items() if key in LAYOUT_KEYS}
    known = {field.name for field in fields(Settings)}
    if strange := [key for key in said if key not in known]:
        raise DataError(f"No layout takes {strange[0]}: leave it out of {NAME}.")
    if "series" in said:
        said["series"] = _parse_series(said["series"])
    given: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in said.items()}
    return Settings(**given)
