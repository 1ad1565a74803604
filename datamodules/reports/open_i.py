"""Open-I, the chest radiographs of Indiana University: XML reports and, if they were downloaded, PNG images.

``NLMCXR_reports.tgz`` (members ``ecgen-radiology/1.xml``) or its unpacked folder; an image is named after the
``parentImage`` of its report and may lie anywhere under the root. A study's text is a JSON object of its sections.
"""

import io
import json
import re
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree

from common.errors import DataError
from datamodules.files import parse_xml, read_bytes
from datamodules.registry import Evidence, Facts, Layout
from datamodules.reports.studies import Study
from datamodules.reports.text import MAX_BYTES, check_part, clean, decode
from datamodules.tree import Tree

ARCHIVE = "NLMCXR_reports.tgz"
_FOLDERS = (".", "ecgen-radiology", "*/ecgen-radiology")
_NAME = re.compile(r"\d+\.xml")
_ROOT_TAG = b"<eCitation"


def _archived(path: Path) -> Iterator[tuple[PurePosixPath, bytes]]:
    """Yield name and content of an archive's reports.

    Raises:
        DataError: a member's path leads outside the archive, or the archive is damaged.
    """
    try:
        with tarfile.open(fileobj=io.BytesIO(read_bytes(path)), mode="r:") as archive:
            for member in archive:
                name = PurePosixPath(member.name)
                if name.is_absolute() or ".." in name.parts:
                    raise DataError(f"{path} holds the member {member.name}, which points out of the archive.")
                file = archive.extractfile(member) if member.isreg() and _NAME.fullmatch(name.name) else None
                if file is not None:
                    yield name, file.read(MAX_BYTES + 1)
    except tarfile.TarError as error:
        raise DataError(f"{path} cannot be read to its end ({error}); fetch it again.") from error


def _unpacked(root: Tree) -> Iterator[tuple[PurePosixPath, bytes]]:
    """Yield name and content of the reports in the first folder that has any."""
    for pattern in _FOLDERS:
        paths = [path for path in root.glob(f"{pattern}/*.xml") if _NAME.fullmatch(path.name)]
        for path in paths:
            with path.open("rb") as file:
                yield PurePosixPath(path), file.read(MAX_BYTES + 1)
        if paths:
            return


def _parse(place: str, data: bytes) -> ElementTree.Element:
    """Parse a report; one that is not well-formed becomes an empty element.

    Raises:
        DataError: the report is too long, or declares entities.
    """
    if len(data) > MAX_BYTES:
        raise DataError(f"{place} is longer than {MAX_BYTES} bytes, which no report is.")
    report = parse_xml(decode(data), place)
    return ElementTree.Element("eCitation") if report is None else report


def _sections(report: ElementTree.Element) -> dict[str, str]:
    """Return the nonempty sections by label in lower case."""
    found: dict[str, str] = {}
    for element in report.iter("AbstractText"):
        label, text = element.get("Label", "").lower(), clean("".join(element.itertext()), keep_redactions=True)
        if text:
            found[label] = f"{found[label]} {text}" if label in found else text
    return found


def _study(number: int, report: ElementTree.Element, images: Mapping[str, Path]) -> Study:
    """Make a study from a report and those of its images that exist."""
    names = (element.get("id", "") for element in report.iter("parentImage"))
    found = tuple(images[name] for name in names if name in images)
    text = json.dumps(_sections(report), ensure_ascii=False)
    return Study(f"CXR{number}", f"CXR{number}", found, ("",) * len(found), text)


def find_studies(root: Tree) -> list[Study]:
    """List the studies of Open-I in the order of their numbers.

    A report that is not well-formed is kept without text, so that it counts as a fault, not as missing.

    Raises:
        DataError: a damaged archive, a member outside it, or a report that is too long or declares entities.
    """
    archive = root / ARCHIVE
    reports = dict(_archived(archive) if root.is_file(ARCHIVE) else _unpacked(root))
    if not any(_ROOT_TAG in data for data in reports.values()):
        return []
    images = {path.stem: path for path in reversed(root.glob("**/*.png"))}
    numbered = sorted((int(name.stem), name) for name in reports)
    return [_study(number, _parse(str(name), reports[name]), images) for number, name in numbered]


def open_i_text(text: str, part: str, keep_redactions: bool = False) -> str:
    """Return the text to use from an Open-I report.

    Args:
        text: A study's text: a JSON object of sections.
        part: ``full`` joins all sections in order, ``findings_impression`` these two; empty if it has neither.
        keep_redactions: As :func:`datamodules.reports.text.clean`; these reports' own marks, ``XXXX``, are always kept.

    Raises:
        ValueError: an unknown part.
    """
    check_part(part)
    found: dict[str, str] = json.loads(text)
    names = found if part == "full" else ("findings", "impression")
    return clean(" ".join(found.get(name, "") for name in names), keep_redactions)


def _recognise(tree: Tree) -> Evidence:
    if tree.is_file(ARCHIVE):
        return Evidence(3, ARCHIVE)
    first = next((path for pattern in _FOLDERS for path in tree.glob(f"{pattern}/*.xml") if _NAME.fullmatch(path.name)),
                 None)  # fmt: skip
    if first is None:
        return Evidence(0, missing=ARCHIVE)
    with first.open("rb") as file:
        if _ROOT_TAG in file.read(MAX_BYTES):
            return Evidence(3, f"{tree.name_of(first)} is a report of Open-I")
    return Evidence(0, missing="reports with eCitation", near=0.3)


OPEN_I = Layout(
    name="open_i",
    tree=f"ROOT/{ARCHIVE} or ROOT/ecgen-radiology/<number>.xml [+ <parentImage id>.png anywhere under ROOT]",
    find=find_studies,
    evidence=_recognise,
    facts=Facts(extract=open_i_text),
    tables=(ARCHIVE, *(f"{pattern}/*.xml" for pattern in _FOLDERS)),
)
