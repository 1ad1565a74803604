"""ROCO: radiology figures of PubMed Central with captions (Pelka et al. 2018), under either naming of its images.

``ROOT/{train,val or validation,test}/radiology/{captions.txt,dlinks.txt,images/}``. Downloaded images are named
``{PMCID}_{original name}``, those of the authors' archive ``ROCO_00020.jpg``. ROCOv2 has
``*_captions.csv`` and an image folder per split. MedICaT's release has sentences of the papers about ROCO's figures,
``net/nfs2.corp/allennlp/sanjays/roco_files/roco_{train,val,test}_references.jsonl``, used as texts of these figures.
"""

from pathlib import Path
from typing import NamedTuple

import pandas as pd

from common.errors import DataError
from common.runtime.reporting import print_line
from datamodules.files import json_lines, listing, read_lines
from datamodules.registry import Layout, marked
from datamodules.reports.medicat import (
    collapsed,
    find_medicat,
    hashed_split,
    print_left_out,
    studies_of_texts,
    texts_of,
)
from datamodules.reports.studies import Study
from datamodules.tables import read_table
from datamodules.tree import Tree

_FOLDERS = {"train": ("train",), "val": ("val", "validation", "valid"), "test": ("test",)}
_SUFFIXES = (".jpg", ".jpeg", ".png")


class Caption(NamedTuple):
    """One figure of ROCO.

    Attributes:
        name: ROCO's number, such as ``ROCO_00020``.
        text: Caption, white space collapsed; may be empty.
        paper: PMC number of its paper; empty if the links do not give it.
        fetched: File name given by the download script; empty likewise.
    """

    name: str
    text: str
    paper: str = ""
    fetched: str = ""


def read_captions(path: Path) -> list[Caption]:
    """Read ``captions.txt``: number, tab, caption; a caption may hold further tabs. All lines are read.

    Raises:
        DataError: a line has no number.
    """
    found = []
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        name, _, text = line.partition("\t")
        if not name.strip():
            raise DataError(f"{path} line {number} has no number before the tab.")
        found.append(Caption(name.strip(), collapsed(text)))
    return found


def read_links(path: Path) -> dict[str, tuple[str, str]]:
    """Read ``dlinks.txt``: number to PMC number and to the file name given by the download script."""
    links: dict[str, tuple[str, str]] = {}
    if not path.is_file():
        return links
    for line in read_lines(path):
        parts = line.split("\t")
        if len(parts) < 3:
            continue
        archive = next((word for word in parts[1].split() if word.endswith(".tar.gz")), "")
        paper = archive.rsplit("/", 1)[-1].removesuffix(".tar.gz")
        links[parts[0].strip()] = (paper, f"{paper}_{parts[2].strip()}")
    return links


def read_part(folder: Path) -> list[Caption]:
    """Read the captions of a split's folder with their papers.

    Raises:
        DataError: as :func:`read_captions`.
    """
    links = read_links(folder / "dlinks.txt")
    return [caption._replace(**dict(zip(("paper", "fetched"), links.get(caption.name, ("", "")), strict=True)))
            for caption in read_captions(folder / "captions.txt")]  # fmt: skip


def image_of(caption: Caption, folder: Path, there: set[str]) -> Path | None:
    """Return the image of a caption under either name; None if it is missing."""
    names = [f"{caption.name}{suffix}" for suffix in _SUFFIXES] + ([caption.fetched] if caption.fetched else [])
    found = next((name for name in names if name in there), None)
    return None if found is None else folder / found


def _references(*roots: Tree) -> dict[str, list[str]]:
    """Return MedICaT's sentences about ROCO's figures, each once, by the image name of the download script."""
    texts: dict[str, dict[str, None]] = {}
    for path in (path for root in roots for path in root.glob("**/roco_*_references.jsonl")):
        for row in json_lines(path):
            if name := collapsed(row.get("roco_image_id")):
                found = texts_of(row, "gorc_references", str(path))
                texts.setdefault(name, {}).update(dict.fromkeys(found))
    return {name: list(found) for name, found in texts.items()}


def _part_folder(root: Tree, split: str) -> Path | None:
    for name in _FOLDERS[split]:
        if root.is_file(f"{name}/radiology/captions.txt"):
            return root / f"{name}/radiology"
    return None


def find_roco(root: Tree, medicat: Tree | None = None) -> list[Study]:
    """List one study for each text of each figure that is there, official splits; empty if the root is not ROCO.

    Args:
        root: The archive.
        medicat: MedICaT's release, whose sentences about ROCO's figures are read as well as those under ``root``.

    Raises:
        DataError: a damaged list, or no image exists.
    """
    folders = {split: folder for split in _FOLDERS if (folder := _part_folder(root, split)) is not None}
    if not folders:
        return _find_v2(root)
    references = _references(*filter(None, (root, medicat)))
    studies: list[Study] = []
    total = missing = silent = joined = 0
    for split, folder in folders.items():
        images = folder / "images"
        there = {file.name.rpartition("/")[2] for file in root.listed(images)}
        for caption in read_part(folder):
            total += 1
            image = image_of(caption, images, there)
            if image is None:
                missing += 1
                continue
            sentences = references.get(caption.fetched, [])
            texts = [caption.text, *sentences]
            found = studies_of_texts(f"{split}/{caption.name}", f"{split}/{caption.name}", image, texts, split)
            joined += len(sentences)
            silent += not found
            studies += found
    if not studies:
        raise DataError(
            f"{root} has {total} captions of ROCO, but none of their images (ROCO_00020.jpg or PMC123_name.jpg under "
            f"radiology/images); its fetch script downloads them."
        )
    print_left_out("ROCO figures", total, missing, silent)
    if references:
        print_line(f"note: {joined} of {sum(map(len, references.values()))} sentences that MedICaT has about ROCO "
            f"figures refer to images that exist here")  # fmt: skip
    elif medicat is not None:
        print_line(f"note: no sentence about a ROCO figure (roco_*_references.jsonl) is under {medicat} or {root}: "
            f"ROCO's figures have only their captions")  # fmt: skip
    return studies


def _find_v2(root: Tree) -> list[Study]:
    """List the figures of ROCOv2: ``{train,valid,test}_captions.csv`` with ID and Caption, and image folders."""
    studies: list[Study] = []
    total = missing = silent = 0
    for split in _FOLDERS:
        tables = [path for name in _FOLDERS[split] for path in root.glob(f"{name}*_captions.csv")]
        if not tables:
            continue
        table: pd.DataFrame = read_table(tables[0])
        if not {"ID", "Caption"} <= set(table.columns):
            raise DataError(f"{tables[0]} needs the columns ID and Caption, it has {listing(table.columns)}.")
        folder = next((name for name in _FOLDERS[split] if root.is_dir(name)), split)
        there = {file.stem: root / file.name for file in root.listed(folder)}
        for name, text in zip(table["ID"], table["Caption"], strict=True):
            total += 1
            missing += name not in there
            if name in there:
                found = studies_of_texts(f"{split}/{name}", f"{split}/{name}", there[name], [collapsed(text)], split)
                silent += not found
                studies += found
    print_left_out("ROCOv2 figures", total, missing, silent)
    return studies


def find_medicat_roco(root: Tree) -> list[Study]:
    """List MedICaT under ``root/medicat`` and ROCO under ``root/roco``, for UMD; empty unless both exist.

    ROCO's figures have captions, and the sentences about them from MedICaT's release.
    """
    if not root.is_dir("medicat") or not root.is_dir("roco"):
        return []
    medicat = root.sub("medicat")
    figures = [study._replace(split=hashed_split(study.patient_id)) for study in find_medicat(medicat)]
    captions = find_roco(root.sub("roco"), medicat)
    return [*figures, *captions] if figures and captions else []


_TABLES = ("*/radiology/*.txt", "*_captions.csv", "**/roco_*_references.jsonl")
ROCO = Layout(
    name="roco",
    tree="ROOT/{train,val,test}/radiology/{captions.txt,dlinks.txt,images/}, or ROCOv2",
    find=find_roco,
    evidence=marked(("*/radiology/captions.txt", "train*_captions.csv", "*_captions.csv")),
    tables=_TABLES,
)
MEDICAT_ROCO = Layout(
    name="medicat_roco",
    tree="ROOT/medicat and ROOT/roco, each as above",
    find=find_medicat_roco,
    evidence=marked("medicat", "roco"),
    tables=(*(f"roco/{name}" for name in _TABLES), "medicat/release/*.jsonl", "medicat/*.jsonl"),
    prefer=1,
)
