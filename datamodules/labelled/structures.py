"""Images with masks of several structures, which may overlap: whole images at one size, with their masks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.faults import Fault, SampleFaultError
from common.types import InputSpec
from datamodules.images.reading import read_header
from datamodules.images.values import ImageError
from datamodules.labelled.classification import LabelledImage, LabelledImageDataModule, LabelledImageDataset
from datamodules.labelled.palm import read_structure
from datamodules.labelled.segmentation import reduced_mask, whole_box
from datamodules.loading import Draw


def read_structures(item: LabelledImage) -> np.ndarray:
    """Read the masks of an image, uint8 ``(R, X, Y)`` on the grid of its file, 1 inside.

    Raises:
        SampleFaultError: a mask or the image's header is damaged.
    """
    try:
        shape = read_header(item.image)
        return np.stack([read_structure(Path(name) if name else None, shape) for name in item.masks])
    except ImageError as error:
        raise SampleFaultError([Fault(str(item.image), error.kind, error.detail, item.case_id)]) from error


class StructureDataset(LabelledImageDataset):
    """Whole images with the masks of their structures; the arguments are those of :class:`LabelledImageDataset`."""

    def read(self, draw: Draw) -> dict[str, Any]:
        """Return one sample.

        ``image`` ``(C, H, W)`` and ``label`` ``(R, H, W)``, 1 inside; evaluation adds ``region``, uint8
        ``(R, X, Y)`` on the grid of the file.

        Raises:
            SampleFaultError: the image or a mask cannot be used.
        """
        item = self.images[draw.index]
        masks = read_structures(item)
        mirror = self.train and self.flip and self.generator(draw).random() < 0.5
        image = self.crop(item, whole_box, self.image_size, mirror)
        label = torch.cat([reduced_mask(mask, self.image_size, mirror) for mask in masks])
        sample = {"image": (image - self.mean) / self.std, "label": label, **self.names(item)}
        return sample if self.train else sample | {"region": masks}


class StructureDataModule(LabelledImageDataModule):
    """Images with masks of several structures in a layout such as :class:`datamodules.labelled.palm.PALMStructures`.

    The arguments are those of :class:`LabelledImageDataModule`; images are never cropped or rotated.
    """

    @property
    def input_spec(self) -> InputSpec:
        """Channels, size, structures and preprocessing of the batches."""
        spec = super().input_spec
        return spec._replace(regions=dict.fromkeys(self.labels.classes, (1,)), classes=())

    def setup(self, stage: str) -> None:
        """Record broken files in the ledger and check the masks to be scored (Lightning hook)."""
        super().setup(stage)
        for part in ("val", "test"):
            for item in self._usable(self.splits[part]):
                try:
                    read_structures(item)
                except SampleFaultError as error:
                    self.ledger.add(error.faults)

    def _dataset(self, cases: Sequence[LabelledImage], train: bool = False) -> StructureDataset:
        return StructureDataset(
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
