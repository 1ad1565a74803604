"""Images of any archive with what a person wants predicted of them, and images with a person's own masks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from common.errors import DataError
from common.faults import Fault, SampleFaultError
from common.pseudonyms import public_name
from common.types import InputSpec
from datamodules.images.reading import COLOUR, GRAY, ImageReader, read_header
from datamodules.images.values import ImageError
from datamodules.labelled.classification import LabelledImageDataModule
from datamodules.labelled.layout import LabelledImage, pictures_of
from datamodules.labelled.structures import StructureDataModule
from datamodules.registry import NO_SETTINGS, Archive, Record, Settings
from datamodules.tables import read_table
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
from datamodules.tree import Tree

Colour = Literal["gray", "colour"]
_FORMATS = ("PNG", "TIFF", "BMP")


@dataclass
class FoundImages:
    """What images of whatever layout are, in the place of a labelled set.

    Attributes:
        reader: How files become pixels.
        name: Name of the layout, once it is known.
        tree: One line that shows the tree.
        classes: What is learned, once it is known.
    """

    reader: ImageReader
    name: str = "images"
    tree: str = "any archive of images"
    classes: tuple[str, ...] = ()


class AnyImagesDataModule(LabelledImageDataModule):
    """Images of any archive; subclasses say what is learned of them.

    Args:
        root: The archive.
        layout: Name of its layout; ``"auto"`` recognises it.
        subject: Whose an image is, where only a person knows: ``file`` (each image is a patient), ``folder``, or
            ``{regex: ...}`` with a group ``subject``.
        colour: How the encoder takes images: ``gray``, repeated for its channels, or ``colour``.
        **options: Those of :class:`LabelledImageDataModule` but ``labels``.
    """

    def __init__(
        self,
        root: str,
        layout: str = "auto",
        subject: str | dict[str, str] | None = None,
        colour: Colour = "colour",
        **options: Any,
    ) -> None:
        labels: Any = FoundImages(COLOUR if colour == "colour" else GRAY)
        super().__init__(root, labels, **options)
        self._layout, self._subject = layout, subject

    def opening(self) -> tuple[str, Settings]:
        """Return the layout, and what is said of the archive."""
        return self._layout, NO_SETTINGS if self._subject is None else Settings(subject=self._subject)

    def _listed(self, root: Tree) -> list[LabelledImage]:
        if self.predicting:
            return super()._listed(root)
        self.archive = self.open(root, *self.opening())
        images = [item for record in self.archive.records for item in self.items(record, root)]
        self.labels.name = self.archive.layout.name  # type: ignore[misc]  # an instance's, not the class's
        return images

    @property
    def counted(self) -> Sequence[str]:
        """Nothing: what is learned is said where it is read."""
        return ()

    def items(self, record: Record, root: Tree) -> list[LabelledImage]:
        """Return the images of a sample."""
        return pictures_of(record, root)


class TargetImageDataModule(AnyImagesDataModule):
    """Images of any archive with classes, grades, findings or numbers to be predicted.

    A table with the columns ``image`` and ``subject`` is the archive's list of images itself.

    Args:
        root: The archive.
        target: What is predicted.
        **options: Those of :class:`AnyImagesDataModule`.
    """

    def __init__(self, root: str, target: TargetColumns = TargetColumns(), **options: Any) -> None:
        super().__init__(root, **options)
        self.target = heeding(target, self.said.get("targets", {}))
        self.learned = Targets("classes", (), {}, [])
        self._facts: dict[str, Mapping[str, str]] = {}

    @classmethod
    def target_options(cls, own: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any] | None:
        """Take all that the archive file says: :func:`datamodules.targets.heeding` chooses."""
        return {}

    @property
    def needs(self) -> frozenset[str]:
        """Images, with targets where no table gives them."""
        said = self.target.file or self.target.names or self.said.get("targets")
        return frozenset({"images"} if self.predicting or said else {"images", "targets"})

    def opening(self) -> tuple[str, Settings]:
        """Return the layout, and what is said of the archive: its table, where the table of labels lists images."""
        layout, settings = super().opening()
        if layout == "auto" and self.target.file and Path(self.target.file).is_file():
            columns = set(read_table(Path(self.target.file)).columns)
            if "image" in columns and ("subject" in columns or settings.subject or self.settings.subject):
                return "table", replace(settings, table=str(Path(self.target.file).absolute()))
        return layout, settings

    def items(self, record: Record, root: Tree) -> list[LabelledImage]:
        """Return the images of a sample; what is known of it is known of each."""
        images = super().items(record, root)
        self._facts |= {item.case_id: {**record.attributes, **record.targets} for item in images}
        return images

    def _strata(self, images: Sequence[LabelledImage]) -> Mapping[str, str] | None:
        self._read(images)
        return strata_of_texts(self._kind, self._texts, images)

    def _read(self, images: Sequence[LabelledImage]) -> None:
        assert self.archive is not None
        config = self.target
        if self.archive.layout.name == "table" and config.file:
            config = replace(config, file=None)  # the archive's facts are that table's
        usual = {name for record in self.archive.records for name in record.targets}
        self._names, texts = read_texts(config, images, self._facts, sorted(usual))
        self._kind = kind_of(config, self._names, texts)
        self._texts = merged(config, self._kind, texts)

    def _learned(self, images: list[LabelledImage], parts: Mapping[str, str]) -> list[LabelledImage]:
        self.learned = learn_targets(self.target, self._kind, self._names, self._texts, images, parts)
        self.labels.classes = self.learned.names
        values = self.learned.values
        return [item._replace(targets=values[item.case_id]) for item in images if item.case_id in values]

    @property
    def input_spec(self) -> InputSpec:
        """As of all labelled images, with the kind of target."""
        spec = super().input_spec
        return spec if self.predicting else spec._replace(target={"kind": self.learned.kind})

    def setup(self, stage: str) -> None:
        """As of all labelled images; classes that cannot be learned are refused (Lightning hook)."""
        self.index()
        if stage == "fit":
            refuse(self.learned.problems)
        super().setup(stage)

    def examine(self, deep: bool, workers: int) -> list[str]:
        """Print a report on the archive and return the reasons why training would refuse it."""
        return [*super().examine(deep, workers), *self.learned.problems]


def read_regions(path: Path, shape: tuple[int, int], regions: Mapping[str, Sequence[int]]) -> NDArray[np.uint8]:
    """Read a mask of label values, ``(R, H, W)``, 1 inside.

    Args:
        path: The mask.
        shape: Height and width of its image.
        regions: Region to label values.

    Raises:
        ImageError: it cannot be read, has other sides than its image, or holds a value of no region.
    """
    try:
        with Image.open(path, formats=_FORMATS) as image:
            values = np.asarray(image.convert("L") if image.mode in ("1", "RGB", "RGBA") else image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageError("unreadable", f"the mask {path.name} cannot be read ({error})") from error
    if values.shape != shape:
        raise ImageError("grid", f"the mask {path.name} has {values.shape[0]} x {values.shape[1]} pixels, its image "
                                 f"{shape[0]} x {shape[1]}")  # fmt: skip
    known = {0, *(value for group in regions.values() for value in group)}
    if strange := set(np.unique(values).tolist()) - known:
        raise ImageError("label", f"the mask {path.name} holds {min(strange)}, which is of no region")
    return np.stack([np.isin(values, list(group)) for group in regions.values()]).astype(np.uint8)


class RegionImageDataModule(AnyImagesDataModule, StructureDataModule):
    """Images of any archive with masks of label values; images are never cropped or turned.

    Args:
        root: The archive.
        regions: Region to label values; None takes what ``dataset.json`` says, else one region of what is not 0.
        **options: Those of :class:`AnyImagesDataModule`.
    """

    def __init__(self, root: str, regions: dict[str, list[int]] | None = None, **options: Any) -> None:
        super().__init__(root, **options)
        self._regions = regions

    @property
    def needs(self) -> frozenset[str]:
        """Images with masks."""
        return frozenset({"images"} if self.predicting else {"images", "masks"})

    def items(self, record: Record, root: Tree) -> list[LabelledImage]:
        """Return the images of a sample, each with its one mask; those without are of no use here."""
        masks = tuple(str(ref.path) for ref in record.masks.values())
        if masks and (len(record.images), len(masks)) != (1, 1):
            raise DataError(f"The case {public_name(record.case_id)} has {len(record.images)} images and {len(masks)} "
                            f"masks: give each image one mask, of label values.")  # fmt: skip
        return [item._replace(masks=masks) for item in super().items(record, root) if masks]

    def _listed(self, root: Tree) -> list[LabelledImage]:
        images = super()._listed(root)
        if self.predicting:
            return images
        if not images:
            raise DataError(f"No image under {root} has a mask.")
        assert self.archive is not None
        self.regions = self._regions_of(self.archive)
        self.labels.classes = tuple(self.regions)
        return images

    def _regions_of(self, archive: Archive) -> dict[str, tuple[int, ...]]:
        if self._regions:
            return {name: tuple(values) for name, values in self._regions.items()}
        if archive.facts.regions:
            return dict(archive.facts.regions)
        raise DataError(f"The layout {archive.layout.name} does not say what values of its masks mean: give "
                        f"data.regions, such as {{lesion: [255]}}.")  # fmt: skip

    @property
    def input_spec(self) -> InputSpec:
        """Channels, size, regions and preprocessing of the batches."""
        spec = super().input_spec
        return spec._replace(regions={} if self.predicting else self.regions)

    def masks_of(self, item: LabelledImage) -> NDArray[np.uint8]:
        """Return the regions of an image, ``(R, X, Y)``; without a mask nothing is inside.

        Raises:
            SampleFaultError: the image has no header, or its mask is damaged.
        """
        try:
            shape = read_header(item.image)
            if self.predicting:
                return np.zeros((1, *shape), np.uint8)
            return read_regions(Path(item.masks[0]), shape, self.regions)
        except ImageError as error:
            where = item.masks[0] if item.masks else str(item.image)
            raise SampleFaultError([Fault(where, error.kind, error.detail, item.case_id)]) from error
