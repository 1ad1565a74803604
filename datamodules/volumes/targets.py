"""Volumes with what a person wants predicted of each: classes, grades, findings or numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from common.types import InputSpec
from datamodules.loading import ResumableLoader
from datamodules.targets import (
    TargetColumns,
    Targets,
    heeding,
    kind_of,
    learn_targets,
    merged,
    read_texts,
    refuse,
    strata_of_texts,
)
from datamodules.volumes.cases import Case, Layout
from datamodules.volumes.datamodule import VolumeDataModule


class TargetVolumeDataModule(VolumeDataModule):
    """Volumes of any archive with targets: crops at random places to train on, central ones to score.

    Args:
        root: The archive.
        target: What is predicted.
        resize: Voxels along R, A, S that every volume is interpolated to, so that crops of about this size show all of
            it; None keeps voxels as they are, and a crop may miss what the target is about.
        **options: Those of :class:`datamodules.volumes.datamodule.VolumeDataModule`.
    """

    def __init__(
        self,
        root: str,
        target: TargetColumns = TargetColumns(),
        resize: tuple[int, int, int] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(root, **options)
        self.columns, self._resize = heeding(target, self.said.get("targets", {})), resize
        self.learned = Targets("classes", (), {}, [])
        self._read: tuple[list[str], Any, dict[str, tuple[str, ...]]] | None = None

    @classmethod
    def target_options(cls, own: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any] | None:
        """Take all that the archive file says: :func:`datamodules.targets.heeding` chooses."""
        return {}

    @property
    def needs(self) -> frozenset[str]:
        """Volumes, with targets where no table gives them."""
        said = self.columns.file or self.columns.names or self.said.get("targets")
        return frozenset({"volumes"} if self.predicting or said else {"volumes", "targets"})

    def resolve_layout(self, layout: Layout) -> Layout:
        """Resolve channels and preprocessing, with one size for all volumes where that is wanted."""
        resolved = super().resolve_layout(layout)
        if self._resize is None:
            return resolved
        return replace(resolved, preprocessing=replace(resolved.preprocessing, resize=self._resize))

    def _texts(self) -> tuple[list[str], Any, dict[str, tuple[str, ...]]]:
        """Return columns, kind and texts of the targets, read once."""
        if self._read is None:
            assert self.archive is not None
            facts = {case.case_id: case.attributes for case in self.cases}
            usual = {name for record in self.archive.records for name in record.targets}
            names, texts = read_texts(self.columns, self.cases, facts, sorted(usual))
            kind = kind_of(self.columns, names, texts)
            self._read = names, kind, merged(self.columns, kind, texts)
        return self._read

    def _strata(self) -> Mapping[str, str] | None:
        _, kind, texts = self._texts()
        return strata_of_texts(kind, texts, self.cases)

    def _read_targets(self, parts: Mapping[str, str]) -> dict[str, Any]:
        names, kind, texts = self._texts()
        self.learned = learn_targets(self.columns, kind, names, texts, self.cases, parts)
        return dict(self.learned.values)

    def training_targets(self) -> list[tuple[float, ...]]:
        """Return the targets of the training cases, NaN = unknown."""
        return [self.learned.values[case.case_id] for case in self.splits["train"]]

    @property
    def input_spec(self) -> InputSpec:
        """As of every archive, with what is learned."""
        spec = super().input_spec
        return spec if self.predicting else spec._replace(
            classes=self.learned.names, target={"kind": self.learned.kind}
        )  # fmt: skip

    def setup(self, stage: str) -> None:
        """As of every archive; targets that cannot be learned are refused (Lightning hook)."""
        self.index()
        if stage == "fit":
            refuse(self.learned.problems)
        super().setup(stage)

    def examine(self, deep: bool, workers: int) -> list[str]:
        """Print a report on the archive and return the reasons why training would refuse it."""
        return [*super().examine(deep, workers), *self.learned.problems]

    def _central(self, cases: Sequence[Case]) -> ResumableLoader:
        return self.evaluation_loader(self._dataset(self._usable(cases), "center"))

    def train_dataloader(self) -> ResumableLoader:
        """Return the training crops (Lightning hook)."""
        crops = self._dataset(self.splits["train"], "train", flip_axes=self.flip_axes)
        return self.train_loader(crops, self.crops_per_case)

    def val_dataloader(self) -> ResumableLoader:
        """Return central crops of the validation split (Lightning hook)."""
        return self._central(self.splits["val"])

    def predict_dataloader(self) -> ResumableLoader:
        """Return central crops of the test split, or of all cases where nothing is set aside (Lightning hook)."""
        return self._central(self.splits["test"] or self.cases_in_use())
