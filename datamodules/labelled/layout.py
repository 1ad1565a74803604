"""Images with labels for a downstream task: the labelled image, and the layouts of such archives."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple

import pandas as pd

from common.errors import DataError
from common.pseudonyms import public_name
from common.runtime.reporting import contents, print_line
from datamodules.files import listing, short
from datamodules.ids import check_subjects
from datamodules.images.reading import GRAY, ImageReader
from datamodules.listed_files import path_under
from datamodules.registry import Archive, Evidence, Facts, Layout, Listing, Record
from datamodules.tables import read_table
from datamodules.tree import Tree, as_tree

#: An unknown target, excluded from the loss and the scores.
UNKNOWN = float("nan")


class LabelledImage(NamedTuple):
    """One image and its labels.

    Attributes:
        case_id: Unique name.
        patient_id: Splits and folds are made by patient.
        image: The file.
        targets: 1, 0 or ``UNKNOWN`` for each class of the layout, or a measurement; empty if there are none.
        split: ``train``, ``val`` or ``test`` where the archive defines one.
        group: A further key that folds must not share, such as the text of a note; empty: none.
        masks: Run-length codes of the regions to segment; empty: there is no region.
    """

    case_id: str
    patient_id: str
    image: Path
    targets: tuple[float, ...] = ()
    split: str | None = None
    group: str = ""
    masks: tuple[str, ...] = ()

    def record(self, classes: Sequence[str] = ()) -> Record:
        """Return the image as every data module can read it; unknown targets have no text."""
        named = zip(classes, self.targets, strict=False)
        targets = {name: "" if math.isnan(target) else f"{target:g}" for name, target in named}
        return Record(self.case_id, self.patient_id, images=((self.image, ""),), targets=targets, split=self.split)


class LabelLayout(ABC):
    """A labelled archive in its official layout; its arguments are the options of a task.

    Attributes:
        name: Its name in messages.
        tree: One line that shows the tree.
        classes: Names of the targets, in order.
        reader: How its files are decoded.
    """

    name: ClassVar[str]
    tree: ClassVar[str]
    reader: ClassVar[ImageReader] = GRAY
    classes: tuple[str, ...]

    def find(self, root: str | Path | Tree) -> list[LabelledImage]:
        """List the labelled images under a root. Reads names and tables only, no images.

        Raises:
            DataError: the root has another layout, a table is damaged or lacks a column, or a label is invalid.
        """
        return self._find(as_tree(root))

    @abstractmethod
    def _find(self, root: Tree) -> list[LabelledImage]:
        """List the labelled images of a tree."""


def as_archive(labels: LabelLayout, tree: Tree, images: Sequence[LabelledImage]) -> Archive:
    """Return the archive of labelled images, for the account of its files."""
    layout = Layout(labels.name, labels.tree, labels.find, lambda _: Evidence(0))
    tables = [file.name for file in tree.files if file.kind == "table"]
    return Archive(layout, tree, [item.record(labels.classes) for item in images], layout.facts, tables=tables)


def labelled_set(
    name: str,
    labels: LabelLayout,
    evidence: Callable[[Tree], Evidence],
    tables: Sequence[str] = (),
    held_out: str = "val",
) -> Layout:
    """Register a labelled set as a layout, for methods that use its images and perhaps its targets.

    Listed images without a file are left out: pre-training can use part of an archive.

    Args:
        name: Name for ``LAYOUT=``.
        labels: The labelled layout.
        evidence: Returns the evidence that a tree has this layout.
        tables: Patterns of its tables.
        held_out: Split of its test images in pre-training, which only looks at their reconstructions.
    """

    def find(tree: Tree) -> Listing:
        listed = labels.find(tree)
        there = [item for item in listed if tree.is_file(item.image)]
        if len(there) < len(listed):
            absent = next(item.image for item in listed if not tree.is_file(item.image))
            print_line(f"note: {len(listed) - len(there)} of {len(listed)} images that {labels.name} lists are missing"
                f", first {absent}")  # fmt: skip
        return Listing([item.record(labels.classes) for item in there])

    facts = Facts(reader=labels.reader, held_out=held_out)
    return Layout(name, labels.tree, find, evidence, facts, tables=tuple(tables))


def need_file(root: Tree, patterns: Sequence[str], layout: LabelLayout) -> Path:
    """Return the first file under a root that matches one of the patterns.

    Raises:
        DataError: no file matches.
    """
    for pattern in patterns:
        found = root.glob(pattern)
        if found:
            return found[-1]
    raise DataError(
        f"{root} holds no {patterns[0]}, so it is not {layout.name} ({layout.tree}); it holds {contents(root.root)}."
    )


def need_columns(path: Path, table: pd.DataFrame, columns: Sequence[str]) -> None:
    """Check that a table has the required columns.

    Raises:
        DataError: lists the missing and the present columns.
    """
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise DataError(f"{path} has no column {listing(missing)}; it has {listing(table.columns)}.")


def label_value(text: str, allowed: Mapping[str, float], path: Path, case_id: str, column: str) -> float:
    """Return the meaning of a cell of a label table.

    Raises:
        DataError: unknown value.
    """
    if text not in allowed:
        known = ", ".join(repr(value) for value in allowed)
        raise DataError(f"{path} gives {public_name(case_id)} the {short(column)} {short(text)!r}; known are {known}.")
    return allowed[text]


class LabelledTable(LabelLayout):
    """Any images with labels, listed in a table: one row per image, one column of 0 and 1 (or empty) per class.

    Args:
        classes: The columns of the classes.
        file: The table under the root: CSV, JSON lines or Parquet.
        columns: Names of the columns ``image``, ``subject`` and ``split``, if they differ.
    """

    name = "a labelled table"
    tree = "ROOT/labels.csv with image, subject [, split] and one column per class"

    def __init__(
        self, classes: Sequence[str], file: str = "labels.csv", columns: Mapping[str, str] | None = None
    ) -> None:
        self.classes = tuple(classes)
        self.file = file
        self.columns = {"image": "image", "subject": "subject", "split": "split", **(columns or {})}

    def _find(self, root: Tree) -> list[LabelledImage]:
        """List the rows of the table.

        Raises:
            DataError: the table or a column is missing, a path leaves the root, or a label is not 0 or 1.
        """
        path = need_file(root, [self.file], self)
        table = read_table(path)
        names = self.columns
        need_columns(path, table, [names["image"], names["subject"], *self.classes])
        check_subjects(path, table[names["subject"]])
        values = {"0": 0.0, "1": 1.0, "0.0": 0.0, "1.0": 1.0, "": UNKNOWN}
        found = []
        for row in table.to_dict("records"):
            name = row[names["image"]]
            image = path_under(root.root, name, path)
            targets = tuple(label_value(row[column], values, path, name, column) for column in self.classes)
            split = row.get(names["split"], "").lower() or None
            found.append(LabelledImage(name, row[names["subject"]] or name, image, targets, split))
        return found
