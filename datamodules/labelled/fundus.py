"""Graded fundus photographs: IDRiD, APTOS 2019, the EyePACS set of 2015, RFMiD.

A grade c of five is written as ordinal targets: the first c + 1 of them are 1.
"""

from collections.abc import Sequence
from pathlib import Path

from common.errors import DataError
from common.pseudonyms import public_name
from datamodules.images.reading import FUNDUS
from datamodules.labelled.layout import LabelLayout, LabelledImage, labelled_set, need_columns, need_file
from datamodules.labelled.tables import column_names, column_targets, files_under
from datamodules.members import PICTURES
from datamodules.registry import marked
from datamodules.tables import read_table
from datamodules.tree import Tree

GRADES = ("grade 0", "grade 1", "grade 2", "grade 3", "grade 4")
_GRADE = {str(grade): float(grade) for grade in range(5)}


def ordinal_targets(grade: float) -> tuple[float, ...]:
    """Return the targets of a grade: 1 up to it, 0 beyond."""
    return tuple(float(index <= grade) for index in range(len(GRADES)))


def _files(tree: Tree, folder: Path) -> dict[str, Path]:
    """Return the images of a folder by name without suffix."""
    return {path.stem: path for path in files_under(tree, [folder], PICTURES)}


def _graded(
    tree: Tree, table_path: Path, columns: Sequence[str], folder: Path, split: str | None = None, prefix: str = ""
) -> list[LabelledImage]:
    """Read a table of names and grades; a listed image without file is kept and fails on reading."""
    table = read_table(table_path)
    need_columns(table_path, table, columns)
    table = table[table[columns[0]] != ""]
    names = column_names(table_path, table, columns[0])
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{table_path} lists {public_name(twice)} twice.")
    grades = column_targets(table_path, table, columns[1], _GRADE, names)
    files = _files(tree, folder)
    return [
        LabelledImage(f"{prefix}{name}", f"{prefix}{name}", files.get(name, folder / f"{name}.png"),
                      ordinal_targets(grade), split)
        for name, grade in zip(names, grades, strict=True)
    ]  # fmt: skip


class IDRiD(LabelLayout):
    """Grading part of IDRiD with its official split: retinopathy, 0 to 4. Names count from 1 in both parts."""

    name = "IDRiD"
    tree = "ROOT/B. Disease Grading/{1. Original Images/{a. Training Set, b. Testing Set}, 2. Groundtruths/*.csv}"
    reader = FUNDUS
    classes = GRADES

    def _find(self, root: Tree) -> list[LabelledImage]:
        """List the graded images.

        Raises:
            DataError: a table or a column is missing, or a grade is invalid.
        """
        found = []
        for split, place, word in (("train", "a. Training Set", "Training"), ("test", "b. Testing Set", "Testing")):
            path = need_file(root, [f"**/2. Groundtruths/*{word} Labels.csv", f"**/*{word} Labels.csv"], self)
            folder = path.parent.parent / "1. Original Images" / place
            found += _graded(root, path, ["Image name", "Retinopathy grade"], folder, split, f"{split}/")
        return found


class APTOS2019(LabelLayout):
    """The graded training images of APTOS 2019; there is no official split."""

    name = "APTOS 2019"
    tree = "ROOT/{train.csv, train_images/<id_code>.png}"
    reader = FUNDUS
    classes = GRADES

    def _find(self, root: Tree) -> list[LabelledImage]:
        """List the graded images.

        Raises:
            DataError: the table or a column is missing, or a grade is invalid.
        """
        path = need_file(root, ["train.csv"], self)
        cropped = path.parent / "train_images_cropped"
        folder = cropped if root.is_dir(cropped) else path.parent / "train_images"
        return _graded(root, path, ["id_code", "diagnosis"], folder)


class EyePACS2015(LabelLayout):
    """Training images of the EyePACS set of 2015, two eyes per patient."""

    name = "EyePACS 2015"
    tree = "ROOT/{trainLabels.csv, train/<patient>_<left|right>.jpeg}"
    reader = FUNDUS
    classes = GRADES

    def _find(self, root: Tree) -> list[LabelledImage]:
        """List the graded images.

        Raises:
            DataError: the table or a column is missing, or a grade is invalid.
        """
        path = need_file(root, ["trainLabels.csv"], self)
        images = _graded(root, path, ["image", "level"], path.parent / "train")
        return [item._replace(patient_id=item.case_id.rsplit("_", 1)[0]) for item in images]


class RFMiD(LabelLayout):
    """RFMiD with its official split: which of 45 conditions an image shows.

    Args:
        leave_out: Conditions that are not targets, besides the risk of any; ``[HR, ODPM]`` leaves the 43 of ContIG.
        risk: Whether ``Disease_Risk`` is a target as well, for the paper's 46.
    """

    name = "RFMiD"
    tree = "ROOT/**/{RFMiD_Training_Labels.csv, Training/<ID>.png}, likewise Validation and Test"
    reader = FUNDUS

    def __init__(self, leave_out: Sequence[str] = (), risk: bool = False) -> None:
        self.leave_out, self.risk = tuple(leave_out), risk
        self.classes = ()

    def _find(self, root: Tree) -> list[LabelledImage]:
        """List the labelled images; a split without its table is left out.

        Raises:
            DataError: the training table or a column is missing, the splits differ in columns, or a label is invalid.
        """
        parts = (("train", "Training", "Training"), ("val", "Validation", "Validation"), ("test", "Testing", "Test"))
        found: list[LabelledImage] = []
        self.classes = ()
        for split, word, folder in parts:
            pattern = f"**/*RFMiD_{word}_Labels.csv"
            path = root.first(pattern)
            if path is None and split == "train":
                path = need_file(root, [pattern], self)
            if path is not None:
                found += self._part(root, path, split, folder)
        return found

    def _part(self, root: Tree, path: Path, split: str, folder: str) -> list[LabelledImage]:
        table = read_table(path)
        table.columns = [name.replace(" ", "_") for name in table.columns]
        need_columns(path, table, ["ID", "Disease_Risk"])
        skipped = {"ID", *self.leave_out} | (set() if self.risk else {"Disease_Risk"})
        classes = tuple(name for name in table.columns if name not in skipped)
        if self.classes and set(classes) != set(self.classes):
            raise DataError(f"{path} has other conditions than the training table.")
        self.classes = self.classes or classes
        names = column_names(path, table, "ID")
        values = {"0": 0.0, "1": 1.0}
        columns = [column_targets(path, table, name, values, names) for name in self.classes]
        above = root.name_of(path.parent.parent) if path.parent != root.root else None
        originals = [] if above is None else root.glob(f"{above}/*Original Images/*{folder}*".lstrip("/"))
        places = [path.parent / folder, *originals]
        files: dict[str, Path] = {}
        for place in places:
            files = files or _files(root, place)
        return [
            LabelledImage(
                f"{split}/{name}", f"{split}/{name}", files.get(name, places[0] / f"{name}.png"), targets, split
            )
            for name, targets in zip(names, zip(*columns, strict=True), strict=True)
        ]


IDRID = labelled_set(
    "idrid", IDRiD(), marked("**/*Disease Grading_Training Labels.csv"), ["**/*Disease Grading_*ing Labels.csv"]
)
APTOS = labelled_set("aptos2019", APTOS2019(), marked("train.csv", "train_images*"), ["train.csv"])
EYEPACS = labelled_set("eyepacs2015", EyePACS2015(), marked("trainLabels.csv"), ["trainLabels.csv"])
RFMID = labelled_set("rfmid", RFMiD(), marked("**/*RFMiD_Training_Labels.csv"), ["**/*RFMiD_*_Labels.csv"])
