"""What every cache shares: where caches live, how large they are, who builds one, and the check sum of a file."""

import fcntl
import json
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from common.files import is_alive, make_folder, remove_file, storage_errors
from common.runtime.reporting import say

#: Seconds between two signs of life of a builder, between two looks of one who waits, and until a builder that gives
#: no sign is taken for dead.
HEARTBEAT, LOOK, STALE = 30.0, 1.0, 300.0


def cache_root() -> Path:
    """Return the cache folder: ``MEDMIM_CACHE``, else ``~/.cache/medmim``."""
    return Path(os.environ.get("MEDMIM_CACHE") or "~/.cache/medmim").expanduser()


def usable_cores() -> int:
    """Return how many cores this process may use, as its machine or its SLURM job binds it."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def say_cache(size: int, folder: Path) -> None:
    """Print how large a finished cache would be at most, in bytes ``size``, and how much room there is."""
    existing = next(path for path in (cache_root(), *cache_root().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    say(f"cache: at most {size / 2**30:.2f} GiB at {folder} ({free / 2**30:.0f} GiB free)")


def fingerprint(path: Path) -> dict[str, Any]:
    """Return size and xxh3-128 of a file, read in pieces."""
    digest, size = xxhash.xxh3_128(), 0
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
            size += len(piece)
    return {"size": size, "xxh3": digest.hexdigest()}


def save_array(path: Path, array: NDArray[Any]) -> None:
    """Write an array as ``.npy``.

    ``np.save`` writes to a real file in C and never looks whether its last bytes found room: a file that ends early
    would get the check sum of what it holds.

    Raises:
        OSError: it cannot be written.
    """
    array = np.ascontiguousarray(array)
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.reshape(-1).view(np.uint8).data)


def source_facts(path: Path) -> dict[str, int]:
    """Return size and modification time of a source, by which a cache knows whether it has changed.

    Raises:
        OSError: it cannot be reached.
    """
    stat = path.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def file_is_good(path: Path, size: int, check_sum: str, full: bool) -> bool:
    """Whether a file of a cache is the one that was written.

    Args:
        path: The file.
        size: Its size in bytes then.
        check_sum: Its xxh3-128 then.
        full: Whether to read it and compare the check sum too.
    """
    try:
        return path.stat().st_size == size and (not full or fingerprint(path)["xxh3"] == check_sum)
    except OSError:
        return False


@contextmanager
def sole_builder(folder: Path) -> Iterator[None]:
    """Let one process at a time build a cache: another waits here, and finds most of it built.

    On one machine ``.lock`` keeps others out, which the system opens however its holder ends. Not every shared file
    system carries such locks to other machines, so there ``building.json`` does, which is touched every
    :data:`HEARTBEAT` seconds; where nothing has touched it for :data:`STALE` seconds of the waiting machine's own
    clock, its builder is dead. Two that build at once in spite of it do each other no harm: an entry is renamed into
    its place whole, and the first one stays.

    Args:
        folder: The cache's folder; it is made.

    Raises:
        StorageError: the folder cannot be written.
    """
    make_folder(folder)
    with storage_errors(folder / ".lock"):
        lock = (folder / ".lock").open("a+")
    with lock:
        _take_lock(lock, folder)
        sign = _Sign(folder)
        sign.raise_or_wait()
        try:
            yield
        finally:
            sign.lower()


def _take_lock(lock: IO[str], folder: Path) -> None:
    """Wait until no other process of this machine builds, and write down who does now."""
    waited = False
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not waited:
                lock.seek(0)
                say(f"cache: waiting for {lock.read(200).strip() or 'another process'}, which builds {folder}")
            waited = True
            time.sleep(LOOK)
        except OSError:  # a file system without such locks; the sign serves alone
            return
        else:
            break
    with storage_errors(folder / ".lock"):
        lock.truncate(0)
        lock.write(_who())
        lock.flush()


def _who() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


class _Sign:
    """``building.json`` of one cache, which the machines of a shared file system see."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "building.json"
        self._facts = {"host": socket.gethostname(), "pid": os.getpid(), "token": uuid.uuid4().hex}
        self._done = threading.Event()
        self._beat = threading.Thread(target=self._touch, name="cache heartbeat", daemon=True)

    def raise_or_wait(self) -> None:
        """Put up the sign, as soon as nobody else's stands there."""
        seen, since, waited = -1, time.monotonic(), False
        while not self._put_up():
            changed, other = self._look()
            if changed != seen:
                seen, since = changed, time.monotonic()
            elif self._is_dead(other) or time.monotonic() - since > STALE:
                self._take_down(other.get("token"))
                continue
            if not waited:
                say(f"cache: waiting for process {other.get('pid')} on {other.get('host')}, which builds {self.folder}")
            waited = True
            time.sleep(LOOK)
        self._beat.start()

    def lower(self) -> None:
        """Take the sign down, unless another has taken it over."""
        self._done.set()
        self._beat.join()
        self._take_down(self._facts["token"])

    def _put_up(self) -> bool:
        with storage_errors(self.path):
            try:
                file = self.path.open("x")
            except FileExistsError:
                return False
            try:
                with file:
                    json.dump(self._facts, file)
            except OSError:
                remove_file(self.path, self.folder)
                raise
        return True

    def _look(self) -> tuple[int, dict[str, Any]]:
        """Return when the sign was last touched, and what it says."""
        try:
            return self.path.stat().st_mtime_ns, dict(json.loads(self.path.read_text()))
        except (OSError, ValueError, TypeError):  # gone, or not yet written
            return 0, {}

    @staticmethod
    def _is_dead(other: dict[str, Any]) -> bool:
        """Whether the builder was a process of this machine that is no more."""
        host, pid = other.get("host"), other.get("pid")
        return host == socket.gethostname() and isinstance(pid, int) and not is_alive(pid)

    def _take_down(self, token: object) -> None:
        """Remove the sign of one builder."""
        if self._look()[1].get("token") == token:
            with suppress(OSError):
                remove_file(self.path, self.folder)

    def _touch(self) -> None:
        while not self._done.wait(HEARTBEAT):
            with suppress(OSError):
                os.utime(self.path)
