"""MELINDA: figures of biology papers with captions and experiment methods (Wu et al. 2021).

``ROOT/{train,dev,test}.csv`` with ``figure_file``, ``caption`` and four label columns, ``ROOT/melinda_images/``.
"""

from collections import Counter
from pathlib import Path
from typing import NamedTuple

from common.errors import DataError
from common.runtime.reporting import print_line
from datamodules.files import listing
from datamodules.listed_files import path_under
from datamodules.registry import Layout, marked
from datamodules.reports.medicat import collapsed
from datamodules.reports.studies import Study
from datamodules.tables import read_table
from datamodules.tree import Tree

TASKS = ("i_meth", "p_meth", "i_meth_label", "p_meth_label")
_FILES = {"train": "train.csv", "val": "dev.csv", "test": "test.csv"}
#: Published numbers of rows. They are second-hand, so a difference is noted, not refused.
_ROWS = {"train": 4344, "val": 449, "test": 578}


class CaptionedFigure(NamedTuple):
    """One figure, or part of one, with a caption and a class.

    Attributes:
        case_id: Unique name.
        patient_id: The figure, which several rows may share.
        image: Its file.
        text: Caption, white space collapsed; may be empty.
        label: The class; empty if the task defines none.
        split: ``train``, ``val`` or ``test``.
    """

    case_id: str
    patient_id: str
    image: Path
    text: str
    label: str
    split: str | None


def read_melinda(root: Tree, task: str = "p_meth_label") -> list[CaptionedFigure]:
    """List MELINDA's rows in its official splits; empty if the root is another archive.

    Warns if their numbers are not the published ones.

    Raises:
        DataError: an unknown task, or a table that lacks a column.
    """
    if task not in TASKS:
        raise DataError(f"MELINDA has no task {task!r}; it has {', '.join(TASKS)}.")
    if not root.is_file("train.csv") or not root.is_dir("melinda_images"):
        return []
    rows = []
    for split, name in _FILES.items():
        path = root / name
        if not root.is_file(name):
            continue
        table = read_table(path)
        missing = [column for column in ("figure_file", "caption", task) if column not in table.columns]
        if missing:
            raise DataError(f"{path} has no column {', '.join(missing)}; it has {listing(table.columns)}.")
        for number, row in enumerate(table.to_dict("records")):
            figure = row["figure_file"]
            text = "" if row["caption"].lower() == "nan" else collapsed(row["caption"])
            image = path_under(root / "melinda_images", figure or "(no image)", path)
            rows.append(CaptionedFigure(f"{split}/{number}-{figure}", figure, image, text, row[task], split))
    counts = Counter(row.split for row in rows)
    if any(counts[split] != number for split, number in _ROWS.items()):
        here, published = (", ".join(f"{numbers[split]} {split}" for split in _ROWS) for numbers in (counts, _ROWS))
        print_line(f"warning: {root} has other numbers of rows ({here}) than MELINDA as published ({published})")
    return rows


def _find(root: Tree) -> list[Study]:
    """List training and validation rows as images with text, for calibration: no labels, no test split."""
    rows = [row for row in read_melinda(root) if row.split != "test"]
    held = {row.patient_id for row in rows if row.split == "val"}
    return [
        Study(row.case_id, row.patient_id, (row.image,), ("",), row.text or None, row.split)
        for row in rows
        if row.split == "val" or row.patient_id not in held
    ]


MELINDA = Layout(
    name="melinda",
    tree="ROOT/{train,dev,test}.csv and ROOT/melinda_images/",
    find=_find,
    evidence=marked("train.csv", "melinda_images"),
    tables=tuple(_FILES.values()),
)
