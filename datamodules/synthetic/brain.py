"""Synthetic brains in the official layouts of BrainMVP's pre-training sources and downstream tasks."""

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from common.randomness import numpy_generator
from datamodules.synthetic.anatomy import BrainCase, make_brain
from datamodules.synthetic.tables import write_table
from datamodules.volumes.reading import to_lps, write_nifti

T = TypeVar("T")
_SHAPE = (96, 112, 88)
_MORE = ("mra", "pd", "dwi", "adc")


class Tree(NamedTuple):
    """How the files of a layout are named; ``{i}`` is the number of a case.

    Attributes:
        images: File of each of :func:`datamodules.synthetic.anatomy.make_brain`'s contrasts.
        label: File of the label.
        values: Label value of background, core, oedema and enhancing tumour.
        table: Table of classes: file, header, and the row of a case by its number and whether its tumour is a mutant.
    """

    images: dict[str, str]
    label: str | None = None
    values: tuple[int, ...] = (0, 1, 2, 4)
    table: tuple[str, tuple[str, ...], Callable[[int, bool], tuple[object, ...]]] | None = None


def _files(pattern: str, names: dict[str, str]) -> dict[str, str]:
    """Return a file for each contrast, ``*`` being what the layout calls it."""
    return {contrast: pattern.replace("*", name) for contrast, name in names.items()}


_OLD_NAMES = {"t1n": "t1", "t1c": "t1ce", "t2w": "t2", "t2f": "flair"}
_ISLES = "sub-strokecase{i:04d}/ses-0001"

TREES: dict[str, Tree] = {
    "brats": Tree(_files("BraTS2021_{i:05d}/BraTS2021_{i:05d}_*.nii.gz", _OLD_NAMES),
                  "BraTS2021_{i:05d}/BraTS2021_{i:05d}_seg.nii.gz"),
    "ucsf_pdgm": Tree(_files("UCSF-PDGM-{i:04d}_nifti/UCSF-PDGM-{i:04d}_*.nii.gz",
                             {"t1n": "T1", "t1c": "T1c", "t2w": "T2", "t2f": "FLAIR", "dwi": "DWI", "adc": "ADC"}),
                      "UCSF-PDGM-{i:04d}_nifti/UCSF-PDGM-{i:04d}_tumor_segmentation.nii.gz"),
    "ixi": Tree(_files("IXI{i:03d}-Guys-0828-*.nii.gz", {"t1n": "T1", "t2w": "T2", "pd": "PD", "mra": "MRA"})),
    "upenn_gbm": Tree(_files("images_structural/UPENN-GBM-{i:05d}_11/UPENN-GBM-{i:05d}_11_*.nii.gz",
                             {"t1n": "T1", "t1c": "T1GD", "t2w": "T2", "t2f": "FLAIR"}),
                      "images_segm/UPENN-GBM-{i:05d}_11_segm.nii.gz"),
    "isles22": Tree({"dwi": _ISLES + "/dwi/sub-strokecase{i:04d}_ses-0001_dwi.nii.gz",
                     "adc": _ISLES + "/dwi/sub-strokecase{i:04d}_ses-0001_adc.nii.gz",
                     "t2f": _ISLES + "/anat/sub-strokecase{i:04d}_ses-0001_FLAIR.nii.gz"},
                    "derivatives/" + _ISLES + "/sub-strokecase{i:04d}_ses-0001_msk.nii.gz", (0, 1, 0, 1)),
    "mrbrains13": Tree(_files("TrainingData/{i}/*.nii", {"t1n": "T1", "t2w": "T1_IR", "t2f": "T2_FLAIR"}),
                       "TrainingData/{i}/LabelsForTraining.nii", (0, 5, 1, 3)),
    "vsseg": Tree({"t1c": "vs_gk_{i}/vs_gk_t1_refT1.nii.gz"}, "vs_gk_{i}/vs_gk_seg_refT1.nii.gz", (0, 1, 0, 1)),
    "brats2018": Tree(_files("{grade}/Brats18_{i:04d}_1/Brats18_{i:04d}_1_*.nii.gz", _OLD_NAMES),
                      "{grade}/Brats18_{i:04d}_1/Brats18_{i:04d}_1_seg.nii.gz"),
    "adni": Tree({"t1n": "ADNI/{i:03d}_S_{i:04d}/MPRAGE/2006-04-18/I{i}/ADNI_{i:03d}_S_{i:04d}_MR_I{i}.nii"},
                 table=("adni.csv", ("Image Data ID", "Subject", "Group"),
                        lambda i, mutant: (f"I{i}", f"{i:03d}_S_{i:04d}", "MCI" if mutant else "CN"))),
    "adhd200": Tree({"t1n": "Peking/{i:07d}/session_1/anat_1/mprage.nii.gz"},
                    table=("adhd200_phenotypic.csv", ("ScanDir ID", "Site", "DX"),
                           lambda i, mutant: (i, 1, 1 if mutant else 0))),
    "abide1": Tree({"t1n": "Caltech/{i:07d}/session_1/anat_1/mprage.nii.gz"},
                   table=("Phenotypic_V1_0b.csv", ("SITE_ID", "SUB_ID", "DX_GROUP"),
                          lambda i, mutant: ("CALTECH", i, 1 if mutant else 2))),
}  # fmt: skip
_SOURCES = ("brats", "ucsf_pdgm", "ixi")


def _write_case(root: Path, tree: Tree, brain: BrainCase, index: int, missing: int = 0) -> None:
    """Write the files of one case, but for the last ``missing`` of its images."""
    names = {"i": index, "grade": "LGG" if brain.mutant else "HGG"}
    for contrast in list(tree.images)[: len(tree.images) - missing]:
        image = np.rint(brain.images[contrast]).astype(np.int16)
        write_nifti(root / tree.images[contrast].format(**names), *to_lps(image))
    if tree.label is not None:
        label: NDArray[np.uint8] = np.array(tree.values, dtype=np.uint8)[brain.label]
        write_nifti(root / tree.label.format(**names), *to_lps(label))


def _in_threads(write: Callable[[int], T], indices: Iterable[int]) -> list[T]:
    """Write cases on all cores: filters and compression release the interpreter lock; each case has its own seed."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(write, indices))


def write_tree(root: Path, num_cases: int, seed: int, layout: str, shape: Sequence[int] = _SHAPE) -> None:
    """Write brains in the layout of a downstream task, with its table of classes if it has one."""
    tree = TREES[layout]

    def write(index: int) -> tuple[object, ...] | None:
        brain = make_brain(numpy_generator("synthetic", layout, seed, index), shape, _MORE)
        _write_case(root, tree, brain, index)
        return tree.table[2](index, brain.mutant) if tree.table is not None else None

    rows = _in_threads(write, range(1, num_cases + 1))
    if tree.table is not None:
        write_table(root / tree.table[0], tree.table[1], [row for row in rows if row is not None])


def write_brain_archive(
    root: Path, num_cases: int, seed: int, shape: Sequence[int] = _SHAPE, half_incomplete: bool = False
) -> None:
    """Write brains of three sources with different sets of sequences, each in its official layout, on one grid.

    Of every eight studies one lacks a sequence and one has a single sequence; or every second lacks two.
    """

    def write(index: int) -> None:
        source = _SOURCES[index % len(_SOURCES)]
        tree = TREES[source]
        brain = make_brain(numpy_generator("synthetic", "brain_archive", seed, index), shape, _MORE)
        missing = 2 * (index % 2) if half_incomplete else {3: 1, 6: len(tree.images) - 1}.get(index % 8, 0)
        _write_case(root / source, tree, brain, index, missing)

    _in_threads(write, range(num_cases))


BRAIN_WRITERS: dict[str, Callable[[Path, int, int], None]] = {
    "brain_archive": write_brain_archive,
    **{name: partial(write_tree, layout=name) for name in TREES if name not in _SOURCES},
}
