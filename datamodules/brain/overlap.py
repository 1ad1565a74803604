"""The same scans under several names: what is known of the public archives, and what check sums show."""

import contextlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from common.errors import DataError
from common.pseudonyms import public_name
from datamodules.volumes.cache import SourceVolumes, VolumeCache
from datamodules.volumes.cases import Case
from datamodules.volumes.headers import VolumeError
from datamodules.volumes.prepare import read_image

_NEW_GLIOMA = re.compile(r"^BraTS-GLI-\d+", re.IGNORECASE)
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
        count = _count(cases, re.compile(name, re.IGNORECASE))
        if count and (new or old):
            notes.append(f"part of {name} ({count} studies) is inside BraTS ({new + old} studies) under other names: "
                         f"these patients count twice, and a task on either has been seen in pre-training")  # fmt: skip
    return notes


def _check_sums(cases: Sequence[Case], store: VolumeCache | SourceVolumes) -> Iterator[tuple[Case, str, str]]:
    """Yield case, path and check sum of every image in use; without a cache, of those as long as another.

    Files with a fault are left out: two sequences of nothing but zeros are equal, and show nothing.
    """
    if isinstance(store, VolumeCache):
        for case in cases:
            if (record := store.known_record(case.case_id)) is not None:
                useful = {str(path) for path in case.images.values()} - {path for path, _, _ in record.faults}
                for name, source in record.sources.items():
                    if name in useful and "xxh3" in source:
                        yield case, name, source["xxh3"]
        return
    files = [(case, path) for case in cases for name, path in case.images.items() if name in store.layout.modalities]
    sizes = {path: path.stat().st_size for _, path in files if path.is_file()}
    count = Counter(sizes.values())
    for case, path in files:
        if path in sizes and count[sizes[path]] > 1:
            with contextlib.suppress(VolumeError):
                yield case, str(path), read_image(path).source["xxh3"]


def check_copies(cases: Sequence[Case], store: VolumeCache | SourceVolumes) -> None:
    """Refuse a study that is listed under two names: files of two patients that are equal byte by byte.

    Args:
        cases: The cases.
        store: Opens them; a cache knows the check sums of the sources, else they are read.

    Raises:
        DataError: names the first pair.
    """
    owners: dict[str, tuple[Case, str]] = {}
    for case, path, check_sum in _check_sums(cases, store):
        other, twin = owners.setdefault(check_sum, (case, path))
        if other.patient_id != case.patient_id:
            one, two, first, second = map(public_name, (other.case_id, case.case_id, twin, path))
            raise DataError(f"{one} and {two} are the same study under two names: {first} and {second} are equal byte "
                            f"by byte. Keep one of them.")  # fmt: skip
