"""What every data module of brain studies has in common: its layouts, and that no scan is there under two names."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.errors import DataError
from common.runtime.reporting import say
from datamodules.brain.overlap import check_copies, overlap_notes
from datamodules.brain.sequences import CANONICAL, canonical_name
from datamodules.registry import Archive
from datamodules.volumes.cases import Case, Layout, case_of
from datamodules.volumes.datamodule import VolumeDataModule
from datamodules.volumes.profiles import ATLAS

#: Regions of a glioma in the order of BrainMVP's channels.
_REGIONS = ("TC", "WT", "ET")


def canonical_case(case: Case, own: Sequence[str] = ()) -> Case:
    """Return a case with its sequences under canonical names; others are named in the attribute ``unknown``.

    Args:
        case: The case.
        own: Further names that its archive has for certain.

    Raises:
        DataError: two files are one sequence.
    """
    images: dict[str, Path] = {}
    places: dict[str, int] = {}
    unknown = []
    for given, path in case.images.items():
        name = canonical_name(given) or (given if given in own else None)
        if name is None:
            unknown.append(given)
            continue
        if name in images:
            raise DataError(f"{case.case_id} has two files of {name}, {images[name].name} and {path.name}: name one of "
                            f"them under modalities, the other under ignore.")  # fmt: skip
        images[name] = path
        places |= {name: case.places[given]} if given in case.places else {}
    facts = {**case.attributes, "unknown": ", ".join(unknown)} if unknown else case.attributes
    return case._replace(images=images, places=places, attributes=facts)


class BrainArchiveDataModule(VolumeDataModule):
    """Brain studies under canonical sequence names, for pre-training or a task.

    Overlap between sources that is known is said, and what would put the same scans on both sides of the split is
    refused.

    Args:
        root: The archive.
        atlas: Voxels of the atlas at 1 mm; where templates lie.
        overhang: Share of a crop that may reach beyond the brain's box.
        flip_axes: Must be empty: the atlas, in which templates lie, has a left and a right.
        **options: As :class:`datamodules.volumes.datamodule.VolumeDataModule`.
    """

    default_profile = "brain_atlas"

    def __init__(
        self,
        root: str,
        atlas: tuple[int, int, int] = ATLAS,
        overhang: float = 0.0,
        flip_axes: tuple[int, ...] = (),
        **options: Any,
    ) -> None:
        super().__init__(root, overhang=overhang, flip_axes=flip_axes, **options)
        if flip_axes:
            raise ValueError("flip_axes must be empty: templates lie in the atlas, which has a left and a right; "
                             "fine-tuning mirrors crops and templates together.")  # fmt: skip
        self.atlas = atlas

    def list_cases(self, archive: Archive) -> list[Case]:
        """Return the archive's cases under canonical sequence names.

        Raises:
            DataError: two files of a case are one sequence.
        """
        return [canonical_case(case_of(record), archive.facts.modalities) for record in archive.records]

    def prepare_layout(self, archive: Archive) -> Layout:
        """Return what the archive's files are and how they are prepared, its channels under canonical names."""
        layout = super().prepare_layout(archive)
        names = layout.modalities
        if not names or any(canonical_name(name) not in (name, None) for name in names):
            names = CANONICAL
        known = [name for name in _REGIONS if name in layout.regions]
        regions = {name: layout.regions[name] for name in known} | dict(layout.regions)
        rules = dict.fromkeys(names, "percentile_5_95")
        return replace(
            layout,
            modalities=names,
            regions=regions,
            preprocessing=replace(layout.preprocessing, intensity=rules),
        )

    def settle(self, layout: Layout) -> Layout:
        """Say which sources share patients.

        Raises:
            DataError: BraTS 2021 stands beside BraTS 2023-GLI.
        """
        for note in overlap_notes(self.cases):
            say(f"note: {note}")
        return layout

    def setup(self, stage: str) -> None:
        """As every archive; a study that is listed twice under two names is refused (Lightning hook).

        Raises:
            DataError: no study can be used, or one is there twice.
        """
        super().setup(stage)
        check_copies(self.cases_in_use(), self.store)
