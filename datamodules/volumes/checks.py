"""What ``medmim doctor`` checks in an archive of volumes."""

from collections import Counter
from collections.abc import Iterator

import numpy as np

from common.faults import Fault, SampleFaultError
from common.runtime.reporting import print_line
from datamodules.examination import Member, Terms, look_at_all, print_splits, report_faults
from datamodules.volumes.cases import Case, Layout
from datamodules.volumes.headers import VolumeError
from datamodules.volumes.prepare import native_space, prepare_case
from datamodules.volumes.reading import Header, read_header
from datamodules.volumes.voxels import VoxelConfig


def _headers(case: Case, paths: dict[str, str], voxels: VoxelConfig) -> Iterator[tuple[str, Header | Fault]]:
    for name, path in paths.items():
        try:
            yield name, read_header(case.images.get(name) or case.labels[name], voxels, case.places.get(name))
        except VolumeError as error:
            yield name, Fault(path, error.kind, error.detail, case.case_id)


def check_headers(case: Case, layout: Layout, labels: bool) -> Member:
    """Check the headers of a case: readable, three axes, and on one grid where the layout needs it."""
    paths = {name: str(path) for name, path in case.images.items() if name in layout.modalities}
    paths |= {name: str(path) for name, path in case.labels.items() if labels}
    found = dict(_headers(case, paths, layout.preprocessing.voxels))
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
        native = Fault(case.case_id, "space", f"not in atlas space: {reason}", case.case_id)
        return Member(case.case_id, case.patient_id, [*faults, native], usable=False)
    reference = layout.preprocessing.reference
    if reference is not None and reference not in case.images:
        faults.append(Fault(case.case_id, "missing", f"the case has no {layout.shown(reference)}", case.case_id))
    readable = [name for name in headers if name in case.images]
    usable = reference in readable if reference is not None else bool(readable)
    usable = usable and not (labels and any(name not in headers for name in case.labels))
    return Member(case.case_id, case.patient_id, faults, usable=usable)


def check_bytes(case: Case, layout: Layout, labels: bool) -> Member:
    """Read every byte of a case and prepare it as training would."""
    try:
        prepared = prepare_case(case, layout, layout.modalities)
    except SampleFaultError as error:
        return Member(case.case_id, case.patient_id, error.faults, usable=False)
    images = {str(path) for path in case.images.values()}
    sums = {source["xxh3"]: path for path, source in prepared.sources.items() if path in images and "xxh3" in source}
    label_faults = prepared.label_faults if labels else []
    return Member(case.case_id, case.patient_id, [*prepared.faults, *label_faults], sums, not label_faults)


def examine(layout: Layout, terms: Terms, labels: bool, deep: bool, workers: int) -> list[str]:
    """Print a report on an archive and return the reasons why training would refuse it.

    Args:
        layout: Its layout, with resolved modalities.
        terms: What training requires.
        labels: Whether training needs labels.
        deep: Whether to read every byte, not only headers.
        workers: Threads.
    """
    cases = terms.members
    print_splits(f"layout {layout.name}", terms, "cases")
    counts = {name: sum(name in case.images for case in cases) for name in layout.modalities}
    print_line("modalities: " + ", ".join(f"{layout.shown(name)} in {count}" for name, count in counts.items())
        + f"; labels in {sum(bool(case.labels) for case in cases)}")  # fmt: skip
    check = check_bytes if deep else check_headers
    found = look_at_all(lambda case: check(case, layout, labels), cases, deep, workers, "voxel")
    return report_faults(terms, found, "cases", deep, "voxel")
