"""Findings of the COVID-19 image data collection: COVID-19 or not, viral or bacterial.

Older tables spell findings ``COVID-19, ARDS`` and ``Streptococcus``, newer ones ``Pneumonia/Viral/COVID-19`` and
``Pneumonia/Bacterial/Streptococcus``.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

from common.errors import DataError
from common.pseudonyms import public_name
from datamodules.files import listing, short
from datamodules.ids import check_subjects
from datamodules.labelled.layout import LabelLayout, LabelledImage, need_columns, need_file
from datamodules.splits import patients_of_files
from datamodules.tables import read_table
from datamodules.tree import Tree

Task = Literal["covid", "viral"]
_CLASSES = {"covid": ("COVID-19",), "viral": ("viral",)}
_COLUMNS = ("patientid", "finding", "view", "modality", "filename")
_IMAGES = "images"
# Not yet read, unknown, or healthy: none of these is another pneumonia.
_NO_LABEL = ("", "todo", "unknown", "no finding")
_COVID = re.compile(r"\bcovid-19\b")
# A whole word: Haemophilus influenzae is a bacterium.
_VIRAL = re.compile(r"\b(viral|covid-19|sars|mers|varicella|influenza|herpes)\b")
_BACTERIAL = re.compile(
    r"\b(bacterial|streptococcus|klebsiella|legionella|mycoplasma|e\. ?coli|chlamydophila|nocardia|staphylococcus)\b"
)


class CovidFindings(LabelLayout):
    """X-rays of the COVID-19 image data collection with a finding.

    A file with several rows is one image, and patients who share a file count as one. Images with the same note are one
    group.

    Args:
        task: ``covid``: COVID-19 against all other findings; ``viral``: viruses including COVID-19 against bacteria,
            without all other images.
        views: Views to keep.
    """

    name = "COVID-19 image data collection"
    tree = "ROOT/{metadata.csv, images/}"

    def __init__(self, task: Task = "covid", views: Sequence[str] = ("PA", "AP", "AP Supine")) -> None:
        if task not in _CLASSES:
            raise ValueError(f"`task` must be one of {', '.join(get_args(Task))}, got {task!r}.")
        self.task, self.views = task, tuple(views)
        self.classes = _CLASSES[task]

    def _find(self, root: Tree) -> list[LabelledImage]:
        """List the images of the task.

        Raises:
            DataError: the table or a column is missing, a file name leads outside the folder of images, rows of a file
                disagree, or no image fits the task and the views.
        """
        path = need_file(root, ["metadata.csv"], self)
        table = read_table(path)
        table.columns = table.columns.str.lower().str.replace(" ", "_")
        need_columns(path, table, _COLUMNS)
        check_subjects(path, table["patientid"])
        table = table[(table["filename"] != "") & (table["modality"].str.lower() == "x-ray")]
        if "folder" in table:  # the oldest tables have none
            table = table[table["folder"] == _IMAGES]
        table = table.assign(patient=patients_of_files(table["filename"].tolist(), table["patientid"].tolist()))
        found: dict[str, LabelledImage] = {}
        for row in table.to_dict("records"):
            image = self._image(root.root, path, row)
            if image is None:
                continue
            known = found.setdefault(image.case_id, image)
            if known.targets != image.targets:
                raise DataError(f"{path} lists {public_name(image.case_id)} with findings that disagree, such as "
                                f"{short(row['finding'])}.")  # fmt: skip
            found[image.case_id] = known._replace(group=known.group or image.group)
        if not found:
            present = listing(f"{view or 'blank'} ({count})" for view, count in table["view"].value_counts().items())
            raise DataError(
                f"{path} lists no X-ray of the views {', '.join(self.views)} with a finding of the task {self.task}; "
                f"the views of its X-rays are {present}."
            )
        return list(found.values())

    def _image(self, root: Path, path: Path, row: Mapping[str, str]) -> LabelledImage | None:
        """Make an image from a row; None if the task does not include it.

        Raises:
            DataError: the file name leads outside the folder of images.
        """
        target = self._target(row["finding"].lower())
        if target is None or row["view"].lower() not in (view.lower() for view in self.views):
            return None
        name = row["filename"]
        if Path(name).name != name:
            raise DataError(f"{path} names the image '{public_name(name)}', which does not lie in {root / _IMAGES}.")
        note = " ".join(row.get("clinical_notes", "").lower().split())
        return LabelledImage(name, row["patient"], root / _IMAGES / name, (target,), group=note)

    def _target(self, finding: str) -> float | None:
        """Return the target of a finding in lower case; None if the task does not include it."""
        if finding in _NO_LABEL:
            return None
        if self.task == "covid":
            return float(bool(_COVID.search(finding)))
        viral, bacterial = bool(_VIRAL.search(finding)), bool(_BACTERIAL.search(finding))
        return None if viral == bacterial else float(viral)
