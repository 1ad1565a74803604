import os
import tracemalloc

import pytest

from common.errors import DataError
from datamodules.tree import Tree, as_tree, kind_of, stem_of, suffix_of


def touch(root, *names, content=b""):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


@pytest.mark.parametrize(
    ("name", "suffix", "stem", "kind"),
    [("a/T1.NII.GZ", ".nii.gz", "T1", "volume"), ("x.seg.nrrd", ".seg.nrrd", "x", "volume"),
     ("sub-1.v2_T1w.nii", ".nii", "sub-1.v2_T1w", "volume"), ("eye.JPEG", ".jpeg", "eye", "image"),
     ("README", "", "README", "text"), (".DS_Store", "", ".DS_Store", "other"), ("a.dcm.gz", ".dcm.gz", "a", "refused"),
     ("1.2.840.113", ".113", "1.2.840", "other"), ("._a.nii.gz", ".nii.gz", "._a", "volume"),
     ("x.hdr", ".hdr", "x", "refused"), ("IM0001", "", "IM0001", "other")],
)  # fmt: skip
def test_suffixes_in_any_case(name, suffix, stem, kind):
    assert (suffix_of(name), stem_of(name), kind_of(name)) == (suffix, stem, kind)


def test_names_are_looked_up_and_not_walked_for_again(tmp_path, monkeypatch):
    root = touch(tmp_path, "b/2.nii", "b/c/1.nii", "a.csv", ".git/x", "b/._2.nii", content=b"12")
    tree = Tree(root)
    monkeypatch.setattr(os, "scandir", None)
    monkeypatch.setattr(os, "stat", None)
    assert [file.name for file in tree.files] == ["a.csv", "b/._2.nii", "b/2.nii", "b/c/1.nii"]
    assert [file.name for file in tree.images] == ["b/2.nii", "b/c/1.nii"]
    assert len(tree) == 4
    assert tree.is_file("b/2.nii")
    assert tree.get(root / "b/2.nii").size == 2
    assert not tree.is_file("b")
    assert tree.is_dir(root)
    assert tree.is_dir("b/c")
    assert tree.folders() == ["b"]
    assert tree.folders("nowhere") == []
    assert [file.name for file in tree.listed("b")] == ["b/._2.nii", "b/2.nii"]
    assert [file.name for file in tree.under("b", [".nii"])] == ["b/._2.nii", "b/2.nii", "b/c/1.nii"]
    assert tree / "a.csv" == root / "a.csv"
    assert as_tree(tree) is tree
    below = tree.sub("b")
    assert [file.name for file in below.files] == ["._2.nii", "2.nii", "c/1.nii"]
    assert below.get(root / "b/c/1.nii").folder == "c"


@pytest.mark.parametrize(
    "pattern", ["*", "*/*.nii", "**/*.nii", "b/**/1.nii", "b/c", "**/c", "[ab]*", "x/*", "**/b/*.nii"]
)
def test_patterns_are_those_of_pathlib(tmp_path, pattern):
    root = touch(tmp_path, "b/2.nii", "b/c/1.nii", "a.csv", "d/b/3.nii")
    assert Tree(root).glob(pattern) == sorted(root.glob(pattern))


def test_links_are_followed_and_rings_end(tmp_path):
    root, other = tmp_path / "root", touch(tmp_path / "other", "1.nii", content=b"1")
    touch(root, "a/2.nii")
    (root / "linked").symlink_to(other)
    (root / "a/up").symlink_to(root)
    (root / "again").symlink_to(other)
    (root / "a/gone.nii").symlink_to("../.git/annex/objects/x")
    tree = Tree(root)
    assert [file.name for file in tree.files] == ["a/2.nii", "a/gone.nii", "again/1.nii"]
    gone = tree.get("a/gone.nii")
    assert (gone.size, gone.link) == (-1, "../.git/annex/objects/x")


def test_roots_that_cannot_be_walked(tmp_path):
    with pytest.raises(DataError, match="is not a folder"):
        Tree(tmp_path / "nowhere")


def test_links_without_content_are_refused_with_the_remedy(tmp_path):
    touch(tmp_path, *(f"{i}.nii.gz" for i in range(39)), content=b"x" * 400)
    assert Tree(tmp_path).check_content() is None
    (tmp_path / "39.nii.gz").symlink_to(".git/annex/objects/39")
    words = "1 of 40 files are links without content: run datalad get ."
    assert Tree(tmp_path).check_content() == words
    (tmp_path / "40.nii.gz").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    (tmp_path / "41.nii.gz").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    with pytest.raises(DataError, match="3 of 42 files are links without content: run git lfs pull in"):
        Tree(tmp_path).check_content()


def test_a_hundred_thousand_files_cost_one_walk_and_little_memory(tmp_path, monkeypatch):
    """Names are made up: the walk sees what ``scandir`` says (archives.md, case 14)."""
    calls = {"scandir": 0, "stat": 0}

    class Entry:
        def __init__(self, folder, name, below):
            self.name, self.path, self.below = name, f"{folder}/{name}", below

        def is_dir(self):
            return self.below

        def is_symlink(self):
            return False

        def stat(self):
            calls["stat"] += 1
            return os.stat_result((0,) * 10)

    class Listing(list):
        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

    def scandir(folder):
        calls["scandir"] += 1
        names = [f"sub-{i:05}" for i in range(2500)] if str(folder) == str(tmp_path) else []
        files = [f"{os.path.basename(folder)}_T1w_{i:02}.nii.gz" for i in range(40)] if not names else []
        return Listing(
            [Entry(str(folder), name, True) for name in names] + [Entry(str(folder), n, False) for n in files]
        )

    monkeypatch.setattr(os, "scandir", scandir)
    tracemalloc.start()
    tree = Tree(tmp_path)
    tree.is_file("sub-00000/x")
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(tree) == 100_000
    assert calls == {"scandir": 2501, "stat": 100_000}
    assert size < 400 * 100_000
