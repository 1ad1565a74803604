"""The known layouts, and which of them a root is."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import DataError
from common.runtime.reporting import contents
from datamodules.genetics.layout import PictureLayout
from datamodules.genetics.tcga import TCGA
from datamodules.genetics.ukb import UKB
from datamodules.labelled.fundus import APTOS, EYEPACS, IDRID, RFMID
from datamodules.labelled.palm import PALM
from datamodules.pairs.vqa import QUESTION_LAYOUTS
from datamodules.reports.manifest import COVID_CXR, MANIFEST
from datamodules.reports.medicat import MEDICAT, MEDICAT_ALL
from datamodules.reports.melinda import MELINDA
from datamodules.reports.mimic_cxr import MIMIC_CXR
from datamodules.reports.open_i import OPEN_I
from datamodules.reports.roco import MEDICAT_ROCO, ROCO
from datamodules.reports.studies import StudyLayout
from datamodules.volumes.brats import BRATS2021, BRATS2023
from datamodules.volumes.cases import Layout
from datamodules.volumes.folder import FOLDER, LUNG
from datamodules.volumes.pi_cai import PI_CAI

VOLUME_LAYOUTS: tuple[Layout, ...] = (BRATS2023, BRATS2021, PI_CAI, LUNG, FOLDER)
STUDY_LAYOUTS: tuple[StudyLayout, ...] = (
    MIMIC_CXR,
    OPEN_I,
    COVID_CXR,
    MANIFEST,
    MEDICAT,
    MEDICAT_ALL,
    ROCO,
    MEDICAT_ROCO,
    MELINDA,
    *(layout.for_calibration() for layout in QUESTION_LAYOUTS),
)
PICTURE_LAYOUTS: tuple[PictureLayout, ...] = (UKB, TCGA, IDRID, APTOS, EYEPACS, RFMID, PALM)


def recognise(root: str | Path, layout: str = "auto", known: Sequence[Any] = VOLUME_LAYOUTS) -> tuple[Any, list[Any]]:
    """Find out which layout a root has, and list its cases or studies.

    Args:
        root: The archive.
        layout: A layout's name, or ``"auto"``.
        known: The layouts to choose from, of volumes or of studies.

    Raises:
        DataError: the root does not exist, is of no known layout, of several, or not of the one asked for.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise DataError(f"The data root {root} is not a folder.")
    by_name = {candidate.name: candidate for candidate in known}
    trees = "; ".join(f"{candidate.name}: {candidate.tree}" for candidate in known)
    if layout != "auto":
        if layout not in by_name:
            raise DataError(f"There is no layout {layout!r}; known are {', '.join(by_name)}.")
        cases = by_name[layout].find(root)
        if not cases:
            tree = by_name[layout].tree
            raise DataError(f"{root} is not of the layout {layout} ({tree}); it holds {contents(root)}.")
        return by_name[layout], cases
    matches = [(candidate, cases) for candidate in known if (cases := candidate.recognised(root))]
    if not matches:
        raise DataError(f"{root} is of no known layout. It holds {contents(root)}. Known layouts: {trees}.")
    best = max(candidate.prefer for candidate, _ in matches)
    matches = [match for match in matches if match[0].prefer == best]
    if len(matches) > 1:
        names = ", ".join(candidate.name for candidate, _ in matches)
        raise DataError(f"{root} could be of several layouts ({names}): choose one with LAYOUT=.")
    return matches[0][0], matches[0][1]
