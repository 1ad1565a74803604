"""What ``medmim doctor`` checks in single 2D images."""

from collections.abc import Iterable
from pathlib import Path

from common.faults import Fault
from datamodules.examination import Member
from datamodules.images.reading import MIN_SIDE, read_gray, read_header
from datamodules.images.values import ImageError
from datamodules.storage import fingerprint


def check_image(path: Path, case_id: str, deep: bool) -> Fault | str:
    """Check an image's header, or every pixel if ``deep``.

    Returns:
        The fault; otherwise the file's check sum, empty if only the header was read.
    """
    try:
        if deep:
            read_gray(path)
            return str(fingerprint(path)["xxh3"])
        if min(read_header(path)) < MIN_SIDE:
            raise ImageError("shape", f"smaller than {MIN_SIDE} pixels")
    except ImageError as error:
        return Fault(str(path), error.kind, error.detail, case_id)
    return ""


def check_images(paths: Iterable[Path], case_id: str, patient_id: str, deep: bool) -> Member:
    """Check the images of a member, which is usable if any of them is."""
    found = {path: check_image(path, case_id, deep) for path in paths}
    faults = [entry for entry in found.values() if isinstance(entry, Fault)]
    sums = {entry: str(path) for path, entry in found.items() if isinstance(entry, str) and entry}
    return Member(case_id, patient_id, faults, sums, len(faults) < len(found))
