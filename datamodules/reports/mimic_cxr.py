"""MIMIC-CXR-JPG with the reports of MIMIC-CXR, two products of PhysioNet, of which the first has no reports.

``ROOT/mimic-cxr-jpg/2.0.0/`` holds ``files/p10/p10000032/s50414267/<dicom_id>.jpg`` and tables such as
``mimic-cxr-2.0.0-metadata.csv.gz``; ``ROOT/mimic-cxr/2.0.0/`` holds ``mimic-cxr-reports.zip``, or its content.
The tables list the images: no image file is touched here.
"""

import gc
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd

from common.errors import DataError
from common.pseudonyms import public_name
from datamodules.files import listing
from datamodules.registry import Facts, Layout, marked
from datamodules.reports.studies import ReportFile, Study
from datamodules.reports.text import mimic_text
from datamodules.tables import read_table
from datamodules.tree import Tree

REPORTS = "mimic-cxr-reports.zip"
_MAX_DEPTH = 3
# A folder with more subfolders holds patients, not products.
_MAX_FOLDERS = 256
_SPLITS = {"validate": "val"}
_IDENTIFIERS = {"dicom_id": "[0-9A-Za-z-]+", "subject_id": "[0-9]+", "study_id": "[0-9]+"}
_MEMBER = re.compile(r"(?:.*/)?files/(p\d+/p\d+/s\d+)\.txt")


def _subfolders(tree: Tree, folder: str) -> list[str]:
    """List the folders that may hold a product."""
    names = tree.folders(folder)
    return [f"{folder}/{name}".lstrip("/") for name in names if name != "files"] if len(names) <= _MAX_FOLDERS else []


def _folders(tree: Tree) -> list[str]:
    """List the root and the folders under it, at most three levels down."""
    found, level = [""], [""]
    for _ in range(_MAX_DEPTH):
        level = [below for folder in level for below in _subfolders(tree, folder)]
        found += level
    return found


def _table_path(tree: Tree, folder: str, name: str) -> Path | None:
    """Return a product's table, of the newest version; None if it does not exist."""
    paths = tree.glob(f"{folder}/mimic-cxr-*-{name}.csv*".lstrip("/"))
    tables = [path for path in paths if path.suffix in (".csv", ".gz")]
    return tables[-1] if tables else None


def _needed_table(path: Path, needed: Sequence[str]) -> pd.DataFrame:
    """Read a table as text, without repeated rows.

    Raises:
        DataError: the file is damaged, or a column is missing.
    """
    table = read_table(path)
    missing = [column for column in needed if column not in table]
    if missing:
        raise DataError(f"{path} needs the column {missing[0]}, it has {listing(table.columns)}.")
    return table.drop_duplicates()


def _per_study(table: pd.DataFrame, path: Path, column: str) -> pd.Series:
    """Return a column by study.

    Raises:
        DataError: a study has two values.
    """
    pairs = table[["study_id", column]].drop_duplicates()
    twice = pairs.loc[pairs["study_id"].duplicated(), "study_id"]
    if len(twice):
        values = pairs.loc[pairs["study_id"] == twice.iloc[0], column]
        study, found = public_name(twice.iloc[0]), ", ".join(map(public_name, values))
        raise DataError(f"{path} gives the study {study} more than one {column}: {found}.")
    return pairs.set_index("study_id")[column]


def _with_views(images: pd.DataFrame, path: Path, views: Sequence[str]) -> pd.DataFrame:
    """Keep images of the given views.

    Raises:
        DataError: there are none.
    """
    wanted = {view.upper() for view in views}
    kept = images[images["ViewPosition"].str.upper().isin(wanted)]
    if kept.empty:
        counts = images["ViewPosition"].value_counts()
        present = listing(f"{view or 'blank'} ({count})" for view, count in counts.items())
        raise DataError(f"{path} lists no image of the views {', '.join(views)}; it has {present}.")
    return kept


def _read_images(path: Path, views: Sequence[str] | None) -> pd.DataFrame:
    """Read the table of images, ordered by study.

    Returns:
        One row per image: the columns of the table and ``stem``, the folder of its study under ``files``.

    Raises:
        DataError: a damaged or empty table, an entry that is not an identifier, a study of two patients, or no image
            of the views.
    """
    images = _needed_table(path, [*_IDENTIFIERS, "ViewPosition"]).drop_duplicates("dicom_id")
    for column, pattern in _IDENTIFIERS.items():
        odd = images.loc[~images[column].str.fullmatch(pattern), column]
        if len(odd):
            raise DataError(
                f"{path} has {len(odd)} rows whose {column} is not an identifier, first '{public_name(odd.iloc[0])}'."
            )
    if images.empty:
        raise DataError(f"{path} lists no image.")
    _per_study(images, path, "subject_id")
    if views:
        images = _with_views(images, path, views)
    images = images.sort_values("study_id", kind="stable")
    subject = images["subject_id"]
    stem = "p" + subject.str[:2] + "/p" + subject + "/s" + images["study_id"]
    return images.assign(stem=stem)


def _zipped_reports(path: Path) -> dict[str, ReportFile]:
    """List the reports of an archive by study.

    Raises:
        DataError: the archive is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            matches = [_MEMBER.fullmatch(name) for name in archive.namelist()]
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read as an archive ({error}); fetch it again.") from error
    return {match.group(1): ReportFile(path, match.group(0)) for match in matches if match}


def _find_reports(tree: Tree, folders: Sequence[str], stems: Sequence[str]) -> Mapping[str, ReportFile]:
    """Find the reports of some studies, in a zip archive or unpacked; empty if there are none at all."""
    for folder in folders:
        if tree.is_file(f"{folder}/{REPORTS}".lstrip("/")):
            zipped = _zipped_reports(tree / f"{folder}/{REPORTS}".lstrip("/"))
            if not zipped.keys().isdisjoint(stems):
                return zipped
    for folder in folders:
        files = f"{folder}/files".lstrip("/")
        if tree.is_dir(files):
            there = (stem for stem in stems if tree.is_file(f"{files}/{stem}.txt"))
            unpacked = {stem: ReportFile(tree / f"{files}/{stem}.txt") for stem in there}
            if unpacked:
                return unpacked
    return {}


def _read_findings(path: Path | None, studies: Sequence[str]) -> list[Mapping[str, str]]:
    """Read the findings of some studies, ``""`` if unknown; all unknown without the table.

    Raises:
        DataError: a damaged table.
    """
    if path is None:
        return [{} for _ in studies]
    table = _needed_table(path, ["study_id"]).drop_duplicates("study_id").set_index("study_id")
    names = [name for name in table if name != "subject_id"]
    if not names:
        return [{} for _ in studies]
    # Few rows are distinct: sharing them saves most of the memory.
    groups = table[names].reindex(studies, fill_value="").groupby(names, sort=False)
    shared = groups.head(1).to_dict("records")
    return [shared[number] for number in groups.ngroup().tolist()]


def _read_splits(path: Path, studies: Sequence[str]) -> list[str]:
    """Read the splits of some studies, ``""`` if unknown.

    Raises:
        DataError: a damaged table, or a study in two splits.
    """
    table = _needed_table(path, ["study_id", "split"])
    return _per_study(table, path, "split").replace(_SPLITS).reindex(studies, fill_value="").tolist()


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Pause the garbage collector: a million new objects without cycles would trigger it over and over."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _studies(
    images: pd.DataFrame,
    files: Path,
    reports: Mapping[str, ReportFile],
    splits: Sequence[str],
    findings: Sequence[Mapping[str, str]],
) -> list[Study]:
    """Gather the rows of each study; splits and findings are in the order of the studies."""
    edges = [*np.flatnonzero(~images["study_id"].duplicated()).tolist(), len(images)]
    ids, patients, stems = (images[name].tolist() for name in ("study_id", "subject_id", "stem"))
    names, views = (images["dicom_id"] + ".jpg").tolist(), images["ViewPosition"].tolist()
    found = []
    for (start, end), split, facts in zip(pairwise(edges), splits, findings, strict=True):
        folder, report = files / stems[start], reports.get(stems[start])
        paths = tuple(folder / name for name in names[start:end])
        found.append(Study(ids[start], patients[start], paths, tuple(views[start:end]), report, split or None, facts))
    return found


@_collector_paused()
def find_studies(root: Tree, views: Sequence[str] | None = None) -> list[Study]:
    """List the studies of MIMIC-CXR-JPG that have an image, in the order of their ids.

    Of several versions of a product the newest is taken. Ids are those of the tables, without ``p`` and ``s``.

    Args:
        root: A folder that holds both products, at most three levels down.
        views: Views to keep, such as ``AP`` and ``PA``; None: all.

    Raises:
        DataError: no split table, no reports, a table or archive that is damaged or lacks a column, a study in two
            splits or of two patients, or no image of the views.
    """
    folders = _folders(root)
    tables = [(path.name, path) for folder in folders if (path := _table_path(root, folder, "metadata"))]
    if not tables:
        return []
    _, metadata = max(tables)
    product, place = metadata.parent, root.name_of(metadata.parent)
    split_path = _table_path(root, place, "split")
    if split_path is None:
        raise DataError(f"{product} has no mimic-cxr-*-split.csv.gz beside {metadata.name}; fetch it too.")
    images = _read_images(metadata, views)
    studies = images.drop_duplicates("study_id")
    ids, stems = studies["study_id"].tolist(), studies["stem"].tolist()
    reports = _find_reports(root, folders, stems)
    if not reports:
        raise DataError(
            f"MIMIC-CXR-JPG in {product} has no reports: fetch {REPORTS} of MIMIC-CXR and put it into {product}, "
            f"or anywhere under {root} at most three folders down."
        )
    splits = _read_splits(split_path, ids)
    return _studies(
        images, product / "files", reports, splits, _read_findings(_table_path(root, place, "chexpert"), ids)
    )


MIMIC_CXR = Layout(
    name="mimic_cxr",
    tree=(
        "ROOT/mimic-cxr-jpg/VERSION/{files/pXX/pXXXXXXXX/sXXXXXXXX/<dicom_id>.jpg, mimic-cxr-*-{metadata,split"
        f"[,chexpert]}}.csv.gz}} and ROOT/mimic-cxr/VERSION/{REPORTS} (or files/pXX/pXXXXXXXX/sXXXXXXXX.txt)"
    ),
    find=find_studies,
    evidence=marked(
        tuple(f"{'*/' * depth}mimic-cxr-*-metadata.csv*" for depth in range(_MAX_DEPTH + 1)),
    ),
    facts=Facts(extract=mimic_text),
    tables=tuple(f"{'*/' * depth}{name}" for depth in range(_MAX_DEPTH + 1) for name in ("mimic-cxr-*.csv*", REPORTS)),
)
