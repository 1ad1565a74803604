"""Colour images of people, with or without their genetics: what a sample is, and what a layout of such archives is."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from datamodules.genetics.genome import GenomeFiles, Kind
from datamodules.images.reading import ImageReader


class Picture(NamedTuple):
    """One image of a person.

    Attributes:
        case_id: Unique name.
        patient_id: Splits are by this, and genetics are joined by it.
        image: The file.
        split: ``train``, ``val`` or ``test`` where the archive says so.
        lesion: Mask of a lesion; None where there is none.
    """

    case_id: str
    patient_id: str
    image: Path
    split: str | None = None
    lesion: Path | None = None


def no_files(root: Path) -> GenomeFiles:
    """Name no genetics."""
    return GenomeFiles()


@dataclass(frozen=True)
class PictureLayout:
    """A way in which such images are stored on disk.

    Attributes:
        name: What ``LAYOUT=`` takes.
        tree: One line that shows the tree, for a person whose root was not recognised.
        find: Lists the images under a root; an empty list means the root is not of this layout.
        reader: How files become pixels.
        named: Whether its patients are the people of a genetic archive; else genetics can only be those of strangers.
        files: Where genetics lie in the tree.
        kinds: Further genetics that are no files of their own kind, such as omics in a table; None: there are none.
        prefer: A layout of higher preference wins where several recognise a root.
        read_lesion: Reads the mask of a lesion, given its file, that of its image and the shorter side, as the image is
            read; None: images of this layout have no such masks.
    """

    name: str
    tree: str
    find: Callable[[Path], list[Picture]]
    reader: ImageReader
    named: bool = False
    files: Callable[[Path], GenomeFiles] = no_files
    kinds: Callable[[Path], list[Kind]] | None = None
    prefer: int = 0
    read_lesion: Callable[[Path, Path, int], NDArray[np.uint8]] | None = None

    def recognised(self, root: Path) -> list[Picture]:
        """List the images if the root is plainly of this layout."""
        return self.find(root)
