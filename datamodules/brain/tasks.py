"""Labelled brain archives for fine-tuning after BrainMVP: volumes with regions, or with classes."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from common.errors import DataError
from common.pseudonyms import public_name
from common.types import InputSpec
from datamodules.brain.archive import BrainArchiveDataModule
from datamodules.brain.labels import LabelSource, label_tables, read_classes
from datamodules.loading import ResumableLoader
from datamodules.volumes.cases import Case, Layout
from datamodules.volumes.modalities import with_modalities


class BrainTaskDataModule(BrainArchiveDataModule):
    """Volumes of one source under canonical sequence names, prepared as for pre-training.

    Args:
        root: The archive.
        modalities: Sequences in any usual spelling; None takes those of the layout that its cases have.
        cohort: Challenge of BraTS 2023 whose studies are used, such as PED; None takes all.
        **options: As :class:`datamodules.brain.archive.BrainArchiveDataModule`.
    """

    def __init__(
        self, root: str, modalities: list[str] | None = None, cohort: str | None = None, **options: Any
    ) -> None:
        super().__init__(root, modalities=modalities, **options)
        self.cohort = cohort

    def settle(self, layout: Layout) -> Layout:
        """Settle the sequences: those asked for, or those of the layout that any case has.

        Where the layout does not know the label's values, those of the regions and 0 are all that may occur.

        Raises:
            DataError: there is no study of the cohort, or none with a sequence that is asked for.
        """
        if self.cohort is not None:
            self.cases = self._of_cohort(self.cohort)
        layout = super().settle(layout)
        present = {name for case in self.cases for name in case.images}
        wanted = self._modalities or [name for name in layout.modalities if name in present]
        settled = with_modalities(layout, self.cases, wanted)
        if self._regions and not settled.label_values:
            values = frozenset({0, *(value for region in self._regions.values() for value in region)})
            settled = replace(settled, label_values=values)
        atlas = self.atlas if layout.preprocessing.atlas is not None else None
        intensity = dict.fromkeys(settled.modalities, "percentile_5_95")
        return replace(settled, preprocessing=replace(settled.preprocessing, intensity=intensity, atlas=atlas))

    def _of_cohort(self, cohort: str) -> list[Case]:
        start = f"BraTS-{cohort}-"
        kept = [case for case in self.cases if case.case_id.lower().startswith(start.lower())]
        if not kept:
            example = public_name(self.cases[0].case_id)
            raise DataError(f"No study under {self.root} is called {start}..., such as {example} is; "
                            f"to use every study, set data.cohort to null.")  # fmt: skip
        return kept


class BrainClassDataModule(BrainTaskDataModule):
    """Volumes with a class each: random crops to train on, central ones to score.

    Args:
        root: The archive.
        classes: Where the classes come from; see :class:`datamodules.brain.labels.LabelSource`.
        resize: Voxels that every volume is interpolated to.
        **options: As :class:`BrainTaskDataModule`.
    """

    def __init__(
        self, root: str, classes: LabelSource, resize: tuple[int, int, int] | None = (128, 128, 64), **options: Any
    ) -> None:
        super().__init__(root, **options)
        self._source, self._resize = classes, resize

    def settle(self, layout: Layout) -> Layout:
        """Prepare for classification: 1 mm, 1st to 99th percentile, one size."""
        settled = super().settle(layout)
        preparation = replace(
            settled.preprocessing,
            intensity=dict.fromkeys(settled.modalities, "percentile_1_99"),
            crop_foreground=False,
            centered=False,
            atlas=None,
            resize=self._resize,
        )
        return replace(settled, preprocessing=preparation)

    def _read_targets(self) -> dict[str, int] | None:
        assert self.archive is not None
        tables = label_tables(self._source, self.archive.tree)
        self.archive.tables = [*self.archive.tables, *map(str, tables)]
        return read_classes(self.cases, self._source, tables)

    @property
    def input_spec(self) -> InputSpec:
        """As every archive's, with the names of the classes."""
        return super().input_spec._replace(classes=tuple(self._source.classes))

    def class_counts(self) -> list[int]:
        """Return how many training cases each class has."""
        targets = [(self.targets or {})[case.case_id] for case in self.splits["train"]]
        return [targets.count(index) for index in range(len(self._source.classes))]

    def _evaluated(self, cases: Sequence[Case]) -> ResumableLoader:
        return self.evaluation_loader(self._dataset(self._usable(cases), "center"))

    def train_dataloader(self) -> ResumableLoader:
        """Return the training crops (Lightning hook)."""
        return self.train_loader(self._dataset(self.splits["train"], "train"), self.crops_per_case)

    def val_dataloader(self) -> ResumableLoader:
        """Return central crops of the validation split (Lightning hook)."""
        return self.validation_loader(self._dataset(self._usable(self.splits["val"]), "center"))

    def test_dataloader(self) -> ResumableLoader:
        """Return central crops of the test split (Lightning hook).

        Raises:
            DataError: the test split is empty.
        """
        if not self._usable(self.splits["test"]):
            raise DataError(f"There is no case to test on under {self.root}: none is in the test split.")
        return self._evaluated(self.splits["test"])

    def predict_dataloader(self) -> ResumableLoader:
        """Return central crops of the test split, or of all cases where nothing is set aside (Lightning hook)."""
        return self._evaluated(self.splits["test"] or self.cases_in_use())
