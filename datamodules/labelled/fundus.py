"""Graded fundus photographs: IDRiD, APTOS 2019, the EyePACS set of 2015, RFMiD.

A grade c of five is written as ordinal targets: the first c + 1 of them are 1.
"""

from collections.abc import Sequence
from pathlib import Path

from common.errors import DataError
from common.pseudonyms import public_name
from common.runtime.reporting import say
from datamodules.genetics.layout import Picture, PictureLayout
from datamodules.images.reading import FUNDUS
from datamodules.labelled.layout import LabelLayout, LabelledImage, need_columns, need_file
from datamodules.labelled.tables import column_names, column_targets, files_under
from datamodules.tables import read_table

GRADES = ("grade 0", "grade 1", "grade 2", "grade 3", "grade 4")
_GRADE = {str(grade): float(grade) for grade in range(5)}
_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")


def ordinal_targets(grade: float) -> tuple[float, ...]:
    """Return the targets of a grade: 1 up to it, 0 beyond."""
    return tuple(float(index <= grade) for index in range(len(GRADES)))


def _files(folder: Path) -> dict[str, Path]:
    """Return the images of a folder by their name without suffix."""
    return {path.stem: path for path in files_under([folder], _SUFFIXES)}


def _graded(
    table_path: Path, columns: Sequence[str], folder: Path, split: str | None, prefix: str, layout: LabelLayout
) -> list[LabelledImage]:
    """Read a table of names and grades; a listed image that is not there is missing, which reading it will show."""
    table = read_table(table_path)
    need_columns(table_path, table, columns)
    table = table[table[columns[0]] != ""]
    names = column_names(table_path, table, columns[0])
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{table_path} lists {public_name(twice)} twice.")
    grades = column_targets(table_path, table, columns[1], _GRADE, names)
    files = _files(folder)
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

    def find(self, root: Path) -> list[LabelledImage]:
        """List the graded images.

        Raises:
            DataError: a table or a column is missing, or a grade is none.
        """
        found = []
        for split, place, word in (("train", "a. Training Set", "Training"), ("test", "b. Testing Set", "Testing")):
            path = need_file(root, [f"**/2. Groundtruths/*{word} Labels.csv", f"**/*{word} Labels.csv"], self)
            folder = path.parent.parent / "1. Original Images" / place
            found += _graded(path, ["Image name", "Retinopathy grade"], folder, split, f"{split}/", self)
        return found


class APTOS2019(LabelLayout):
    """Training images of APTOS 2019, the graded ones; there is no official split."""

    name = "APTOS 2019"
    tree = "ROOT/{train.csv, train_images/<id_code>.png}"
    reader = FUNDUS
    classes = GRADES

    def find(self, root: Path) -> list[LabelledImage]:
        """List the graded images.

        Raises:
            DataError: the table or a column is missing, or a grade is none.
        """
        path = need_file(root, ["train.csv"], self)
        cropped = path.parent / "train_images_cropped"
        folder = cropped if cropped.is_dir() else path.parent / "train_images"
        return _graded(path, ["id_code", "diagnosis"], folder, None, "", self)


class EyePACS2015(LabelLayout):
    """Training images of the EyePACS set of 2015, two eyes a patient."""

    name = "EyePACS 2015"
    tree = "ROOT/{trainLabels.csv, train/<patient>_<left|right>.jpeg}"
    reader = FUNDUS
    classes = GRADES

    def find(self, root: Path) -> list[LabelledImage]:
        """List the graded images.

        Raises:
            DataError: the table or a column is missing, or a grade is none.
        """
        path = need_file(root, ["trainLabels.csv"], self)
        images = _graded(path, ["image", "level"], path.parent / "train", None, "", self)
        return [item._replace(patient_id=item.case_id.rsplit("_", 1)[0]) for item in images]


class RFMiD(LabelLayout):
    """RFMiD with its official split: which of 45 conditions an image shows.

    Args:
        leave_out: Conditions that are no target, besides the risk of any; ``[HR, ODPM]`` leaves the 43 of ContIG.
        risk: Whether ``Disease_Risk`` is a target too, for the 46 of the paper.
    """

    name = "RFMiD"
    tree = "ROOT/**/{RFMiD_Training_Labels.csv, Training/<ID>.png}, likewise Validation and Test"
    reader = FUNDUS

    def __init__(self, leave_out: Sequence[str] = (), risk: bool = False) -> None:
        self.leave_out, self.risk = tuple(leave_out), risk
        self.classes = ()

    def find(self, root: Path) -> list[LabelledImage]:
        """List the labelled images; a part without its table is left out.

        Raises:
            DataError: the training table or a column is missing, the parts have other columns, or a label is none.
        """
        parts = (("train", "Training", "Training"), ("val", "Validation", "Validation"), ("test", "Testing", "Test"))
        found: list[LabelledImage] = []
        self.classes = ()
        for split, word, folder in parts:
            pattern = f"**/*RFMiD_{word}_Labels.csv"
            path = next(iter(sorted(root.glob(pattern))), None)
            if path is None and split == "train":
                path = need_file(root, [pattern], self)
            if path is not None:
                found += self._part(path, split, folder)
        return found

    def _part(self, path: Path, split: str, folder: str) -> list[LabelledImage]:
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
        places = [path.parent / folder, *path.parent.parent.glob(f"*Original Images/*{folder}*")]
        files: dict[str, Path] = {}
        for place in places:
            files = files or _files(place)
        return [
            LabelledImage(
                f"{split}/{name}", f"{split}/{name}", files.get(name, places[0] / f"{name}.png"), targets, split
            )
            for name, targets in zip(names, zip(*columns, strict=True), strict=True)
        ]


def pictures_of(layout: LabelLayout, marker: str, held_out: str = "val") -> PictureLayout:
    """Make a layout for pre-training of a labelled one: its images, and none of its labels.

    Images that are listed but not there are left out: an archive in part is enough to learn from.

    Args:
        layout: The labelled layout.
        marker: Pattern of a file that only this layout has.
        held_out: What its test images are for here; pre-training looks at its reconstructions of them alone.
    """

    def find(root: Path) -> list[Picture]:
        if next(iter(root.glob(marker)), None) is None:
            return []
        listed = layout.find(root)
        absent = [item for item in listed if not item.image.is_file()]
        if absent:
            say(f"note: {len(absent)} of {len(listed)} images that {layout.name} lists are not there, "
                f"first {public_name(absent[0].image)}")  # fmt: skip
        return [
            Picture(item.case_id, item.patient_id, item.image, held_out if item.split == "test" else item.split)
            for item in listed
            if item.image.is_file()
        ]

    name = layout.name.lower().replace(" ", "")
    return PictureLayout(name=name, tree=layout.tree, find=find, reader=layout.reader)


IDRID = pictures_of(IDRiD(), "**/*Disease Grading_Training Labels.csv")
APTOS = pictures_of(APTOS2019(), "train_images")
EYEPACS = pictures_of(EyePACS2015(), "trainLabels.csv")
RFMID = pictures_of(RFMiD(), "**/*RFMiD_Training_Labels.csv")
