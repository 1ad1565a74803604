"""Careful reading of untrusted files: bounded, decompressed with their check sums verified, UTF-8, and only as data.

Tables are read by :mod:`datamodules.tables`, which builds on this.
"""

import gzip
import json
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError, UserError

#: Most bytes of a table or list, decompressed.
MAX_BYTES = 2**31
#: Deflate compresses zeros 1,032-fold, a table of text hardly 30-fold.
_MAX_RATIO = 100
_SLACK = 2**24
_CHUNK = 2**20
_BOM = b"\xef\xbb\xbf"
_WIDE_BOMS = (b"\xff\xfe", b"\xfe\xff")
_GZIP = b"\x1f\x8b"
_DECLARATION = re.compile(r"<!(DOCTYPE|ENTITY)")


def short(text: str, most: int = 60) -> str:
    """Return an untrusted text for use in a message: shortened, on one line, without control characters."""
    shown = "".join(sign if sign.isprintable() else "?" for sign in text[:most])
    return shown if len(text) <= most else f"{shown}..."


def listing(names: Iterable[str], most: int = 100) -> str:
    """List untrusted names, as many as fit into ``most`` characters, followed by their number if some are left out."""
    every = [short(name, 40) for name in names]
    shown = every[:1]
    while len(shown) < len(every) and len(", ".join([*shown, every[len(shown)]])) <= most:
        shown.append(every[len(shown)])
    return (", ".join(shown) or "none") + (f", ... ({len(every)} in all)" if len(shown) < len(every) else "")


def optional_reader(module: str, what: str) -> Any:
    """Import an optional reader.

    Raises:
        UserError: it is not installed; the message names the extra.
    """
    try:
        return __import__(module)
    except ImportError as error:
        raise UserError(f"Reading {what} needs {module}: install it with pip install 'medmim[genetics]'.") from error


def read_bytes(path: Path, limit: int = MAX_BYTES) -> bytes:
    """Return a file's content; a gzip file is decompressed to its end, which verifies its check sum.

    gzip is recognised by its first bytes: browsers decompress downloads but keep their names.

    Args:
        path: The file.
        limit: Most bytes, decompressed.

    Raises:
        DataError: it is not a regular file, cannot be read, is damaged or larger than the limit.
    """
    if not path.is_file():
        raise DataError(f"{path} is {'not a regular file' if path.exists() else 'not there'}.")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            zipped = file.read(len(_GZIP)) == _GZIP
            file.seek(0)
            if not zipped:
                return _read_up_to(file, limit, path)
            with gzip.GzipFile(fileobj=file) as inflated:
                return _read_up_to(inflated, min(limit, _MAX_RATIO * size + _SLACK), path)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is damaged ({error}): fetch it again.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error


def _read_up_to(file: BinaryIO | gzip.GzipFile, limit: int, path: Path) -> bytes:
    """Read a file in pieces, so that memory is never allocated on a header's promise.

    Raises:
        DataError: it is larger than the limit.
    """
    parts: list[bytes] = []
    total = 0
    while part := file.read(_CHUNK):
        total += len(part)
        if total > limit:
            raise DataError(f"{path} holds more than {limit:,} bytes, more than is read of such a file.")
        parts.append(part)
    return b"".join(parts)


def zipped_member(path: Path) -> bytes:
    """Return the one file in a zip archive.

    Raises:
        DataError: the archive is damaged, does not hold exactly one file, or exceeds the size limit.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = [entry for entry in archive.infolist() if not entry.is_dir()]
            if len(members) != 1:
                raise DataError(f"{path} holds {len(members)} files; it must hold exactly one table.")
            if members[0].file_size > min(MAX_BYTES, _MAX_RATIO * path.stat().st_size + _SLACK):
                raise DataError(f"{path} promises {members[0].file_size:,} bytes, more than is read of such a file.")
            return archive.read(members[0])
    except DataError:
        raise
    except (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} cannot be read as a zip archive ({error}): fetch it again.") from error


def decoded(data: bytes, place: str) -> str:
    """Decode UTF-8, with or without a byte order mark.

    Args:
        data: The bytes.
        place: Their name in error messages.

    Raises:
        DataError: they are not UTF-8, or hold a zero byte; the message names line and byte.
    """
    start = len(_BOM) if data.startswith(_BOM) else 0
    wide = data.startswith(_WIDE_BOMS)
    try:
        text = data[start:].decode()
        where = data.find(b"\0")
        wide |= where >= 0
    except UnicodeDecodeError as error:
        where = start + error.start
    if where < 0:
        return text
    line = data.count(b"\n", 0, where) + 1
    encoding = "UTF-16" if wide else "Latin-1 or another encoding"
    raise DataError(
        f"{place} line {line} is not UTF-8: byte {where} of the file is 0x{data[where]:02X}, as in {encoding}. "
        f"Save the file as UTF-8."
    )


def read_text(path: Path, limit: int = MAX_BYTES) -> str:
    """Return a text file; see :func:`read_bytes` and :func:`decoded`.

    Raises:
        DataError: it cannot be read, or is not UTF-8.
    """
    return decoded(read_bytes(path, limit), str(path))


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file; unlike ``splitlines``, Unicode separators do not end a line.

    Raises:
        DataError: as :func:`read_text`.
    """
    return [line.rstrip("\r") for line in read_text(path).split("\n")]


def first_line(path: Path) -> str:
    """Return the first line of a file, whatever its encoding: enough to decide whether to read it."""
    if not path.is_file():
        return ""
    try:
        with path.open("rb") as file:
            return file.readline(_CHUNK).removeprefix(_BOM).decode(errors="replace").strip()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error


def parse_json(text: str, place: str) -> Any:
    """Parse JSON; numbers are kept as text, and Python's NaN becomes null.

    Args:
        text: The document.
        place: Its name in error messages.

    Raises:
        DataError: it is not JSON, is nested too deeply, has a duplicate key, or holds invalid characters.
    """
    try:
        value = json.loads(
            text,
            parse_int=str,
            parse_float=str,
            parse_constant=lambda name: None if name == "NaN" else name,
            object_pairs_hook=_members,
        )
        if "\\u" in text:
            _check_characters(json.dumps(value, ensure_ascii=False))
    except RecursionError as error:
        raise DataError(f"{place} is nested too deeply to be read.") from error
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text else ""
        raise DataError(f"{place} cannot be read as JSON: {error.msg} at {line}column {error.colno}.") from error
    except ValueError as error:
        raise DataError(f"{place} cannot be read as JSON: {error}.") from error
    return value


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dictionary from an object's members.

    Raises:
        ValueError: a key occurs twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {short(twice)!r} occurs twice in one object")
    return found


def _check_characters(text: str) -> None:
    """Refuse unpaired surrogates and the zero character, which escapes can produce.

    Raises:
        ValueError: there is such a character.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the escape \\u{ord(text[error.start]):04x} is half of a character") from error
    if re.search(r"(?<!\\)(\\\\)*\\u0000", text):
        raise ValueError("the escape \\u0000 is not a valid character")


def read_json(path: Path) -> Any:
    """Read a JSON document; see :func:`parse_json`.

    Raises:
        DataError: it cannot be read, is not UTF-8, or not JSON.
    """
    return parse_json(read_text(path), str(path))


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Read a file with one JSON object per line; empty lines are ignored. See :func:`parse_json`.

    Raises:
        DataError: the first line that is not an object.
    """
    for number, line in enumerate(read_lines(path), 1):
        if line.strip():
            row = parse_json(line, f"{path} line {number}")
            if not isinstance(row, dict):
                raise DataError(f"{path} line {number} is not a JSON object.")
            yield row


def parse_xml(text: str, place: str) -> ElementTree.Element | None:
    """Parse an XML document; None if it is not well-formed.

    Args:
        text: The document.
        place: Its name in error messages.

    Raises:
        DataError: it declares entities, which can expand a short document without bound.
    """
    if _DECLARATION.search(text):
        raise DataError(f"{place} has a DOCTYPE or ENTITY declaration, which no report has.")
    try:
        return ElementTree.fromstring(text)
    except ElementTree.ParseError:
        return None


def read_matrix(path: Path, name: str, shape: tuple[int, int], what: str) -> NDArray[np.float32]:
    """Read a numeric matrix from an HDF5 file, after checking its size.

    Args:
        path: The file.
        name: Name of the data set.
        shape: Required rows and columns.
        what: Its description in error messages.

    Raises:
        DataError: the file is damaged, or the data set is missing, of another shape, not numeric, or external.
        UserError: h5py is not installed.
    """
    h5py = optional_reader("h5py", what)
    if not path.is_file():
        raise DataError(f"{path} is not there.")
    try:
        with h5py.File(path, "r") as file:
            link, data = file.get(name, getlink=True), file[name]
            if not isinstance(link, h5py.HardLink) or data.external or data.is_virtual:
                raise DataError(f"{path} stores {name} in another file, which is not opened.")
            if data.dtype.kind not in "fiu":
                raise DataError(f"{path} holds {data.dtype} instead of numbers.")
            if data.shape != shape:
                held = " x ".join(map(str, data.shape)) or "1"
                raise DataError(f"{path} holds {held} values, its names are {shape[0]} x {shape[1]}.")
            return data[()].astype(np.float32)
    except DataError:
        raise
    except (OSError, KeyError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{path} cannot be read as {what}: {str(error).splitlines()[0]}") from error


def listed_names(paths: Sequence[Path]) -> list[str]:
    """Return the names in lists, one per line; empty lines are ignored.

    Raises:
        DataError: a list cannot be read.
    """
    return [line.strip() for path in paths for line in read_lines(path) if line.strip()]
