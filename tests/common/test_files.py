import errno
import os
from pathlib import Path

import pytest

from common import files
from common.errors import StorageError
from common.files import owned, remove_empty_folders, remove_file, remove_tree, whole_file, whole_folder, write_text


@pytest.fixture
def folders(tmp_path):
    """Return a folder of ours, and one beside it that is not, with a file in each."""
    owner, other = tmp_path / "owner", tmp_path / "other"
    for folder in (owner, other):
        folder.mkdir()
        (folder / "file").write_text("old")
    return owner, other


OUTSIDE = (
    "../other",
    "../other/file",
    "./../../other",
    "sub/../../other/file",
    "..",
    ".",
    "link/file",
    "../owner",
    "a\0b",
)


@pytest.mark.parametrize("path", OUTSIDE)
@pytest.mark.parametrize("act", [remove_tree, remove_file, lambda path, owner: write_text(path, "new", owner)])
def test_nothing_outside_the_owner_is_removed_or_replaced(folders, path, act):
    owner, other = folders
    (owner / "link").symlink_to(other)
    with pytest.raises(StorageError, match="does not lie inside"):
        act(owner / path, owner)
    with pytest.raises(StorageError, match="does not lie inside"):
        act(other / "file", owner)
    assert (other / "file").read_text() == (owner / "file").read_text() == "old"


def test_of_a_link_the_link_alone_is_removed(folders):
    owner, other = folders
    (owner / "link").symlink_to(other)
    remove_tree(owner / "link", owner)
    assert not (owner / "link").exists()
    assert (other / "file").is_file()
    remove_tree(owner / "gone", owner)
    remove_file(owner / "gone", owner)


def test_an_owner_behind_a_link_is_an_owner(folders, tmp_path):
    owner, _ = folders
    (tmp_path / "link").symlink_to(owner)
    assert owned(tmp_path / "link" / "file", tmp_path / "link") == tmp_path / "link" / "file"
    assert owned(tmp_path / "link" / "file", owner)


def test_empty_folders_go_up_to_the_owner(tmp_path):
    (tmp_path / "owner/kept").mkdir(parents=True)
    (tmp_path / "owner/runs/a/b").mkdir(parents=True)
    remove_empty_folders(tmp_path / "owner/runs/a/b", tmp_path / "owner")
    assert [path.name for path in (tmp_path / "owner").iterdir()] == ["kept"]
    remove_empty_folders(tmp_path / "owner/kept", tmp_path / "owner")
    remove_empty_folders(tmp_path / "owner", tmp_path / "owner")
    assert (tmp_path / "owner").is_dir()


def fail_half_way(path, error):
    with whole_file(path) as temporary:
        temporary.write_text("half")
        raise error


def test_a_file_is_written_whole_or_not_at_all(folders):
    owner, _ = folders
    with pytest.raises(KeyboardInterrupt):
        fail_half_way(owner / "file", KeyboardInterrupt())
    assert (owner / "file").read_text() == "old"
    with whole_file(owner / "file", durable=True) as temporary:
        temporary.write_text("new")
        assert temporary.name.endswith(".file")  # keeps what writers read off a suffix
        assert (owner / "file").read_text() == "old"
    assert [path.name for path in owner.iterdir()] == ["file"]
    assert (owner / "file").read_text() == "new"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk or the quota is full. Free some space"),
        (OSError("4096 requested and 0 written"), "the disk or the quota is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk or the quota is full"),
        (OSError(errno.EROFS, "Read-only file system"), "read-only file system. Allow it, or choose another"),
        (OSError(errno.EACCES, "Permission denied"), "permission denied. Allow it"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
    ],
)
def test_what_the_file_system_refuses_is_one_sentence(folders, error, words):
    owner, _ = folders
    with pytest.raises(StorageError) as refused:
        fail_half_way(owner / "file", error)
    assert words in str(refused.value)
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) <= 300
    assert [path.name for path in owner.iterdir()] == ["file"]
    assert (owner / "file").read_text() == "old"


def test_what_dead_processes_left_is_removed_and_what_the_living_write_is_not(tmp_path):
    (tmp_path / "names").mkdir()
    with whole_file(tmp_path / "names/x.json") as mine:
        mine.touch()
    dead = mine.with_name(mine.name.replace(f"-{os.getpid()}-", "-4194305-"))  # above the largest process id
    alive = mine.with_name(mine.name.replace(f"-{os.getpid()}-", f"-{os.getppid()}-"))
    elsewhere = mine.with_name(".another" + mine.name[1:])
    for path in (dead, alive, elsewhere):
        path.touch()
    files._remove_leftovers_once.cache_clear()
    write_text(tmp_path / "names/y.json", "{}")
    assert {p.name for p in (tmp_path / "names").iterdir()} == {"x.json", "y.json", alive.name, elsewhere.name}
    os.utime(elsewhere, (1, 1))
    files._remove_leftovers_once.cache_clear()
    write_text(tmp_path / "names/y.json", "{}")
    assert not elsewhere.exists()


def test_names_that_are_no_unicode_can_be_stored(tmp_path):
    write_text(tmp_path / "a.csv", os.fsdecode(b"caf\xe9"))
    assert (tmp_path / "a.csv").read_bytes() == b"caf\\udce9"
    assert Path(tmp_path / "a.csv").stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_files_that_belong_together_are_replaced_together(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("config.json", "weights", "mine"):
        (out / name).write_text("old")
    with pytest.raises(StorageError):
        fail_in_folder(out, OSError(errno.ENOSPC, "No space left on device"))
    assert {path.name: path.read_text() for path in out.iterdir()} == dict.fromkeys(
        ("config.json", "weights", "mine"), "old"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with whole_folder(out, "config.json") as folder:
        (folder / "part").mkdir()
        for name in ("config.json", "weights", "part/config.json"):
            (folder / name).write_text("new")
    found = {path.relative_to(out).as_posix(): path.read_text() for path in out.rglob("*") if path.is_file()}
    assert found == {"config.json": "new", "weights": "new", "part/config.json": "new", "mine": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def fail_in_folder(out, error):
    with whole_folder(out, "config.json") as folder:
        (folder / "weights").write_text("half")
        raise error


def test_without_its_last_file_a_folder_is_not_taken_for_complete(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    moved = []

    def die(source, target, owner):
        moved.append(target.name)
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "move", die)
    with pytest.raises(KeyboardInterrupt), whole_folder(out, "config.json") as folder:
        (folder / "a").write_text("new") and (folder / "config.json").write_text("new")
    assert moved == ["a"]
    assert list(out.iterdir()) == []
