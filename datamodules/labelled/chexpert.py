"""CheXpert: chest radiographs with labels extracted from reports, some of them uncertain."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from common.errors import DataError
from common.pseudonyms import public_name
from datamodules.labelled.layout import UNKNOWN, LabelLayout, LabelledImage, labelled_set, need_columns, need_file
from datamodules.labelled.tables import column_targets
from datamodules.registry import marked
from datamodules.tables import read_table
from datamodules.tree import Tree

Uncertain = Literal["mixed", "ones", "zeros", "ignore"]
COMPETITION = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
#: Value of an uncertain label in the mixed policy; unknown for other classes.
MIXED = {"Atelectasis": 1.0, "Cardiomegaly": 0.0, "Consolidation": 0.0, "Edema": 1.0, "Pleural Effusion": 1.0}
_FOLDERS = ("", "CheXpert-v1.0-small/", "CheXpert-v1.0/")
# The data set's folder, then the part that names the image, which includes the patient.
_PATH = r"[^/]+/((?:\w[\w-]*/)*(patient\d+)/\w[\w-]*/\w[\w.-]*)"


class CheXpert(LabelLayout):
    """CheXpert, full or small: the official validation images become the test split; all others are for training.

    Args:
        uncertain: Value of an uncertain label: ``ones``, ``zeros``, ``ignore`` (unknown), or ``mixed``: present
            for atelectasis, edema and effusion, absent for cardiomegaly and consolidation, unknown for all others.
        frontal_only: Whether lateral images are left out.
        classes: Columns of the tables.
    """

    name = "CheXpert"
    tree = "ROOT[/CheXpert-v1.0-small]/{train.csv, valid.csv, train/patient00001/study1/view1_frontal.jpg}"

    def __init__(
        self, uncertain: Uncertain = "mixed", frontal_only: bool = False, classes: Sequence[str] = COMPETITION
    ) -> None:
        if uncertain not in get_args(Uncertain):
            raise ValueError(f"`uncertain` must be one of {', '.join(get_args(Uncertain))}, got {uncertain!r}.")
        self.uncertain, self.frontal_only = uncertain, frontal_only
        self.classes = tuple(classes)

    def _find(self, root: Tree) -> list[LabelledImage]:
        """List the images of both tables.

        Raises:
            DataError: a table or a column is missing, a path is not CheXpert's, or a label is not 1, 0, -1 or blank.
        """
        train = need_file(root, [f"{folder}train.csv" for folder in _FOLDERS], self)
        valid = need_file(root, [f"{root.name_of(train.parent)}/valid.csv".lstrip("/")], self)
        return self._read(train, "train") + self._read(valid, "test")

    def _meaning(self, column: str) -> dict[str, float]:
        """Return the meaning of the labels of a class."""
        doubt = {"mixed": MIXED.get(column, UNKNOWN), "ones": 1.0, "zeros": 0.0, "ignore": UNKNOWN}[self.uncertain]
        return {"1.0": 1.0, "1": 1.0, "0.0": 0.0, "0": 0.0, "": 0.0, "-1.0": doubt, "-1": doubt}

    def _read(self, path: Path, split: str) -> list[LabelledImage]:
        """List the images of one table."""
        table = read_table(path)
        views = ["Frontal/Lateral"] if self.frontal_only else []
        need_columns(path, table, ["Path", *views, *self.classes])
        if self.frontal_only:
            table = table[table["Frontal/Lateral"] == "Frontal"]
        names = table["Path"].str.extract(f"^{_PATH}$")
        odd = table.loc[names[0].isna(), "Path"]
        if len(odd):
            raise DataError(
                f"{path} has {len(odd)} rows whose Path is not like "
                f"CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg, first '{public_name(odd.iloc[0])}'."
            )
        images, patients = names[0].tolist(), names[1].tolist()
        columns = [column_targets(path, table, name, self._meaning(name), images) for name in self.classes]
        rows = zip(images, patients, zip(*columns, strict=True), strict=True)
        return [LabelledImage(name, patient, path.parent / name, targets, split) for name, patient, targets in rows]


CHEXPERT = labelled_set(
    "chexpert",
    CheXpert(),
    marked(tuple(f"{folder}train.csv" for folder in _FOLDERS), tuple(f"{folder}valid.csv" for folder in _FOLDERS),
           ("train/patient*", "*/train/patient*")),
    [f"{folder}{name}.csv" for folder in _FOLDERS for name in ("train", "valid")],
)  # fmt: skip
