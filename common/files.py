"""Writing files and folders: completely or not at all, and never outside the folder that we own."""

import errno
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

from common.errors import StorageError
from common.names import printable, safe_name

#: A temporary file this old belongs to no living process, on whatever machine it was.
STALE_SECONDS = 24 * 3600
_TEMPORARY = re.compile(r"\.(?P<host>.+)-(?P<pid>\d+)-[0-9a-f]{8}\..+")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


def owned(path: Path, owner: Path) -> Path:
    """Return a path after checking that it may be written, replaced or removed: it lies inside a folder of ours.

    Every rename and removal in this project is checked here. Links in parent folders are followed; for a path that is
    itself a link, the location of the link counts, as the link is what would be replaced.

    Args:
        path: The path.
        owner: The run, cache or output folder.

    Raises:
        StorageError: it lies elsewhere, or is the folder itself.
    """
    simple = path.name not in ("", ".", "..") and "\0" not in str(path)
    try:
        inside = simple and path.parent.resolve().is_relative_to(owner.resolve())
    except (OSError, RuntimeError):  # a name too long, or a cycle of links
        inside = False
    if not inside:
        raise StorageError(f"{printable(path)} does not lie inside {owner}, so it was neither written nor removed.")
    return path


def remove_tree(path: Path, owner: Path) -> None:
    """Remove a folder of ours with its content; of a link only the link. A missing folder is not an error.

    Raises:
        StorageError: as :func:`owned`, or it cannot be removed.
    """
    with storage_errors(path, "removed"), suppress(FileNotFoundError):
        if owned(path, owner).is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def remove_file(path: Path, owner: Path) -> None:
    """Remove a file of ours; a missing file is not an error.

    Raises:
        StorageError: as :func:`owned`, or it cannot be removed.
    """
    with storage_errors(path, "removed"):
        owned(path, owner).unlink(missing_ok=True)


def move(source: Path, target: Path, owner: Path) -> None:
    """Rename something of ours over an existing path, as the operating system allows: not over a nonempty folder.

    Raises:
        StorageError: as :func:`owned`.
        OSError: the file system refuses.
    """
    owned(source, owner).replace(owned(target, owner))


def remove_empty_folders(path: Path, owner: Path) -> None:
    """Remove a folder and those above it, as long as they are empty, but never ``owner`` or what lies above it."""
    owner = owner.resolve()
    folder = path.resolve()
    while folder != owner and folder.is_relative_to(owner):
        try:
            owned(folder, owner).rmdir()
        except OSError:
            return
        folder = folder.parent


@contextmanager
def storage_errors(path: Path, done: str = "written") -> Iterator[None]:
    """Turn errors of the file system into one sentence.

    Raises:
        StorageError: instead of any ``OSError``, and of a ``RuntimeError`` caused by one.
    """
    try:
        yield
    except OSError as error:
        raise StorageError(storage_sentence(path, error, done)) from error
    except RuntimeError as error:  # torch.save says "unexpected pos" while it gives up on the disk's own error
        if not isinstance(error.__context__, OSError):
            raise
        raise StorageError(storage_sentence(path, error.__context__, done)) from error


def is_about_storage(error: OSError) -> bool:
    """Whether an error means that a disk is full, or that writing or reading is not permitted."""
    return _is_full(error) or error.errno in _FORBIDDEN


def _is_full(error: OSError) -> bool:
    return error.errno in _FULL or (error.errno is None and " requested and " in str(error))  # NumPy's short write


def storage_sentence(path: Path, error: OSError, done: str = "written") -> str:
    """Describe an error of the file system, and what to do."""
    if _is_full(error):
        reason, advice = "the disk or the quota is full", "Free some space"
    elif error.errno in _FORBIDDEN:
        reason, advice = (error.strerror or "no permission").lower(), "Allow it, or choose another folder"
    else:
        reason, advice = error.strerror or str(error) or type(error).__name__, "See to the folder"
    return (f"{printable(path)[-160:]} cannot be {done}: {reason}. {advice} and start the command again; what was "
            f"complete before is untouched.")  # fmt: skip


def make_folder(path: Path) -> None:
    """Make a folder and those above it.

    Raises:
        StorageError: it cannot be made.
    """
    with storage_errors(path, "made"):
        path.mkdir(parents=True, exist_ok=True)


@contextmanager
def whole_file(path: Path, owner: Path | None = None, durable: bool = False) -> Iterator[Path]:
    """Write a file completely or not at all: under a temporary name next to it, renamed when the block succeeds.

    Temporary files of dead processes in its folder are removed as well.

    Args:
        path: The file; its folder is created.
        owner: The folder that is ours; None: the one that the file lies in.
        durable: Whether it must survive a power failure: content and name reach the disk before the block ends.

    Yields:
        The temporary name, with the suffixes of ``path``.

    Raises:
        StorageError: it cannot be written; the previous content is kept.
    """
    owned(path, owner or path.parent)
    make_folder(path.parent)
    _remove_leftovers_once(path.parent)
    temporary = temporary_beside(path)
    try:
        with storage_errors(path):
            yield temporary
            if durable:
                _flush(temporary)
            temporary.replace(path)
            if durable:
                _flush(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path, last: str) -> Iterator[Path]:
    """Write files that belong together: into a temporary folder, from which they are moved when the block succeeds.

    Other files of ``path`` stay.

    Args:
        path: The folder.
        last: The file that marks the folder as complete: it is removed first and moved last.

    Yields:
        The folder to write into.

    Raises:
        StorageError: something cannot be written; ``path`` is only changed after everything is written.
    """
    path = path.absolute()
    make_folder(path.parent)
    _remove_leftovers_once(path.parent)
    temporary = temporary_beside(path)
    make_folder(temporary)
    try:
        with storage_errors(path):
            yield temporary
        names = sorted(file.relative_to(temporary) for file in temporary.rglob("*") if file.is_file())
        with storage_errors(path):
            remove_file(path / last, path.parent)
            for name in sorted(names, key=lambda name: name == Path(last)):
                make_folder((path / name).parent)
                move(temporary / name, path / name, path.parent)
    finally:
        with suppress(StorageError):
            remove_tree(temporary, path.parent)


def temporary_beside(path: Path) -> Path:
    """Return a unique temporary name next to a file, with its suffixes, to be renamed to it."""
    return path.with_name(f".{_here()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.{path.name[-120:]}")


def write_text(path: Path, text: str, owner: Path | None = None) -> None:
    """Write a text file as :func:`whole_file` does, in UTF-8; invalid Unicode is written as escapes."""
    with whole_file(path, owner) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _here() -> str:
    return safe_name(socket.gethostname())[:40]


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files (:func:`temporary_beside`) of dead processes from a folder of ours."""
    with suppress(OSError):
        for entry in os.scandir(folder):
            match = _TEMPORARY.fullmatch(entry.name)
            with suppress(OSError, StorageError):  # another process was faster
                if match and not _may_be_written(match["host"], int(match["pid"]), entry.stat().st_mtime):
                    remove_tree(folder / entry.name, folder)


_remove_leftovers_once = lru_cache(maxsize=64)(remove_leftovers)


def is_alive(pid: int) -> bool:
    """Whether a process of this machine is alive."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it belongs to another user
        return True
    return True


def _may_be_written(host: str, pid: int, written: float) -> bool:
    """Whether the writer of a temporary file may be alive; on another machine it counts as alive for a day."""
    return is_alive(pid) if host == _here() else time.time() - written < STALE_SECONDS
