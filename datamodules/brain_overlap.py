"""The same scans under several names: what is known of the public archives, and what check sums show."""

import re
from collections.abc import Iterable, Sequence

from common.errors import DataError
from datamodules.cache import VolumeCache
from datamodules.cases import Case

_NEW_GLIOMA = re.compile(r"^BraTS-GLI-\d+")
_OLD_GLIOMA = re.compile(r"^BraTS(20)?21_\d+", re.IGNORECASE)


def _count(cases: Iterable[Case], pattern: re.Pattern[str]) -> int:
    return sum(bool(pattern.match(case.case_id)) for case in cases)


def overlap_notes(cases: Sequence[Case]) -> list[str]:
    """Say which of the sources are known to share patients.

    Raises:
        DataError: BraTS 2021 stands beside BraTS 2023-GLI, which is the same scans renamed.
    """
    new, old = _count(cases, _NEW_GLIOMA), _count(cases, _OLD_GLIOMA)
    if new and old:
        raise DataError(f"BraTS 2023-GLI ({new} studies) is BraTS 2021 ({old} studies) under new names: "
                        f"keep one of them, or the same scans train and validate.")  # fmt: skip
    notes = []
    for name in ("UCSF-PDGM", "UPENN-GBM"):
        count = _count(cases, re.compile(name))
        if count and (new or old):
            notes.append(f"part of {name} ({count} studies) is inside BraTS ({new + old} studies) under other names: "
                         f"these patients count twice, and a task on either has been seen in pre-training")  # fmt: skip
    return notes


def check_copies(cases: Sequence[Case], store: VolumeCache) -> None:
    """Refuse a study that is listed under two names: files of two patients that are equal byte by byte.

    Args:
        cases: The cases.
        store: Their cache, which knows the check sums of the sources.

    Raises:
        DataError: names the first pair.
    """
    owners: dict[str, tuple[Case, str]] = {}
    for case in cases:
        record = store.read_record(case.case_id)
        images = {str(path) for path in case.images.values()}
        for path, source in (record.sources if record is not None else {}).items():
            if path not in images or "xxh3" not in source:
                continue
            other, twin = owners.setdefault(source["xxh3"], (case, path))
            if other.patient_id != case.patient_id:
                raise DataError(f"{other.case_id} and {case.case_id} are the same study under two names: {twin} and "
                                f"{path} are equal byte by byte. Keep one of them.")  # fmt: skip
