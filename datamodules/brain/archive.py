"""What all data modules of brain studies share: their layouts, and a check that no scan occurs under two names."""

from dataclasses import replace
from typing import Any

from common.modalities import TEMPLATES, canonical_name
from common.runtime.reporting import print_line
from datamodules.brain.overlap import check_copies, overlap_notes
from datamodules.registry import Archive
from datamodules.volumes.cases import Layout
from datamodules.volumes.datamodule import CropConfig, VolumeDataModule
from datamodules.volumes.profiles import ATLAS

#: Regions of a glioma in the order of BrainMVP's channels.
_REGIONS = ("TC", "WT", "ET")


class BrainArchiveDataModule(VolumeDataModule):
    """Brain studies under canonical sequence names, for pre-training or a task.

    Known overlap between sources is noted; overlap that would put the same scans on both sides of the split is
    refused.

    Args:
        root: The archive.
        atlas: Voxels of the atlas at 1 mm, the space of the templates.
        crops: How crops are cut from a volume. ``flip_axes`` must be empty: the templates lie in the atlas, which has a
            left and a right.
        **options: As :class:`datamodules.volumes.datamodule.VolumeDataModule`.
    """

    default_profile = "brain_atlas"

    def __init__(
        self,
        root: str,
        atlas: tuple[int, int, int] = ATLAS,
        crops: CropConfig = CropConfig(flip_axes=(), overhang=0.0),
        **options: Any,
    ) -> None:
        super().__init__(root, crops=crops, **options)
        if crops.flip_axes:
            raise ValueError("crops.flip_axes must be empty: templates lie in the atlas, which has a left and a right; "
                             "fine-tuning mirrors crops and templates together.")  # fmt: skip
        self.atlas = atlas

    def prepare_layout(self, archive: Archive) -> Layout:
        """Return the archive's files and preprocessing, with channels under canonical names."""
        layout = super().prepare_layout(archive)
        names = layout.modalities
        if not names or any(canonical_name(name) != name for name in names):
            names = TEMPLATES
        known = [name for name in _REGIONS if name in layout.regions]
        regions = {name: layout.regions[name] for name in known} | dict(layout.regions)
        rules = dict.fromkeys(names, "percentile_5_95")
        return replace(
            layout,
            modalities=names,
            regions=regions,
            preprocessing=replace(layout.preprocessing, intensity=rules),
        )

    def resolve_layout(self, layout: Layout) -> Layout:
        """Note which sources share patients.

        Raises:
            DataError: both BraTS 2021 and BraTS 2023-GLI are present.
        """
        for note in overlap_notes(self.cases):
            print_line(f"note: {note}")
        return layout

    def setup(self, stage: str) -> None:
        """Set up as every archive, and refuse a study listed under two names (Lightning hook).

        Raises:
            DataError: no study can be used, or one occurs twice.
        """
        super().setup(stage)
        check_copies(self.cases_in_use(), self.store)
