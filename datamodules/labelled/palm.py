"""PALM: fundus photographs of myopic eyes, with masks of the optic disc and of atrophy.

In a mask 0 is the structure and 255 the background; an image without atrophy mask has no atrophy.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from common.errors import DataError
from common.pseudonyms import public_name
from datamodules.images.pictures import Picture
from datamodules.images.reading import COLOUR, FORMATS, FUNDUS, cut_to_field_of_view, read_header
from datamodules.images.values import ImageError
from datamodules.labelled.layout import LabelLayout, LabelledImage
from datamodules.labelled.tables import files_under
from datamodules.registry import Facts, Layout, marked
from datamodules.tree import Tree

#: The structures, in the order of the channels.
STRUCTURES = ("disc", "atrophy")
_SUFFIXES = (".jpg", ".jpeg", ".png")
_MASKS = {"disc": "**/Disc_Masks", "atrophy": "**/Lesion_Masks/Atrophy"}
#: Grey values this close to 0 or 255 are compression artefacts at edges, not a third value.
_TOLERANCE = 16


def palm_images(root: Tree) -> list[Path]:
    """List the photographs: names of one letter (H, N, P, V or T) and four digits."""
    found = []
    for path in files_under(root, [""], _SUFFIXES):
        stem = path.stem.upper()
        if len(stem) == 5 and stem[0] in "HNPVT" and stem[1:].isdigit() and "Masks" not in str(path.parent):
            found.append(path)
    return found


def palm_masks(root: Tree) -> dict[str, dict[str, Path]]:
    """Return the masks of each structure by image name."""
    return {
        name: {file.stem.upper(): root / file.name for folder in root.glob(pattern) for file in root.listed(folder)}
        for name, pattern in _MASKS.items()
    }


def read_structure(path: Path | None, shape: tuple[int, int]) -> NDArray[np.uint8]:
    """Read a structure's mask, ``(H, W)``, 1 inside; all 0 without a file.

    Args:
        path: The mask.
        shape: Height and width of its image.

    Raises:
        ImageError: the mask is unreadable, differs in size from its image, or has values other than 0 and 255.
    """
    if path is None:
        return np.zeros(shape, dtype=np.uint8)
    try:
        with Image.open(path, formats=FORMATS) as image:
            if (image.height, image.width) != shape:
                raise ImageError("grid", f"the mask {path.name} has {image.height} x {image.width} pixels, "
                                         f"its image {shape[0]} x {shape[1]}")  # fmt: skip
            values = np.asarray(image.convert("L"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageError("unreadable", f"the mask {path.name} cannot be read ({error})") from error
    between = (values > _TOLERANCE) & (values < 255 - _TOLERANCE)
    if between.any():
        raise ImageError("label", f"the mask {path.name} holds {int(values[between][0])}, which is neither 0 nor 255")
    return (values <= _TOLERANCE).astype(np.uint8)


class PALMStructures(LabelLayout):
    """Photographs with masks of disc and atrophy; masks are files; an empty name means an empty mask.

    Names that begin with V and T are the official validation and test images; those without masks are left out.
    """

    name = "PALM"
    tree = "ROOT/**/{H,N,P}####.jpg, Disc_Masks/*.bmp and Lesion_Masks/Atrophy/*.bmp"
    reader = COLOUR
    classes = STRUCTURES

    def _find(self, root: Tree) -> list[LabelledImage]:
        """List the photographs with a disc mask; each is one patient.

        Raises:
            DataError: there are no masks, or two photographs have one name.
        """
        masks = palm_masks(root)
        if not masks["disc"]:
            raise DataError(f"There are no Disc_Masks under {root}, so it is not {self.name} ({self.tree}).")
        found = []
        for picture in find_palm(root):
            names = tuple(str(masks[name].get(picture.case_id, "")) for name in STRUCTURES)
            if names[0]:
                targets = tuple(float(bool(name)) for name in names)
                found.append(LabelledImage(picture.case_id, picture.patient_id, picture.image, targets, picture.split,
                                           masks=names))  # fmt: skip
        return found


def find_palm(root: Tree) -> list[Picture]:
    """List the photographs; empty without disc masks.

    Raises:
        DataError: two photographs have one name.
    """
    if not any(palm_masks(root)["disc"]):
        return []
    images = palm_images(root)
    lesions = palm_masks(root)["atrophy"]
    names = [path.stem.upper() for path in images]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{root} holds {public_name(twice)} twice.")
    parts = {"V": "val", "T": "test"}
    held_out = any(name[0] in parts for name in names)
    return [
        Picture(name, name, path, parts.get(name[0], "train") if held_out else None, lesions.get(name))
        for name, path in zip(names, images, strict=True)
    ]


def read_atrophy(mask: Path, image: Path, shorter_side: int) -> NDArray[np.uint8]:
    """Read a mask of atrophy, 1 inside, cropped like its image in pre-training.

    Raises:
        ImageError: the mask or its image cannot be read.
    """
    return cut_to_field_of_view(read_structure(mask, read_header(image)), image, shorter_side)


PALM = Layout(
    name="palm",
    tree=PALMStructures.tree,
    find=find_palm,
    evidence=marked("**/Disc_Masks"),
    facts=Facts(reader=FUNDUS, read_lesion=read_atrophy),
)
