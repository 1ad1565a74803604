"""Whether the files of a cache are still those that were written: some at every start, the rest while training goes on.

Reading a cache of many terabytes before the first step would take hours. A start reads at most :data:`SAMPLED_FILES`
files and :data:`SAMPLED_BYTES`, other ones than the start before; one thread reads the rest, slowly, during training.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal, NamedTuple

from common.errors import StorageError
from common.files import write_text
from common.randomness import numpy_generator
from datamodules.storage import file_is_good

#: ``sampled``: some files before the first step, the others during training; ``full``: all before; ``off``: none.
CacheCheck = Literal["sampled", "full", "off"]
SAMPLED_FILES, SAMPLED_BYTES = 64, 2 << 30
#: Bytes a second that are read during training, at most.
_RATE = 200e6


class CachedFile(NamedTuple):
    """A file of a cache.

    Attributes:
        owner: What it was made of: a case's name, an image's path.
        path: The file.
        size: Its size in bytes when it was written.
        xxh3: Its check sum then.
    """

    owner: Any
    path: Path
    size: int
    xxh3: str


class Checked(NamedTuple):
    """How far a cache has been read.

    Attributes:
        total: Files it has.
        rest: Files that are still to be read.
        read: How many were read, or written, at this start.
        broken: Owners of files that are not what was written.
        unread: Whether nothing was to be read.
    """

    total: int
    rest: list[CachedFile]
    read: int
    broken: frozenset[Any]
    unread: bool = False

    def with_built(self, total: int, built: int) -> "Checked":
        """Return the state once ``built`` files were written, which makes ``total`` of them all."""
        return self._replace(total=total, read=built if self.unread else total - len(self.rest))


def check_files(files: Sequence[CachedFile], folder: Path, check: CacheCheck) -> Checked:
    """Read a share of a cache's files and compare their check sums; successive calls go through all of them.

    Args:
        files: Those that are valid by size.
        folder: The cache's folder, which keeps how far the last start came; one that cannot be written begins anew.
        check: ``off`` reads none; ``full`` expects that the caller has read all.
    """
    if check != "sampled":
        return Checked(len(files), [], len(files) if check == "full" else 0, frozenset(), check == "off")
    place = folder / "checked.json"
    order = [files[index] for index in numpy_generator("check", len(files)).permutation(len(files))]
    begin = _position(place) % max(len(order), 1)
    order = order[begin:] + order[:begin]
    count = size = 0
    while count < min(len(order), SAMPLED_FILES) and (not count or size + order[count].size <= SAMPLED_BYTES):
        size += order[count].size
        count += 1
    broken = frozenset(file.owner for file in order[:count] if not is_whole(file))
    if count < len(order):
        with suppress(StorageError):
            write_text(place, json.dumps({"next": begin + count}))
    return Checked(len(order), [file for file in order[count:] if file.owner not in broken], count, broken)


def is_whole(file: CachedFile) -> bool:
    """Whether a file holds what was written."""
    return file_is_good(file.path, file.size, file.xxh3, full=True)


def _position(place: Path) -> int:
    try:
        return int(json.loads(place.read_text())["next"])
    except (OSError, ValueError, TypeError, KeyError):
        return 0


class BackgroundCheck(threading.Thread):
    """Reads what a start has left unread, at low priority, and has what is broken built again.

    Args:
        checked: What the start has read.
        rebuild: Builds an owner's files again.
    """

    def __init__(self, checked: Checked, rebuild: Callable[[Any], object]) -> None:
        super().__init__(name="cache check", daemon=True)
        self._files, self._rebuild = checked.rest, rebuild
        self._total, self._read = checked.total, checked.read
        self._stopped = threading.Event()
        #: Files that were broken and have been built again.
        self.found: SimpleQueue[CachedFile] = SimpleQueue()

    @property
    def share(self) -> float:
        """Share of the cache's files that have been read."""
        return self._read / max(self._total, 1)

    def run(self) -> None:
        """Read file after file until all are or the run ends."""
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)  # of this thread alone on Linux
        for file in self._files:
            begin = time.monotonic()
            if not is_whole(file):
                with suppress(StorageError, OSError):
                    self._rebuild(file.owner)
                self.found.put(file)
            self._read += 1
            if self._stopped.wait(max(file.size / _RATE - (time.monotonic() - begin), 0)):
                return

    def stop(self) -> None:
        """End after the file that is being read."""
        self._stopped.set()
        if self.is_alive():
            self.join()
