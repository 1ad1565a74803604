"""Radiographs with regions to be segmented: whole images at one size, with masks on the grids of their files."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from common.errors import DataError
from common.faults import Fault, FaultLedger, SampleFaultError
from common.losses.focal_dice import IGNORED
from common.runtime.reporting import print_line
from common.types import InputSpec
from datamodules.configs import CacheConfig, ImageConfig, LoaderConfig, SplitConfig
from datamodules.images.crops import Box
from datamodules.images.reading import read_header
from datamodules.images.values import ImageError
from datamodules.labelled.classification import (
    FoldConfig,
    LabelledImageConfig,
    LabelledImageDataModule,
    LabelledImageDataset,
)
from datamodules.labelled.layout import LabelLayout, LabelledImage
from datamodules.labelled.siim import decode_runs
from datamodules.loading import Draw


def fitted_size(shape: Sequence[int], size: Sequence[int]) -> tuple[int, int]:
    """Return the largest height and width with ``shape``'s ratio that fit into ``size``."""
    factor = min(size[0] / shape[0], size[1] / shape[1])
    return max(round(shape[0] * factor), 1), max(round(shape[1] * factor), 1)


def whole_box(shape: Sequence[int]) -> Box:
    """Return the box of a whole image."""
    return (0, 0, shape[1], shape[0])


def read_mask(item: LabelledImage) -> NDArray[np.uint8]:
    """Draw an image's regions on the grid of its file, reading only the header.

    Returns:
        ``(H, W)``, 1 inside.

    Raises:
        SampleFaultError: a code or the file's header is invalid.
    """
    try:
        return decode_runs(item.masks, read_header(item.image))
    except ImageError as error:
        raise SampleFaultError([Fault(str(item.image), error.kind, error.detail, item.case_id)]) from error


def reduced_mask(mask: NDArray[np.uint8], size: Sequence[int], mirror: bool = False) -> Tensor:
    """Resize a mask ``(H, W)`` to ``(1, *size)`` float32 by the nearest pixel, matching ``cut_box`` for images.

    Args:
        mask: 0 and 1.
        size: Height and width of the result.
        mirror: Whether to mirror left and right.
    """
    resized = np.asarray(Image.fromarray(mask).resize((size[1], size[0]), Image.Resampling.NEAREST))
    if mirror:
        resized = resized[:, ::-1]
    return torch.from_numpy(resized.astype(np.float32))[None]


class MaskedImageDataset(LabelledImageDataset):
    """Whole images with masks, padded to one size; the arguments are those of :class:`LabelledImageDataset`."""

    def read(self, draw: Draw) -> dict[str, Any]:
        """Return one sample.

        ``image`` ``(1, H, W)`` is resized to fit and placed at the top left, padded with the mean, which is 0;
        ``label`` ``(1, H, W)`` is 1 inside a region, 0 outside and ``IGNORED`` around the image. Evaluation
        adds ``region``, uint8 on the grid of the file, and ``size``, the height and width that the image occupies.

        Raises:
            SampleFaultError: the image or its mask cannot be used.
        """
        item = self.images[draw.index]
        mask = read_mask(item)
        size = fitted_size(mask.shape, self.image_size)
        mirror = self.train and self.flip and self.generator(draw).random() < 0.5
        image = self.crop(item, whole_box, size, mirror)
        padding = (0, self.image_size[1] - size[1], 0, self.image_size[0] - size[0])
        sample = {
            "image": F.pad((image - self.mean) / self.std, padding),
            "label": F.pad(reduced_mask(mask, size, mirror), padding, value=IGNORED),
            **self.names(item),
        }
        return sample if self.train else sample | {"region": mask, "size": size}


@dataclass(frozen=True)
class MaskedImageConfig(ImageConfig):
    """Whole images with their masks.

    Args:
        flip: Whether half of the training images are mirrored.
    """

    size: tuple[int, int] = (512, 512)
    flip: bool = True


class MaskedImageDataModule(LabelledImageDataModule):
    """Images with regions of one kind in a layout of :mod:`datamodules.labelled.layout`, cached and split by patient.

    Args:
        root: The archive.
        labels: Its layout, with one class.
        image: The size into which images are fitted; they are never cropped or rotated.
        cache: The cache of images.
        split: Which patients train, validate and test.
        label_fraction: Share of training patients to use, equally with and without regions; shares are nested.
        loader: How samples are drawn, and how many may be faulty.
        batch_size: Images per device.
        num_workers: Loader processes per rank; also threads that build the cache.
        anonymise: Whether subjects get pseudonyms in logs, tables and fault files.
        seed: Seed of order and flips; None takes ``seed_everything``'s.
        **membership: ``seen_patients``, ``changed_archive`` and ``split_from`` of
            :class:`datamodules.base.ArchiveDataModule`.

    Raises:
        ValueError: the layout has several classes, or cached copies would be smaller than the images.
    """

    def __init__(
        self,
        root: str,
        labels: LabelLayout,
        image: MaskedImageConfig = MaskedImageConfig(),
        cache: CacheConfig = CacheConfig(side=512),
        split: SplitConfig = SplitConfig((0.7, 0.15, 0.15)),
        label_fraction: float = 1.0,
        loader: LoaderConfig = LoaderConfig(),
        batch_size: int = 8,
        num_workers: int = 0,
        anonymise: bool = False,
        seed: int | None = None,
        **membership: Any,
    ) -> None:
        super().__init__(
            root,
            labels,
            LabelledImageConfig(image.size, image.mean, image.std, flip=image.flip),
            cache,
            FoldConfig(split.fractions, split.file, split.seed),
            label_fraction,
            loader=loader,
            batch_size=batch_size,
            num_workers=num_workers,
            anonymise=anonymise,
            seed=seed,
            **membership,
        )
        if len(labels.classes) != 1:
            raise ValueError(
                f"Regions of one kind are segmented here, {labels.name} has {len(labels.classes)} classes."
            )
        if cache.format == "npy" and cache.side < min(self.image_size):
            raise ValueError(
                f"`cache.side` must be at least the smaller side of `image.size`, {min(self.image_size)}, or images "
                f"would be enlarged from reduced copies; got {cache.side}."
            )

    @property
    def input_spec(self) -> InputSpec:
        """Channels, size, region and preprocessing of the batches."""
        spec = super().input_spec
        resize = "bicubic, antialiased, to fit with its ratio kept; mean below and to the right"
        preprocessing = {**spec.preprocessing, "resize": resize}
        return spec._replace(regions={self.labels.classes[0]: (1,)}, preprocessing=preprocessing, classes=())

    def _mask_faults(self, images: Sequence[LabelledImage]) -> list[Fault]:
        """Return the faults of the images' masks."""
        faults = []
        for item in images:
            if item.masks:
                try:
                    read_mask(item)
                except SampleFaultError as error:
                    faults += error.faults
        return faults

    def setup(self, stage: str) -> None:
        """Record broken files in the ledger, check the masks to be scored, and log a summary (Lightning hook).

        Raises:
            DataError: no image can be used, or none of the training images has a region.
        """
        super().setup(stage)
        for part in ("val", "test"):
            self.ledger.add(self._mask_faults(self._usable(self.splits[part])))
        if stage == "fit" and not any(item.masks for item in self.splits["train"]):
            raise DataError(f"None of the {len(self.splits['train'])} training images under {self.root} has a region.")

    def _dataset(self, cases: Sequence[LabelledImage], train: bool = False) -> MaskedImageDataset:
        return MaskedImageDataset(
            cases,
            self.store,
            self.image_size,
            train,
            self.seed,
            flip=self.flip,
            mean=self.mean,
            std=self.std,
            anonymise=self.ledger.anonymise,
        )

    def examine(self, deep: bool, workers: int) -> list[str]:
        """Print a report on the archive, its masks included, and return the reasons why training would refuse it."""
        reasons = super().examine(deep, workers)
        images = self.cases_in_use()
        ledger = FaultLedger(self.ledger.max_fraction, self.ledger.anonymise)
        ledger.num_samples = len(images)
        ledger.add(fault for fault in self._mask_faults(images) if fault.kind == "label")
        drawn = sum(bool(item.masks) for item in images)
        print_line(f"masks: {drawn} of {len(images)} images have one"
            + (f", {ledger.num_faulty} of them damaged. {ledger.describe()}" if ledger.num_faulty else ""))  # fmt: skip
        if ledger.num_faulty > ledger.limit:
            reasons.append(f"{ledger.num_faulty} damaged masks, more than the {ledger.limit:g} that are tolerated")
        return reasons
