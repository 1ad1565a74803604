"""SIIM-ACR Pneumothorax Segmentation: chest radiographs with the run-length codes of pneumothoraces.

A code consists of pairs of numbers in column-major order: the gap since the previous run, and the run's length.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError
from common.pseudonyms import public_name
from datamodules.images.values import ImageError
from datamodules.labelled.layout import LabelLayout, LabelledImage, labelled_set, need_columns, need_file
from datamodules.labelled.tables import column_names, files_under
from datamodules.registry import marked
from datamodules.tables import read_table
from datamodules.tree import Tree

#: Stands for no region in place of a code.
NO_REGION = "-1"
_TABLES = ("train-rle.csv", "stage_2_train.csv")
#: Most digits of a number: more exceed any image, and Python refuses to parse thousands.
_DIGITS = 20
_DICOM, _FLAT = "dicom-images-train", "images"


class SIIMPneumothorax(LabelLayout):
    """Training images, in the official tree of studies and series or in one folder. Several codes form one region."""

    name = "SIIM-ACR Pneumothorax"
    tree = (
        f"ROOT/{{{_TABLES[0]} or {_TABLES[1]}, {_DICOM}/<study>/<series>/<ImageId>.dcm or "
        f"{_FLAT}/<ImageId>.{{dcm,png,jpg}}}}"
    )
    classes = ("Pneumothorax",)

    def _find(self, root: Tree) -> list[LabelledImage]:
        """List the images of the table; each study is a patient, and so is an image outside any study.

        Raises:
            DataError: the table or a column is missing, a name is invalid, or an image has neither a code nor -1.
        """
        path = need_file(root, _TABLES, self)
        table = read_table(path)
        need_columns(path, table, ["ImageId", "EncodedPixels"])
        names = column_names(path, table, "ImageId")
        codes: dict[str, list[str]] = {}
        for name, code in zip(names, table["EncodedPixels"].tolist(), strict=True):
            if not code:
                raise DataError(f"{path} gives {public_name(name)} an empty EncodedPixels; where there is no region it "
                                f"is -1.")  # fmt: skip
            codes.setdefault(name, []).extend([] if code == NO_REGION else [code])
        tree = root / _DICOM
        places: dict[str, Path] = {}
        for file in files_under(root, [_DICOM, _FLAT], [".dcm", ".png", ".jpg"]):
            places.setdefault(file.stem, file)
        return [_image(name, places.get(name, tree / f"{name}.dcm"), tree, masks) for name, masks in codes.items()]


def _image(name: str, file: Path, tree: Path, masks: Sequence[str]) -> LabelledImage:
    """Make an image from its codes."""
    folders = file.relative_to(tree).parts[:-1] if file.is_relative_to(tree) else ()
    patient = folders[0] if folders else name
    return LabelledImage(name, patient, file, (float(bool(masks)),), masks=tuple(masks))


def decode_runs(codes: Sequence[str], shape: tuple[int, int]) -> NDArray[np.uint8]:
    """Draw the regions of run-length codes into one mask.

    Args:
        codes: Pairs of gap and run, column-major; ``-1`` means no region.
        shape: ``(H, W)`` of the image for which the codes were made.

    Returns:
        ``(H, W)``, 1 inside any of the regions and 0 elsewhere.

    Raises:
        ImageError: a code is not a list of pairs of whole numbers, or exceeds the image.
    """
    height, width = shape
    flat = np.zeros(height * width, dtype=np.uint8)
    for code in codes:
        if code != NO_REGION:
            numbers = _numbers(code, len(flat))
            values = np.repeat(np.arange(len(numbers), dtype=np.uint8) % 2, numbers)
            flat[: len(values)] |= values
    return np.ascontiguousarray(flat.reshape(width, height).T)


def _numbers(code: str, num_pixels: int) -> NDArray[np.int64]:
    """Read a code.

    Raises:
        ImageError: the code is invalid, or exceeds the image.
    """
    words = code.split()
    odd = next((word for word in words if not (word.isascii() and word.isdigit())), None)
    if odd is not None:
        raise ImageError("label", f"a run-length code holds {odd[:20]!r}, which is not a whole number from 0 on")
    if not words or len(words) % 2:
        raise ImageError("label", f"a run-length code of {len(words)} numbers is not a list of pairs of gap and run")
    total = sum(int(word.lstrip("0")[:_DIGITS] or "0") for word in words)
    if total > num_pixels:
        raise ImageError("label", f"a run-length code covers {total} pixels of an image of {num_pixels}")
    return np.array(words).astype(np.int64)


def encode_runs(mask: NDArray) -> str:
    """Return the run-length code of a mask; the inverse of :func:`decode_runs`.

    Args:
        mask: ``(H, W)``; nonzero pixels are inside.
    """
    inside = np.concatenate([[False], mask.T.ravel() != 0, [False]])
    edges = np.flatnonzero(inside[1:] != inside[:-1])
    return " ".join(map(str, np.diff(edges, prepend=0).tolist())) or NO_REGION


SIIM = labelled_set("siim_pneumothorax", SIIMPneumothorax(), marked(_TABLES, (_DICOM, _FLAT)), _TABLES)
