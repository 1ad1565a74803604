"""What opening an archive costs, counted on real trees of empty files (archives.md, case 14)."""

import os
import sys
import tracemalloc
from collections import Counter
from contextlib import contextmanager, suppress

import pytest

from common.errors import DataError
from datamodules.registry import open_archive
from datamodules.tree import Tree

COUNTED: list[Counter] = []


def _hook(event, arguments):
    if COUNTED and event in ("open", "os.scandir", "os.listdir"):
        COUNTED[-1][event] += 1


sys.addaudithook(_hook)


@contextmanager
def calls(monkeypatch):
    """Count what is asked of the file system: folders listed, files opened, and looked at one by one."""
    counts = Counter()
    with monkeypatch.context() as patched:
        for name in ("stat", "lstat", "readlink"):
            plain = getattr(os, name)
            patched.setattr(
                os, name, lambda *more, _plain=plain, **named: counts.update(["stat"]) or _plain(*more, **named)
            )
        COUNTED.append(counts)
        yield counts
        COUNTED.pop()


def plant(root, cases, pattern, names):
    """Write empty files in one folder per case; return how many files and folders there are."""
    folders = 1
    for number in range(cases):
        folder = root / pattern.format(number)
        folder.mkdir(parents=True)
        folders += pattern.count("/") + 1
        for name in names:
            open(folder / name.format(number), "wb").close()
    return cases * len(names), folders


TREES = {
    "brats2023": ("BraTS-GLI-{:05}-000",
                  [f"BraTS-GLI-{{:05}}-000-{name}.nii.gz" for name in ("t1c", "t1n", "t2f", "t2w")]),
    "bids": ("sub-{:05}/anat", [f"sub-{{:05}}_{name}.nii.gz" for name in ("T1w", "T2w", "FLAIR", "PDw")]),
    "folder": ("case{:05}", ["t1.nii.gz", "t2.nii.gz", "flair.nii.gz", "swi.mha"]),
}  # fmt: skip


@pytest.mark.parametrize("layout", TREES)
def test_sixteen_thousand_scans_cost_two_calls_a_file_at_most(layout, tmp_path, monkeypatch):
    """In each of 4,000 cases four; the walk asks one thing of each file, and nothing else does."""
    files, folders = plant(tmp_path, 4000, *TREES[layout])
    assert files == 16_000
    with calls(monkeypatch) as counts:
        archive = open_archive(tmp_path, needs={"volumes"})
    assert (archive.layout.name, len(archive.records)) == (layout, 4000)
    assert counts["os.scandir"] == folders
    assert counts["open"] <= 50
    # Of the two calls a file, one is the walk's own (an entry of os.scandir is asked for its size, unseen here).
    assert counts.total() - counts["os.scandir"] <= 100
    assert files + counts.total() <= 2 * files


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["sub-{{:05}}_{:02}_T1w.nii.gz", "IM{{:05}}{:02}", "{{:05}}{:02}.png"])
def test_a_hundred_thousand_empty_files(pattern, tmp_path, monkeypatch):
    """One walk, one look and 400 bytes a file at most, 50 files opened at most, whatever they are called."""
    files, folders = plant(tmp_path, 2500, "sub-{:05}", [pattern.format(number) for number in range(40)])
    assert files == 100_000
    tracemalloc.start()
    tree = Tree(tmp_path)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(tree) == files
    assert size < 400 * files
    with calls(monkeypatch) as counts, suppress(DataError):  # those without a suffix are refused
        open_archive(tmp_path, needs={"images"} if ".png" in pattern else {"volumes"})
    assert counts["os.scandir"] == folders
    assert counts["open"] <= 50
    # A refusal names what lies in the root, and looks which of it are folders.
    assert counts.total() - folders <= folders + 100
