"""Synthetic brains in the official layouts of BrainMVP's pre-training sources and downstream tasks."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from common.randomness import numpy_generator
from datamodules.synthetic.anatomy import BrainCase, make_brain
from datamodules.synthetic.tables import packaged, write_table
from datamodules.volumes.reading import to_lps, write_nifti

T = TypeVar("T")
_SHAPE = (96, 112, 88)
_MORE = ("mra", "pd", "dwi", "adc")


TREES: dict[str, dict[str, Any]] = packaged("layouts.yaml")["brains"]
_SOURCES = ("brats", "ucsf_pdgm", "ixi")


def _write_case(root: Path, tree: Mapping[str, Any], brain: BrainCase, index: int, missing: int = 0) -> None:
    """Write the files of one case, but for the last ``missing`` of its images."""
    names = {"i": index, "grade": "LGG" if brain.mutant else "HGG"}
    images = list(tree["images"].items())
    for contrast, file in images[: len(images) - missing]:
        image = np.rint(brain.images[contrast]).astype(np.int16)
        write_nifti(root / file.format(**names), *to_lps(image))
    if "label" in tree:
        label: NDArray[np.uint8] = np.array(tree.get("values", (0, 1, 2, 4)), dtype=np.uint8)[brain.label]
        write_nifti(root / tree["label"].format(**names), *to_lps(label))


def _in_threads(write: Callable[[int], T], indices: Iterable[int]) -> list[T]:
    """Write cases on all cores: filters and compression release the interpreter lock; each case has its own seed."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(write, indices))


def write_tree(root: Path, num_cases: int, seed: int, layout: str, shape: Sequence[int] = _SHAPE) -> None:
    """Write brains in the layout of a downstream task, with its table of classes if it has one."""
    tree = TREES[layout]
    table = tree.get("table")

    def write(index: int) -> list[str]:
        brain = make_brain(numpy_generator("synthetic", layout, seed, index), shape, _MORE)
        _write_case(root, tree, brain, index)
        return [cell.format(i=index, group=table["groups"][brain.mutant]) for cell in table["cells"]] if table else []

    rows = _in_threads(write, range(1, num_cases + 1))
    if table:
        write_table(root / table["file"], table["columns"], rows)


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
        missing = 2 * (index % 2) if half_incomplete else {3: 1, 6: len(tree["images"]) - 1}.get(index % 8, 0)
        _write_case(root / source, tree, brain, index, missing)

    _in_threads(write, range(num_cases))


BRAIN_WRITERS: dict[str, Callable[[Path, int, int], None]] = {
    "brain_archive": write_brain_archive,
    **{name: partial(write_tree, layout=name) for name in TREES if name not in _SOURCES},
}
