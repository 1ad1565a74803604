"""Captions and images of ROCO or of any archive of images with texts, for retrieval."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import DataError
from common.randomness import numpy_generator, stable_hash
from datamodules.configs import SplitConfig
from datamodules.loading import Draw, ResumableLoader
from datamodules.pairs.datamodule import PairDataModule, PairDataset
from datamodules.reports.studies import CaptionedImage, Study, studies_of
from datamodules.reports.text import Extract, extract_of
from datamodules.splits import SPLITS, assign_splits


def captioned_images(studies: Sequence[Study], extract: Extract) -> list[CaptionedImage]:
    """Keep the first text of each image."""
    found: dict[Path, CaptionedImage] = {}
    for study in studies:
        if study.images and isinstance(study.text, str):
            text = extract(study.text, "full", False)
            image = study.images[0]
            found.setdefault(image, CaptionedImage(study.case_id, study.patient_id, image, text, study.split))
    return [item for item in found.values() if item.text]


@dataclass(frozen=True)
class PoolConfig:
    """How many captions and images are told apart.

    Args:
        candidates: Texts of a training image, its own first.
        size: Images of the test pool, at most, drawn the same every time.
        val_size: Images of the validation pool, at most.

    Raises:
        ValueError: fewer than two candidates.
    """

    candidates: int = 16
    size: int = 2000
    val_size: int = 2000

    def __post_init__(self) -> None:
        if self.candidates < 2:
            raise ValueError(f"`candidates` must be at least 2, a caption and another one, got {self.candidates}.")


class RetrievalDataModule(PairDataModule):
    """Images with captions; each training image comes with its caption and others.

    Validation and test are pools of distinct images, every one read once on every rank: recalls are over all pairs.

    Args:
        root: The archive.
        layout: Name of its layout; ``"auto"`` recognises it from the tree.
        pools: How many captions and images are told apart.
        split: Who is trained, validated and tested on.
        **settings: Those of :class:`datamodules.pairs.datamodule.PairDataModule`.
    """

    item_name = "images with captions"
    needs = frozenset({"images", "text"})

    def __init__(
        self,
        root: str,
        layout: str = "auto",
        pools: PoolConfig = PoolConfig(),
        split: SplitConfig = SplitConfig(),
        **settings: Any,
    ) -> None:
        super().__init__(root, **settings)
        self._layout, self._candidates = layout, pools.candidates
        self._pools = {"val": pools.val_size, "test": pools.size}
        self._split = (split.fractions, split.seed, split.file)

    def find(self, root: str) -> dict[str, list[CaptionedImage]]:
        """List the images with captions by split; validation and test are cut to their pools.

        Raises:
            DataError: an unknown layout, a damaged table, or fewer captions than candidates.
        """
        archive = self.open(root, self._layout)
        self.layout_name = archive.layout.name
        items = captioned_images(studies_of(archive), extract_of(archive))
        parts = assign_splits(items, *self._split, cut_validation=True)
        splits = {name: [item for item in items if parts.get(item.case_id) == name] for name in SPLITS}
        for name, size in self._pools.items():
            order = sorted(splits[name], key=lambda item: stable_hash("pool", item.case_id))[:size]
            splits[name] = sorted(order)
        if len(splits["train"]) < self._candidates:
            raise DataError(
                f"{root} has {len(splits['train'])} training captions, fewer than the {self._candidates} candidates."
            )
        self.archive = archive
        return splits

    def facts(self, pair: CaptionedImage, draw: Draw) -> Mapping[str, Any]:
        """Return nothing: only training has further candidates."""
        return {}

    def training_facts(self, pair: CaptionedImage, draw: Draw) -> Mapping[str, Any]:
        """Return the tokens of the true caption and of others that are not of the same image."""
        train = self.splits["train"]
        generator = numpy_generator("candidates", self.seed, draw.epoch, pair.case_id, draw.draw)
        texts = [pair.text]
        for index in generator.permutation(len(train)):
            other = train[int(index)]
            if other.image != pair.image:
                texts.append(other.text)
            if len(texts) == self._candidates:
                break
        return {"candidate_ids": [self.encode(text) for text in texts]}

    def _dataset(self, cases: Sequence[Any], train: bool = False) -> PairDataset:
        made = super()._dataset(cases, train)
        made.facts = self.training_facts if train else self.facts
        return made

    def val_dataloader(self) -> ResumableLoader:
        """Return the whole validation pool, on every rank (Lightning hook)."""
        return self.evaluation_loader(self._dataset(self._usable(self.splits["val"])), all_ranks=False)

    def test_dataloader(self) -> ResumableLoader:
        """Return the whole test pool, on every rank (Lightning hook).

        Raises:
            DataError: it is empty.
        """
        return self.evaluation_loader(self._dataset(self.test_cases()), all_ranks=False)
