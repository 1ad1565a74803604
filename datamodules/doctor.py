"""``medmim doctor``: what is wrong with an archive, before a week of training finds out."""

import argparse
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from tqdm import tqdm

from common.data_config import add_data_arguments, make_datamodule
from common.errors import DataError
from common.faults import Fault, FaultLedger, SampleFaultError
from common.reporting import say
from datamodules.cache import VolumeCache, say_cache
from datamodules.cases import Case, Layout
from datamodules.prepare import native_space, prepare_case
from datamodules.volume_io import Header, VolumeError, read_header

if TYPE_CHECKING:
    from datamodules.volumes import VolumeDataModule


class Findings(NamedTuple):
    """What was found in one case.

    Attributes:
        faults: What is broken.
        sums: Check sum to path of every image file that was read to its end.
        usable: Whether anything is left to train on.
    """

    faults: list[Fault]
    sums: dict[str, str]
    usable: bool


def _headers(case: Case, paths: dict[str, str]) -> Iterator[tuple[str, Header | Fault]]:
    for name, path in paths.items():
        try:
            yield name, read_header(case.images.get(name) or case.labels[name])
        except VolumeError as error:
            yield name, Fault(path, error.kind, error.detail, case.case_id)


def check_headers(case: Case, layout: Layout, labels: bool) -> Findings:
    """Look at the headers of a case: readable, three axes, on one grid where the layout needs one."""
    paths = {name: str(path) for name, path in case.images.items() if name in layout.modalities}
    paths |= {name: str(path) for name, path in case.labels.items() if labels}
    found = dict(_headers(case, paths))
    faults = [entry for entry in found.values() if isinstance(entry, Fault)]
    headers = {name: entry for name, entry in found.items() if isinstance(entry, Header)}
    if layout.preprocessing.reference is None and headers:
        votes = Counter(entry.shape for entry in headers.values())
        shape, _ = votes.most_common(1)[0]
        affine = next(entry.affine for entry in headers.values() if entry.shape == shape)
        for name, entry in headers.items():
            if entry.shape != shape or not np.allclose(entry.affine, affine, atol=1e-2):
                detail = f"its grid of {entry.shape} differs from the others' {shape} in size or place"
                faults.append(Fault(paths[name], "grid", detail, case.case_id))
    if (
        layout.preprocessing.atlas is not None
        and headers
        and (reason := native_space(next(iter(headers.values())).affine))
    ):
        return Findings(
            [*faults, Fault(case.case_id, "space", f"not in atlas space: {reason}", case.case_id)], {}, False
        )
    reference = layout.preprocessing.reference
    if reference is not None and reference not in case.images:
        faults.append(Fault(case.case_id, "missing", f"the case has no {reference}", case.case_id))
    readable = [name for name in headers if name in case.images]
    usable = reference in readable if reference is not None else bool(readable)
    return Findings(faults, {}, usable and not (labels and any(name not in headers for name in case.labels)))


def check_bytes(case: Case, layout: Layout, labels: bool) -> Findings:
    """Read every byte of a case and prepare it as training would."""
    try:
        prepared = prepare_case(case, layout, layout.modalities)
    except SampleFaultError as error:
        return Findings(error.faults, {}, usable=False)
    images = {str(path) for path in case.images.values()}
    sums = {source["xxh3"]: path for path, source in prepared.sources.items() if path in images and "xxh3" in source}
    label_faults = prepared.label_faults if labels else []
    return Findings([*prepared.faults, *label_faults], sums, usable=not label_faults)


def find_copies(findings: Sequence[tuple[Case, Findings]]) -> list[list[str]]:
    """Return groups of files of different patients that are equal byte by byte."""
    owners: dict[str, dict[str, str]] = defaultdict(dict)
    for case, found in findings:
        for checksum, path in found.sums.items():
            owners[checksum].setdefault(case.patient_id, path)
    return [list(group.values()) for group in owners.values() if len(group) > 1]


def examine(datamodule: "VolumeDataModule", deep: bool, workers: int) -> list[str]:
    """Print a report on an archive and return the reasons why training would refuse it."""
    layout = datamodule.index()
    cases = datamodule.cases_in_use()
    say(f"layout {layout.name}: {len(cases)} cases of {len({c.patient_id for c in cases})} patients, "
        + ", ".join(f"{len(part)} {name}" for name, part in datamodule.splits.items()))  # fmt: skip
    counts = {name: sum(name in case.images for case in cases) for name in layout.modalities}
    say("modalities: " + ", ".join(f"{name} in {count}" for name, count in counts.items())
        + f"; labels in {sum(bool(case.labels) for case in cases)}")  # fmt: skip
    check = check_bytes if deep else check_headers
    with ThreadPoolExecutor(workers) as pool:
        results = pool.map(lambda case: check(case, layout, datamodule.labels), cases)
        title = "reading every byte" if deep else "reading headers"
        findings = list(zip(cases, tqdm(results, total=len(cases), desc=title, unit="case"), strict=True))
    ledger = FaultLedger(datamodule.ledger.max_fraction, datamodule.ledger.anonymise)
    ledger.num_samples = len(cases)
    ledger.add(fault for _, found in findings for fault in found.faults)
    reasons = []
    lost = {case.case_id for case, found in findings if not found.usable}
    split = datamodule.splits["train"]
    if split and all(case.case_id in lost for case in split):
        reasons.append("no case of the training split can be used")
    samples = len(split) * datamodule.crops_per_case
    if 0 < samples < datamodule.batch_size:
        reasons.append(f"the training split gives {samples} samples, fewer than one batch of {datamodule.batch_size}")
    if ledger.num_faulty:
        say(f"faults: {ledger.num_faulty} of {len(cases)} cases. {ledger.describe()}")
        if ledger.num_faulty > ledger.limit:
            reasons.append(f"{ledger.num_faulty} faulty cases, more than the {ledger.limit:g} that are tolerated")
    else:
        say("faults: none" + ("" if deep else " in the headers; only a deep examination reads the voxels"))
    if copies := find_copies(findings):
        reasons.append(f"{len(copies)} files occur in several patients, first {' = '.join(copies[0])}")
    for name in [name for name, part in datamodule.splits.items() if not part and name != "test"]:
        reasons.append(f"the {name} split is empty") if name == "train" else say(f"note: the {name} split is empty")
    if isinstance(datamodule.store, VolumeCache):
        say_cache(datamodule.store.estimated_bytes(cases), datamodule.store.folder)
    return reasons


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``medmim doctor``."""
    add_data_arguments(parser)
    parser.add_argument("--deep", action="store_true", help="read every byte, check every check sum and voxel")
    parser.add_argument("--workers", type=int, default=4, help="threads (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Carry out ``medmim doctor``.

    Raises:
        DataError: training would refuse this archive.
    """
    reasons = make_datamodule(args).examine(args.deep, args.workers)
    if reasons:
        raise DataError(f"Training would refuse this archive: {'; '.join(reasons)}.")
    say("training would accept this archive")
