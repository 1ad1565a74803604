"""What a doctor looks at in single 2D images, whatever they are for."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from common.faults import Fault
from datamodules.images import MIN_SIDE, ImageError, read_gray, read_header
from datamodules.volume_io import fingerprint


def check_image(path: Path, case_id: str, deep: bool) -> Fault | str:
    """Look at an image's header, or (``deep``) at every pixel.

    Returns:
        What is wrong; else the file's check sum, empty where only the header was read.
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


def copies(images: Iterable[tuple[str, Mapping[str, str]]]) -> list[list[str]]:
    """Return groups of images of different patients that are equal byte by byte.

    Args:
        images: Patient, and check sum to path, of each sample.
    """
    owners: dict[str, dict[str, str]] = defaultdict(dict)
    for patient, sums in images:
        for checksum, path in sums.items():
            owners[checksum].setdefault(patient, path)
    return [list(group.values()) for group in owners.values() if len(group) > 1]
