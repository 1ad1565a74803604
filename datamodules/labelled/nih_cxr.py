"""ChestX-ray14 of the National Institutes of Health: frontal chest radiographs with the findings of their reports."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from common.errors import DataError
from common.pseudonyms import public_name
from datamodules.files import listed_names, short
from datamodules.ids import check_subjects
from datamodules.labelled.layout import LabelLayout, LabelledImage, labelled_set, need_columns, need_file
from datamodules.labelled.tables import column_names, files_under
from datamodules.registry import marked
from datamodules.tables import read_table
from datamodules.tree import Tree

CLASSES = (
    "Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax",
    "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia",
)  # fmt: skip
_TABLES = ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv")
_LISTS = {"train": "train_val_list.txt", "test": "test_list.txt"}
_NONE = "No Finding"


class NIHChestXray14(LabelLayout):
    """ChestX-ray14, as published or with its image archives unpacked; the newer table takes precedence.

    The official lists name training and test images but no validation images. Without the lists there is no split.
    """

    name = "NIH ChestX-ray14"
    tree = "ROOT/{Data_Entry_2017_v2020.csv, images/ or images_001/images/ ... [, train_val_list.txt, test_list.txt]}"
    classes = CLASSES

    def _find(self, root: Tree) -> list[LabelledImage]:
        """List the images of the table.

        Raises:
            DataError: the table, a column or one of the two lists is missing, a finding or a name is invalid, or an
                image is in both lists.
        """
        path = need_file(root, _TABLES, self)
        table = read_table(path)
        need_columns(path, table, ["Image Index", "Finding Labels", "Patient ID"])
        names = column_names(path, table, "Image Index")
        check_subjects(path, table["Patient ID"])
        targets = _targets(path, table)
        splits = _splits(root)
        images = root / "images"
        places = {file.name: file for file in files_under(root, ["images", *root.glob("images_*/images")], [".png"])}
        rows = zip(names, table["Patient ID"].tolist(), targets, strict=True)
        return [
            LabelledImage(name, patient, places.get(name, images / name), found, splits.get(name))
            for name, patient, found in rows
        ]


def _targets(path: Path, table: pd.DataFrame) -> list[tuple[float, ...]]:
    """Return the classes of each row.

    Raises:
        DataError: unknown finding.
    """
    meaning = {}
    for text in table["Finding Labels"].unique():
        findings = [finding.strip() for finding in text.split("|")]
        unknown = [finding for finding in findings if finding not in (*CLASSES, _NONE)]
        if unknown:
            image = short(table.loc[table["Finding Labels"] == text, "Image Index"].iloc[0])
            raise DataError(
                f"{path} gives {public_name(image)} the finding {short(unknown[0])!r}; known are {_NONE} and "
                f"{', '.join(CLASSES)}."
            )
        meaning[text] = tuple(float(name in findings) for name in CLASSES)
    return [meaning[text] for text in table["Finding Labels"].tolist()]


def _splits(root: Tree) -> dict[str, str]:
    """Return the split of each image by the official lists; empty without lists.

    Raises:
        DataError: one list is missing, or an image is in both.
    """
    there = {split: root / name for split, name in _LISTS.items() if root.is_file(name)}
    if not there:
        return {}
    missing = [name for split, name in _LISTS.items() if split not in there]
    if missing:
        raise DataError(f"{root} has {there.popitem()[1].name} without {missing[0]}; fetch it too.")
    listed: dict[str, Sequence[str]] = {split: listed_names([path]) for split, path in there.items()}
    both = set(listed["train"]) & set(listed["test"])
    if both:
        raise DataError(f"{len(both)} images are in both {' and '.join(_LISTS.values())} of {root}, first "
                        f"{public_name(min(both))}.")  # fmt: skip
    return {name: split for split, names in listed.items() for name in names}


NIH_CXR14 = labelled_set("nih_cxr14", NIHChestXray14(), marked(_TABLES), [*_TABLES, *_LISTS.values()])
