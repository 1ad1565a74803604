"""MedICaT: figures of open-access papers with captions and the sentences that refer to them (Subramanian et al. 2020).

``ROOT/release/*.jsonl`` has one line per figure, with ``figures/{pdf_hash}_{fig_uri}`` next to it. The release also has
inline references to ROCO's figures (``roco_{train,val,test}_references.jsonl``), read by
:mod:`datamodules.reports.roco`.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import DataError
from common.randomness import stable_hash
from common.runtime.reporting import print_line
from datamodules.files import first_line, json_lines
from datamodules.registry import Evidence, Layout
from datamodules.reports.studies import Study
from datamodules.tree import Tree

#: Texts with fewer words, such as "Figure 1", carry no information.
MIN_WORDS = 3


class Figure(NamedTuple):
    """One line of the list.

    Attributes:
        name: File under ``figures``.
        paper: Hash of the paper; splits are made by paper.
        caption: Caption, white space collapsed; empty if there is none.
        references: Sentences that refer to the figure.
        radiology: Whether it was classified as radiology.
    """

    name: str
    paper: str
    caption: str
    references: tuple[str, ...]
    radiology: bool


def collapsed(text: Any) -> str:
    """Return a text with white space collapsed; empty for None."""
    return " ".join(str(text or "").split())


def texts_of(row: Mapping[str, Any], name: str, place: str) -> list[str]:
    """Return the nonempty texts that a row lists under a name, white space collapsed.

    Raises:
        DataError: it is not a list.
    """
    listed = row.get(name) or []
    if not isinstance(listed, list):
        raise DataError(f"{place}: {name} must be a list of texts.")
    return [text for text in map(collapsed, listed) if text]


def read_figures(path: Path) -> list[Figure]:
    """Read every line of the list of figures.

    Raises:
        DataError: a line is not JSON, or lacks ``pdf_hash`` or ``fig_uri``.
    """
    figures = []
    for number, row in enumerate(json_lines(path), 1):
        if not row.get("pdf_hash") or not row.get("fig_uri"):
            raise DataError(f"{path} line {number} has no pdf_hash or no fig_uri.")
        paper, references = str(row["pdf_hash"]), texts_of(row, "s2orc_references", f"{path} line {number}")
        caption = collapsed(row.get("s2_caption")) or collapsed(row.get("s2orc_caption"))
        radiology = row.get("radiology") in (True, "1", "true", "True")
        figures.append(Figure(f"{paper}_{row['fig_uri']}", paper, caption, tuple(references), radiology))
    return figures


def studies_of_texts(name: str, patient: str, image: Path, texts: list[str], split: str | None) -> list[Study]:
    """Make one study per distinct text of an image with enough words."""
    usable = [text for text in dict.fromkeys(texts) if len(text.split()) >= MIN_WORDS]
    return [Study(f"{name}#{i}", patient, (image,), ("",), text, split) for i, text in enumerate(usable)]


def print_left_out(what: str, total: int, missing: int, silent: int) -> None:
    """Print how many figures have no file and how many no text."""
    if missing or silent:
        print_line(
            f"note: of {total} {what}, {missing} have no image file and {silent} no text of {MIN_WORDS} words; left out"
        )


def find_medicat(root: Tree, radiology_only: bool = True) -> list[Study]:
    """List one study for each text of each figure; empty if the root is not MedICaT.

    Raises:
        DataError: a damaged line, or none of the listed images exists.
    """
    place = _release(root)
    if place is None:
        return []
    folder = root / place
    lists = [root / file.name for file in root.listed(place) if file.suffix == ".jsonl"]
    lists = [path for path in lists if _lists_figures(path)]
    figures = [figure for path in lists for figure in read_figures(path)]
    if radiology_only:
        figures = [figure for figure in figures if figure.radiology]
    there = {file.name.rpartition("/")[2] for file in root.listed(folder / "figures")}
    present = [figure for figure in figures if figure.name in there]
    if figures and not present:
        raise DataError(f"None of the {len(figures)} figures of {lists[0]} is in {folder / 'figures'}.")
    studies = [
        studies_of_texts(f.name, f.paper, folder / "figures" / f.name, [f.caption, *f.references], None)
        for f in present
    ]
    print_left_out("MedICaT figures", len(figures), len(figures) - len(present), sum(not part for part in studies))
    return [study for part in studies for study in part]


def _release(tree: Tree) -> str | None:
    """Return the folder of a release, which contains the figures."""
    return next((place for place in ("release", "") if tree.is_dir(f"{place}/figures".lstrip("/"))), None)


def _recognise(tree: Tree) -> Evidence:
    place = _release(tree)
    if place is None:
        return Evidence(0, missing="release/figures/")
    lists = [file.name for file in tree.listed(place) if file.suffix == ".jsonl" and _lists_figures(tree / file.name)]
    return Evidence(3, lists[0]) if lists else Evidence(0, missing="release/*.jsonl with pdf_hash", near=0.5)


def _lists_figures(path: Path) -> bool:
    """Whether the first line of a file is a figure of MedICaT."""
    first = first_line(path)
    return '"pdf_hash"' in first and '"fig_uri"' in first


def hashed_split(paper: str) -> str:
    """Hold out one paper in a hundred for validation and one for testing, the same ones every time."""
    place = stable_hash("medicat", paper) % 100
    return {0: "val", 1: "test"}.get(place, "train")


_TABLES = ("release/*.jsonl", "*.jsonl")
MEDICAT = Layout(
    name="medicat",
    tree="ROOT/release/*.jsonl and ROOT/release/figures/ (figures that are radiology)",
    find=find_medicat,
    evidence=_recognise,
    tables=_TABLES,
)
MEDICAT_ALL = Layout(
    name="medicat_all",
    tree="the same, all figures",
    find=partial(find_medicat, radiology_only=False),
    evidence=_recognise,
    tables=_TABLES,
    prefer=-2,
)
