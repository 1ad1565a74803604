"""Labelled 2D images for classification: a data module for all layouts of :mod:`datamodules.labelled.layout`."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.errors import DataError
from common.faults import SampleFaultError
from common.pseudonyms import pseudonym
from common.randomness import numpy_generator
from common.runtime.reporting import print_line
from common.types import InputSpec
from datamodules.base import FaultTolerantDataset
from datamodules.configs import CacheConfig, Channelwise, ImageConfig, LoaderConfig, SplitConfig, check_crop_scale
from datamodules.images.cache import BoxChoice, ImageCache, SourceImages
from datamodules.images.crops import center_box, random_box
from datamodules.images.datamodule import ImageArchiveDataModule
from datamodules.images.reading import CHANNELS, GRAY, per_channel, plain_numbers
from datamodules.labelled.checks import examine
from datamodules.labelled.layout import LabelLayout, LabelledImage, as_archive
from datamodules.loading import Draw, ResumableLoader
from datamodules.splits import (
    SPLITS,
    assign_splits,
    check_unique,
    fold_of_each,
    joined_groups,
    nested_fraction,
    seeded_split,
)
from datamodules.tree import Tree


class LabelledImageDataset(FaultTolerantDataset):
    """Crops of images with their targets.

    Args:
        images: The images.
        store: Opens them.
        image_size: Height and width of a crop.
        train: Whether crops are drawn anew every epoch; otherwise they are central.
        seed: Seed of the training draws.
        crop_scale: Area of a training crop as a share of the image.
        flip: Whether half of the training crops are mirrored.
        mean: Subtracted from pixels in [0, 1].
        std: Divisor after that.
        anonymise: Whether subjects get pseudonyms.
        degrees: Largest rotation of training crops.
    """

    def __init__(
        self,
        images: Sequence[LabelledImage],
        store: ImageCache | SourceImages,
        image_size: Sequence[int],
        train: bool,
        seed: int,
        crop_scale: Sequence[float] = (0.08, 1.0),
        flip: bool = True,
        mean: Channelwise = 0.0,
        std: Channelwise = 1.0,
        anonymise: bool = False,
        degrees: float = 0.0,
    ) -> None:
        super().__init__(seed)
        self.images, self.store = list(images), store
        self.image_size, self.train = tuple(image_size), train
        self.crop_scale, self.flip, self.degrees = tuple(crop_scale), flip, degrees
        self.mean, self.std = per_channel(mean), per_channel(std)
        self.anonymise = anonymise

    def __len__(self) -> int:
        return len(self.images)

    def subject(self, index: int) -> str:
        """Return the image's name."""
        return self.images[index].case_id

    def generator(self, draw: Draw) -> np.random.Generator:
        """Return the random generator of a draw."""
        return numpy_generator("crop", self.seed, draw.epoch, self.subject(draw.index), draw.draw)

    def names(self, item: LabelledImage) -> dict[str, str]:
        """Return the names that come with a sample."""
        hide = pseudonym if self.anonymise else str
        return {"subject_id": hide(item.case_id), "patient_id": hide(item.patient_id)}

    def crop(
        self, item: LabelledImage, choose: BoxChoice, size: Sequence[int], mirror: bool, degrees: float = 0.0
    ) -> Tensor:
        """Cut the box that ``choose`` selects from an image, ``(C, *size)`` in [0, 1].

        Raises:
            SampleFaultError: the image cannot be used.
        """
        try:
            return self.store.crop(item.image, choose, size, mirror, degrees)
        except SampleFaultError as error:
            raise SampleFaultError(fault._replace(sample=item.case_id) for fault in error.faults) from error

    def read(self, draw: Draw) -> dict[str, Any]:
        """Return one sample; see :class:`common.types.LabelledBatch`.

        Raises:
            SampleFaultError: the image cannot be used.
        """
        item = self.images[draw.index]
        choose: BoxChoice = partial(center_box, size=self.image_size)
        mirror, degrees = False, 0.0
        if self.train:
            generator = self.generator(draw)
            mirror = self.flip and generator.random() < 0.5
            if self.crop_scale != (1.0, 1.0):
                choose = partial(random_box, scale=self.crop_scale, generator=generator)
            degrees = generator.uniform(-1, 1) * self.degrees if self.degrees else 0.0
        image = self.crop(item, choose, self.image_size, mirror, degrees)
        target = torch.tensor(item.targets, dtype=torch.float32)
        known = ~target.isnan()
        return {
            "image": (image - self.mean) / self.std,
            "target": target.where(known, torch.zeros(())),
            "target_mask": known,
            **self.names(item),
        }


def strata_of(images: Sequence[LabelledImage]) -> dict[str, str]:
    """Return a stratum per patient: the rarest class among their images, or none."""
    patients: dict[str, NDArray[np.bool_]] = {}
    for item in images:
        positive = np.array([target == 1 for target in item.targets], dtype=bool)
        patients[item.patient_id] = patients.get(item.patient_id, positive) | positive
    counts = np.sum(list(patients.values()), axis=0) if patients else np.zeros(0)
    rarest = np.argsort(counts, kind="stable")
    return {
        name: str(next((index for index in rarest if positive[index]), "none")) for name, positive in patients.items()
    }


def shuffled_targets(images: Sequence[LabelledImage], seed: int) -> list[LabelledImage]:
    """Give every patient the targets of a random patient's first image: a control from which nothing can be learned."""
    first: dict[str, tuple[float, ...]] = {}
    for item in images:
        first.setdefault(item.patient_id, item.targets)
    patients = sorted(first)
    others = numpy_generator("shuffled targets", seed).permutation(patients)
    given = {name: first[str(other)] for name, other in zip(patients, others, strict=True)}
    return [item._replace(targets=given[item.patient_id]) for item in images]


@dataclass(frozen=True)
class LabelledImageConfig(ImageConfig):
    """Crops of labelled images.

    Args:
        crop_scale: Area of a training crop as a share of the image.
        flip: Whether half of the training crops are mirrored.
        degrees: Largest rotation of training crops.
    """

    crop_scale: tuple[float, float] = (0.08, 1.0)
    flip: bool = True
    degrees: float = 0.0

    def __post_init__(self) -> None:
        check_crop_scale(self.crop_scale)


@dataclass(frozen=True)
class FoldConfig(SplitConfig):
    """Which patients train, validate and test: one split, or a fold of a cross-validation.

    Args:
        fold: Number of the test fold, from 0: cross-validation instead of any other split. No patient and no group of
            the layout is in two folds; validation patients are taken from the other folds.
        num_folds: How many folds there are.

    Raises:
        ValueError: no such fold, or a split file is given as well.
    """

    fold: int | None = None
    num_folds: int = 5

    def __post_init__(self) -> None:
        if self.fold is not None and not 0 <= self.fold < self.num_folds:
            raise ValueError(f"`fold` counts from 0 to num_folds - 1 = {self.num_folds - 1}, got {self.fold}.")
        if self.fold is not None and self.file is not None:
            raise ValueError("`split.fold` and `split.file` both define the test split: set one of them to null.")


@dataclass(frozen=True)
class ShuffleConfig:
    """Meaningless targets, as a control.

    Args:
        seed: Seed of a permutation of the targets over patients; None: no permutation.
        tested: Whether targets of test images are permuted as well; otherwise they and the split stay true.
    """

    seed: int | None = None
    tested: bool = True


class LabelledImageDataModule(ImageArchiveDataModule):
    """Labelled images in any layout of :mod:`datamodules.labelled.layout`, cached and split by patient.

    Args:
        root: The archive.
        labels: Its layout.
        image: The crops, and how training crops vary.
        cache: The cache of images.
        split: Which patients train, validate and test. If an archive defines training but no validation images,
            the latter are taken from the former in the ratio of the first two fractions.
        label_fraction: Share of training patients to use, equally from every class; shares are nested.
        shuffle: A permutation of the targets, as a control.
        loader: How samples are drawn, and how many may be faulty.
        batch_size: Images per device.
        num_workers: Loader processes per rank; also threads that build the cache.
        anonymise: Whether subjects get pseudonyms in logs, tables and fault files.
        seed: Seed of order and crops; None takes ``seed_everything``'s.
        **membership: ``seen_patients``, ``changed_archive`` and ``split_from`` of
            :class:`datamodules.base.ArchiveDataModule`.
    """

    item_name = "images"

    def __init__(
        self,
        root: str,
        labels: LabelLayout,
        image: LabelledImageConfig = LabelledImageConfig(),
        cache: CacheConfig = CacheConfig(),
        split: FoldConfig = FoldConfig((0.7, 0.1, 0.2)),
        label_fraction: float = 1.0,
        shuffle: ShuffleConfig = ShuffleConfig(),
        loader: LoaderConfig = LoaderConfig(),
        batch_size: int = 96,
        num_workers: int = 0,
        anonymise: bool = False,
        seed: int | None = None,
        **membership: Any,
    ) -> None:
        super().__init__(
            root,
            image,
            cache,
            loader,
            batch_size=batch_size,
            num_workers=num_workers,
            anonymise=anonymise,
            seed=seed,
            **membership,
        )
        self.labels = labels
        self.crop_scale, self.flip, self.degrees = tuple(image.crop_scale), image.flip, image.degrees
        self.label_fraction = label_fraction
        self.fold, self.num_folds = split.fold, split.num_folds
        self.shuffle_targets, self.shuffle_tested = shuffle.seed, shuffle.tested
        self._split = (split.fractions, split.seed, split.file)
        self.images: list[LabelledImage] = []

    def index(self) -> LabelLayout:
        """List and split the images. Reads names and tables only, no images.

        Raises:
            DataError: another layout, missing columns, a patient in two splits, and the like.
        """
        if not self.splits:
            root = Tree(self.root)
            root.report_content()
            images = self.labels.find(root)
            if not images:
                raise DataError(f"{root} holds no labelled image of {self.labels.name} ({self.labels.tree}).")
            check_unique(images)
            _, split_seed, _ = self._split
            if self.shuffle_targets is not None and self.shuffle_tested:
                images = shuffled_targets(images, self.shuffle_targets)
            strata = strata_of(images)
            seeded = self._split[2] is None and self.fold is None and not any(item.split for item in images)
            setting = self._split if self.fold is None else (*self._split, self.fold, self.num_folds)
            parts = self.place(images, self._parts(images, strata), seeded, setting)
            if self.shuffle_targets is not None and not self.shuffle_tested:
                learned = [item for item in images if parts.get(item.case_id) in ("train", "val")]
                given = {item.case_id: item for item in shuffled_targets(learned, self.shuffle_targets)}
                images = [given.get(item.case_id, item) for item in images]
            splits = {name: [item for item in images if parts.get(item.case_id) == name] for name in SPLITS}
            splits["train"] = nested_fraction(splits["train"], self.label_fraction, split_seed, strata)
            self.ledger.num_samples = sum(map(len, splits.values()))
            self.images, self.splits = images, splits
            self.store = self.make_store(self.labels.reader)
            self.archive = as_archive(self.labels, root, images)
        return self.labels

    def _parts(self, images: Sequence[LabelledImage], strata: Mapping[str, str]) -> dict[str, str]:
        """Return the split of each image."""
        fractions, split_seed, split_file = self._split
        if self.fold is None:
            return assign_splits(images, fractions, split_seed, split_file, strata, cut_validation=True)
        groups = joined_groups([(f"patient {item.patient_id}", item.group) for item in images])
        # Patients that share a group are assigned together, so they count as one.
        joined = [item._replace(patient_id=str(group)) for item, group in zip(images, groups, strict=True)]
        strata = strata_of(joined)
        folds = fold_of_each([strata[item.patient_id] for item in joined], groups, self.num_folds, split_seed)
        tested = {item.case_id for item, fold in zip(joined, folds, strict=True) if fold == self.fold}
        rest = [item for item in joined if item.case_id not in tested]
        share = fractions[1] / (fractions[0] + fractions[1])
        return dict.fromkeys(tested, "test") | seeded_split(rest, (1 - share, share, 0.0), split_seed, strata)

    @property
    def input_spec(self) -> InputSpec:
        """Channels, crop size, classes and preprocessing of the batches."""
        preprocessing = {
            "layout": self.labels.name,
            "intensity": (
                "grayscale in [0, 1], minus mean, over std, repeated three times"
                if self.labels.reader is GRAY
                else "colour in [0, 1], minus mean, over std"
            ),
            "mean": plain_numbers(self.mean),
            "std": plain_numbers(self.std),
            "resize": "bicubic, antialiased",
        }
        return InputSpec(CHANNELS, self.image_size, {}, preprocessing, classes=tuple(self.labels.classes))

    def all_cases(self) -> list[LabelledImage]:
        """Return every labelled image of the archive, whether or not it is used."""
        self.index()
        return self.images

    def images_of(self, case: LabelledImage) -> Sequence[Path]:
        """Return the image."""
        return (case.image,)

    def setup(self, stage: str) -> None:
        """Record broken files in the ledger and log a summary (Lightning hook).

        Raises:
            DataError: no image can be used.
        """
        counts = self.register_faults(stage)
        positive: Counter[str] = Counter()
        for item in self.splits["train"]:
            named = zip(self.labels.classes, item.targets, strict=True)
            positive.update(name for name, target in named if target == 1)
        shares = ", ".join(f"{name} {positive[name]}" for name in self.labels.classes if name in positive)
        print_line(f"data: {self.labels.name} at {self.root}, images {counts}"
            + (f"; positive in training: {shares}" if shares else ""))  # fmt: skip

    def _dataset(self, cases: Sequence[LabelledImage], train: bool = False) -> LabelledImageDataset:
        return LabelledImageDataset(
            cases,
            self.store,
            self.image_size,
            train,
            self.seed,
            crop_scale=self.crop_scale,
            flip=self.flip,
            mean=self.mean,
            std=self.std,
            anonymise=self.ledger.anonymise,
            degrees=self.degrees,
        )

    def predict_dataloader(self) -> ResumableLoader:
        """Return the test images, or all images if there are none (Lightning hook)."""
        return self.evaluation_loader(self._evaluated(self._usable(self.splits["test"] or self.cases_in_use())))

    def examine(self, deep: bool, workers: int) -> list[str]:
        """Print a report on the archive and return the reasons why training would refuse it."""
        labels = self.index()
        return examine(labels.name, labels.classes, self.terms(self.paths_in_use()), deep, workers)
