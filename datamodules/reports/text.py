"""Reading reports and extracting the text to use.

A MIMIC-CXR report is plain text whose sections begin with a header such as `` FINDINGS:``; most have findings and
impression, and a report with neither still gives the best text it has.
"""

import os
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path

from datamodules.registry import Archive
from datamodules.reports.studies import ReportFile, Study

PARTS = ("full", "findings_impression")
MAX_BYTES = 2**20
_HEADER = re.compile(r"\n ([A-Z ()/,-]+):\s")
_BLANK_LINE = re.compile(r"\n[ \t]*\n")
_UNDERSCORES = re.compile(r"_+")
_NO_REDACTION = re.compile(r"(?<!_)_{1,2}(?!_)|_{4,}")
_WANTED = ("findings", "impression")
_NAMES = {
    "impression": ("conclusion", "conclusions"),
    "findings": ("finding",),
    "indication": ("reason for exam", "reason for examination", "clinical indication"),
    "history": ("clinical information", "pfi"),
    "comparison": ("reference exam",),
    "examination": ("exam", "type of examination"),
    "recommendations": ("recommendation", "recommendation(s)"),
    "wet read": ("wetread",),
}
_CANONICAL = {alias: name for name, aliases in _NAMES.items() for alias in (name, *aliases)}
_CONTAINED = ("impression", "findings", "history", "comparison", "addendum")
_OFTEN_MISSPELT = ("impression", "findings", "indication", "comparison")
_VIEWS = re.compile(
    r"chest|portable|ribs|bone window|(one|frontal|lateral|pa|ap) view|two views|frontal (and|upright|semi-upright)"
    r"|(pa|ap) and lateral|lateral and (pa|ap)|pa and lat"
)


class ReportError(Exception):
    """A report that cannot be used.

    Args:
        kind: missing, unreadable or empty.
        detail: What was found, in words.
    """

    def __init__(self, kind: str, detail: str) -> None:
        self.kind = kind
        self.detail = detail
        super().__init__(kind, detail)

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}"


def check_part(part: str) -> None:
    """Check the name of a part of a report.

    Raises:
        ValueError: it is not in ``PARTS``.
    """
    if part not in PARTS:
        raise ValueError(f"Unknown part {part!r} of a report; known are {', '.join(PARTS)}.")


def clean(text: str, keep_redactions: bool = False) -> str:
    """Collapse white space and drop runs of ``_``.

    Args:
        text: Any text.
        keep_redactions: Whether ``___``, which marks removed parts of the report, is kept.
    """
    return " ".join((_NO_REDACTION if keep_redactions else _UNDERSCORES).sub(" ", text).split())


def plain_text(text: str, part: str, keep_redactions: bool = False) -> str:
    """Return a text that has no sections, such as a clinical note.

    Args:
        text: The text.
        part: As :func:`mimic_text`; it makes no difference here.
        keep_redactions: As :func:`clean`.

    Raises:
        ValueError: an unknown part.
    """
    check_part(part)
    return clean(text, keep_redactions)


@lru_cache(maxsize=4096)
def _section_name(header: str) -> str:
    """Return the usual name of a section; an unknown one is kept in lower case."""
    name = header.strip().lower()
    if name in _CANONICAL:
        return _CANONICAL[name]
    contained = next((usual for usual in _CONTAINED if usual in name), None)
    if contained is not None:
        return contained
    if _VIEWS.search(name):
        return "findings"
    return next(iter(get_close_matches(name, _OFTEN_MISSPELT, n=1, cutoff=0.85)), name)


def _headed(text: str) -> list[tuple[str, str]]:
    """Cut a text at its headers; the rest of a header's line is never a header itself."""
    headers = list(_HEADER.finditer(text))
    if not headers:
        return [("full report", text)]
    ends = [*(header.start() for header in headers[1:]), len(text)]
    found = [(_section_name(header[1]), text[header.end() : end]) for header, end in zip(headers, ends, strict=True)]
    return [("preamble", text[: headers[0].start()]), *found]


def sections(text: str) -> list[tuple[str, str]]:
    """Split a MIMIC-CXR report into sections.

    Text before the first header is ``preamble``; a text without headers is ``full report``. Empty findings and
    impressions are dropped; if none is left, the last section is cut at its first blank line, and its rest is
    ``last_paragraph``.

    Returns:
        Name and text of every section in order; a name may occur twice.
    """
    found = _headed(text.replace("\r\n", "\n").replace("\r", "\n"))
    found = [(name, body) for name, body in found if name not in _WANTED or body.strip()]
    if not any(name in _WANTED for name, _ in found):
        name, body = found[-1]
        head, *tail = _BLANK_LINE.split(body, maxsplit=1)
        if tail and tail[0].strip():
            found[-1:] = [(name, head), ("last_paragraph", tail[0])]
    return [(name, body.strip()) for name, body in found]


def mimic_text(text: str, part: str, keep_redactions: bool = False) -> str:
    """Return the text to use from a MIMIC-CXR report.

    Args:
        text: The whole report.
        part: ``full``, or ``findings_impression``: both in this order, else the last paragraph, else the comparison,
            else everything. Of several sections with one name the last nonempty one is used.
        keep_redactions: As :func:`clean`.

    Raises:
        ValueError: an unknown part.
    """
    check_part(part)
    whole = clean(text, keep_redactions)
    if part == "full":
        return whole
    found = {name: body for name, raw in sections(text) if (body := clean(raw, keep_redactions))}
    both = " ".join(found[name] for name in _WANTED if name in found)
    return both or found.get("last_paragraph") or found.get("comparison") or whole


def decode(data: bytes) -> str:
    """Decode UTF-8, falling back to Latin-1, which accepts any bytes."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")


@lru_cache(maxsize=8)
def _open_zip(path: Path, process: int) -> zipfile.ZipFile:
    """Open an archive once per process: forked processes would share the position in the file."""
    return zipfile.ZipFile(path)


def _read_member(path: Path, member: str) -> bytes:
    """Read a member, at most one byte more than the limit."""
    with _open_zip(path, os.getpid()).open(member) as file:
        return file.read(MAX_BYTES + 1)


def _read_file(path: Path) -> bytes:
    """Read a file, at most one byte more than the limit."""
    with path.open("rb") as file:
        return file.read(MAX_BYTES + 1)


def read_report(source: ReportFile) -> str:
    """Read a report from its file or archive.

    Raises:
        ReportError: the file is gone (``missing``), damaged or longer than ``MAX_BYTES`` (``unreadable``), or holds no
            text (``empty``).
    """
    place = str(source.path) if source.member is None else f"{source.member} in {source.path}"
    try:
        data = _read_file(source.path) if source.member is None else _read_member(source.path, source.member)
    except (FileNotFoundError, KeyError) as error:
        raise ReportError("missing", f"{place} does not exist") from error
    except (OSError, EOFError, RuntimeError, struct.error, zipfile.BadZipFile, zlib.error) as error:
        raise ReportError("unreadable", f"{place}: {error}") from error
    if len(data) > MAX_BYTES:
        raise ReportError("unreadable", f"{place} is longer than {MAX_BYTES} bytes, which no report is")
    text = decode(data)
    if not text.strip():
        raise ReportError("empty", f"{place} holds no text")
    return text


#: Extracts the text to use from a report; takes the report, the part and whether redactions are kept.
Extract = Callable[[str, str, bool], str]


def extract_of(archive: Archive) -> Extract:
    """Return the function that extracts an archive's texts; by default reports are used as they are.

    See :func:`plain_text`.
    """
    return archive.facts.extract or plain_text


def study_text(study: Study, extract: Extract, part: str, redactions: bool) -> str:
    """Return a study's text as it is used; empty if it has none.

    Args:
        study: The study.
        extract: Extracts the text from a report.
        part: See :func:`plain_text`.
        redactions: Whether ``___`` is kept.

    Raises:
        ReportError: a listed report cannot be read.
    """
    if study.text is None:
        return ""
    text = study.text if isinstance(study.text, str) else read_report(study.text)
    return extract(text, part, redactions)
