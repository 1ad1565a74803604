"""A cache of 2D images, reduced, gray or in colour: memory-mapped uint8, made once, resumable, check-summed.

``<cache>/images/<key>/<shard>/<hash>.npy`` holds an image and ``<shard>/manifest.jsonl`` one line for each of a shard's
images: what its source was and what its file is, or why there is none. Later lines win, and a torn last line is
ignored. An image without a valid line is built; one whose source or file differs from its line is built again. Files
are written under a temporary name and renamed, and their line is written last, so an interrupted run leaves nothing
half made.

Several threads, processes and ranks may build at once: a rename is atomic, and so is appending a line of less than
4 KiB to a file that was opened for appending. At worst an image is built twice.
"""

import json
import math
import os
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from common.errors import StorageError
from common.faults import Fault, SampleFaultError
from common.files import (
    make_folder,
    move,
    remove_file,
    remove_leftovers,
    storage_errors,
    temporary_beside,
    write_text,
)
from common.randomness import stable_hash
from datamodules.checking import CacheCheck, CachedFile, Checked, check_files
from datamodules.images.crops import Box, cut_box
from datamodules.images.reading import DECODERS, GRAY, MIN_SIDE, ImageReader, read_header, read_reduced, reduced_size
from datamodules.images.values import ImageError, UnreachableImageError
from datamodules.storage import cache_root, file_is_good, fingerprint, save_array, sole_builder, source_facts

VERSION = 1
#: Headers that are read to estimate the size of a cache.
SAMPLED_HEADERS = 200
#: Bytes before the pixels of an ``.npy`` file.
NPY_HEADER = 128

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Entry(NamedTuple):
    """A line of the manifest.

    Attributes:
        path: The source, relative to the root; absolute where it lies elsewhere.
        size: Its size in bytes.
        mtime_ns: Its modification time.
        xxh3: Its check sum.
        file: The cached copy, relative to the cache's folder; empty where there is none.
        shape: Height and width of the copy.
        file_size: Size of its file in bytes.
        file_xxh3: Check sum of its file.
        fault: Kind and detail of what is wrong with the source.
    """

    path: str
    size: int
    mtime_ns: int
    xxh3: str
    file: str = ""
    shape: Sequence[int] = ()
    file_size: int = 0
    file_xxh3: str = ""
    fault: Sequence[str] | None = None

    def known_fault(self, path: Path) -> Fault | None:
        """Return what is wrong with the source at ``path``; None where nothing is."""
        return None if self.fault is None else _fault(path, *self.fault)

    def line(self) -> str:
        """Return the entry as JSON, without what it leaves at its default."""
        defaults = self._field_defaults
        return json.dumps({k: v for k, v in self._asdict().items() if k not in defaults or v != defaults[k]})


def _fault(path: Path, kind: str, detail: str) -> Fault:
    return Fault(str(path), kind, detail, str(path))


def _each(function: Callable[[_Item], _Result], items: Iterable[_Item], workers: int) -> Iterator[_Result]:
    """Map in threads, in order, with few items waiting: an interruption is not held up by a long queue."""
    waiting: deque[Future[_Result]] = deque()
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= 4 * max(workers, 1):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


#: Chooses a box for an image of some height and width.
BoxChoice = Callable[[Sequence[int]], Box]


class SourceImages:
    """Images without a cache: every access reads the source anew, a gray JPEG at no more pixels than its crop needs.

    Args:
        reader: How files become pixels.
    """

    def __init__(self, reader: ImageReader = GRAY) -> None:
        self.reader = reader

    def ensure(
        self, paths: Sequence[Path], workers: int = 1, progress: bool = True, check: CacheCheck = "sampled"
    ) -> dict[Path, Fault | None]:
        """Return no fault for any image without looking at it; what is broken shows when it is read."""
        return dict.fromkeys(paths)

    def crop(
        self, path: Path, choose: BoxChoice, size: Sequence[int], mirror: bool = False, degrees: float = 0.0
    ) -> Tensor:
        """Read the crop of an image that ``choose`` wants, ``(C, *size)`` in [0, 1]; see :func:`cut_box`.

        Of a gray image the box is chosen from the header, and the image decoded at the smallest scale at which the box
        still has ``size`` pixels.

        Raises:
            SampleFaultError: the image cannot be used.
        """
        try:
            if self.reader is not GRAY:
                pixels = self.reader.read(path, None)
                return cut_box(pixels, choose(pixels.shape[:2]), size, mirror, degrees)
            shape = read_header(path)
            if min(shape) < MIN_SIDE:
                raise ImageError("shape", f"{shape[0]} x {shape[1]} pixels, a side of at least {MIN_SIDE} is needed")
            box = choose(shape)
            needed = max(size[0] / (box[3] - box[1]), size[1] / (box[2] - box[0]))
            pixels, scale = read_reduced(path, min(math.ceil(min(shape) * needed), min(shape)))
        except ImageError as error:
            raise SampleFaultError([_fault(path, error.kind, error.detail)]) from error
        left, top, right, bottom = (scale * edge for edge in box)
        return cut_box(pixels, (left, top, right, bottom), size, mirror, degrees)


def _append(manifest: Path, line: str) -> None:
    with storage_errors(manifest), manifest.open("ab", buffering=0) as file:
        file.write(f"{line}\n".encode())


def _source_facts(path: Path) -> dict[str, Any]:
    try:
        return {**source_facts(path), "xxh3": fingerprint(path)["xxh3"]}
    except FileNotFoundError as error:
        raise UnreachableImageError("missing", "the file is not there") from error
    except OSError as error:
        raise UnreachableImageError("unreadable", f"the file cannot be opened ({error.strerror or error})") from error


class ImageCache:
    """The images of one archive at one size.

    It holds nothing but the faults, so that handing it to loader workers costs little however many images there are.

    Args:
        root: The archive.
        shorter_side: Shorter side in pixels to which images are reduced; smaller ones are kept as they are.
        folder: Where caches live; None means :func:`datamodules.storage.cache_root`.
        name: Folder in it.
        reader: How files become pixels.
    """

    def __init__(
        self,
        root: str | Path,
        shorter_side: int,
        folder: Path | None = None,
        name: str = "images",
        reader: ImageReader = GRAY,
    ) -> None:
        if shorter_side < 1:
            raise ValueError(f"`shorter_side` must be at least 1 pixel, got {shorter_side}.")
        self.root = Path(os.path.abspath(Path(root).expanduser()))
        self.shorter_side = shorter_side
        resolved = self.root.resolve()
        key = {"version": VERSION, "root": str(resolved), "shorter_side": shorter_side, "decoders": DECODERS}
        self.reader = reader
        self._key = json.dumps(key | ({"reader": reader.name} if reader.name else {}), sort_keys=True)
        self.folder = (folder or cache_root()) / name / f"{stable_hash(self._key):016x}"
        self._prefixes = tuple(os.path.join(prefix, "") for prefix in (self.root, resolved))
        self._faults: dict[str, Fault] = {}
        #: What :meth:`ensure` has read of the cache.
        self.checked = Checked(0, [], 0, frozenset())

    def _relative(self, path: Path) -> str:
        """Return a path relative to the root, absolute where it lies elsewhere; links are not followed."""
        absolute = os.path.abspath(path)
        for prefix in self._prefixes:
            if absolute.startswith(prefix):
                return absolute[len(prefix) :]
        return absolute

    def _file(self, relative: str) -> Path:
        digest = f"{stable_hash(relative):016x}"
        return self.folder / digest[-2:] / f"{digest}.npy"

    def image_file(self, path: Path) -> Path:
        """Return where an image's copy lies, whether or not it is there."""
        return self._file(self._relative(path))

    def read_manifest(self, shard: Path) -> dict[str, Entry]:
        """Return the entries of a shard's folder by the path of their source; broken lines are left out."""
        manifest = shard / "manifest.jsonl"
        if not manifest.is_file():
            return {}
        content = manifest.read_bytes()
        if not content.endswith(b"\n"):
            with suppress(StorageError):  # then nothing will be appended either
                _append(manifest, "")  # or the next line would be lost with the torn one
        entries = {}
        for line in content.splitlines():
            try:
                entry = Entry(**json.loads(line))
                entries[entry.path] = entry
            except (ValueError, TypeError):
                continue
        return entries

    def is_valid(self, path: Path, entry: Entry, full: bool = False) -> bool:
        """Whether an entry still fits its source and its file.

        Args:
            path: The source.
            entry: What was recorded.
            full: Whether to compare the check sum of the copy, not only its size.
        """
        try:
            if source_facts(path) != {"size": entry.size, "mtime_ns": entry.mtime_ns}:
                return False
        except OSError:
            return False
        if entry.fault is not None:
            return True
        return file_is_good(self._file(entry.path), entry.file_size, entry.file_xxh3, full)

    def build(self, path: Path) -> Fault | None:
        """Read one image and store it, or record and return what is wrong with it.

        A source that cannot be reached is not recorded: its copy, if there is one, is good when the source is back.

        Raises:
            StorageError: the cache cannot be written.
        """
        relative = self._relative(path)
        file = self._file(relative)
        make_folder(file.parent)
        try:
            entry = Entry(relative, **_source_facts(path))
            entry = entry._replace(**self._store(file, self.reader.read(path, self.shorter_side)))
        except UnreachableImageError as error:
            return _fault(path, error.kind, error.detail)
        except ImageError as error:
            remove_file(file, self.folder)
            entry = entry._replace(fault=(error.kind, error.detail))
        _append(file.parent / "manifest.jsonl", entry.line())
        return None if entry.fault is None else _fault(path, *entry.fault)

    def _store(self, file: Path, pixels: NDArray[np.uint8]) -> dict[str, Any]:
        """Write a copy, whole or not at all, and return what its entry says of it."""
        temporary = temporary_beside(self.folder / "tmp" / "image.npy")
        make_folder(temporary.parent)
        try:
            with storage_errors(file):
                save_array(temporary, pixels)
                written = fingerprint(temporary)
                move(temporary, file, self.folder)
        finally:
            remove_file(temporary, self.folder)
        name = file.relative_to(self.folder).as_posix()
        return {"file": name, "shape": pixels.shape[:2], "file_size": written["size"], "file_xxh3": written["xxh3"]}

    def ensure(
        self, paths: Sequence[Path], workers: int = 1, progress: bool = True, check: CacheCheck = "sampled"
    ) -> dict[Path, Fault | None]:
        """Make every image's entry valid: verify what is there, build what is not.

        Args:
            paths: The images.
            workers: Threads; decoding and reducing release the interpreter lock.
            progress: Whether to show a bar while images are built.
            check: How many copies are read, of which the others are known by their sizes; ``full`` suits a crash of the
                machine; see :mod:`datamodules.checking`.

        Returns:
            What is wrong with each image; None where nothing is.
        """
        unique = list(dict.fromkeys(paths))
        valid = self._verified(unique, workers, check == "full")
        copies = [CachedFile(path, self._file(entry.path), entry.file_size, entry.file_xxh3)
                  for path, entry in valid.items() if entry.fault is None]  # fmt: skip
        self.checked = check_files(copies, self.folder, check)
        found = {path: entry.known_fault(path) for path, entry in valid.items() if path not in self.checked.broken}
        missing = [path for path in unique if path not in found]
        if missing:  # else a folder that cannot be written will do
            with sole_builder(self.folder):
                remove_leftovers(self.folder / "tmp")
                write_text(self.folder / "key.json", self._key)
                # Another process may have built some in the meantime.
                again = self._verified(missing, workers, full=True)
                found |= {path: entry.known_fault(path) for path, entry in again.items()}
                missing = [path for path in missing if path not in found]
                built = _each(self.build, missing, workers)
                bar = tqdm(built, "caching images", len(missing), unit="image", disable=not (progress and missing))
                found.update(zip(missing, bar, strict=True))
            good = sum(fault is None for fault in found.values())
            self.checked = self.checked.with_built(good, good - len(copies) + len(self.checked.broken))
        for path, fault in found.items():
            if fault is not None:
                self._faults[self._relative(path)] = fault
            elif self._faults:
                self._faults.pop(self._relative(path), None)
        return {path: found[path] for path in paths}

    def _verified(self, paths: Iterable[Path], workers: int, full: bool) -> dict[Path, Entry]:
        """Return the entries of those of some images whose entries are valid."""
        shards: dict[Path, list[Path]] = defaultdict(list)
        for path in paths:
            shards[self.image_file(path).parent].append(path)

        def verify(shard: Path) -> dict[Path, Entry]:
            return self._verify(shard, shards[shard], full)

        found: dict[Path, Entry] = {}
        for part in _each(verify, shards, workers):
            found.update(part)
        return found

    def _verify(self, shard: Path, paths: Iterable[Path], full: bool) -> dict[Path, Entry]:
        """Return the valid entries of images of one shard."""
        entries = self.read_manifest(shard)
        valid: dict[Path, Entry] = {}
        for path in paths:
            entry = entries.get(self._relative(path))
            if entry is not None and self.is_valid(path, entry, full):
                valid[path] = entry
        return valid

    def open(self, path: Path) -> NDArray[np.uint8]:
        """Open an image, ``(H, W)`` or ``(H, W, 3)``, memory-mapped; one without a copy, or a broken one, is built.

        A copy is not compared with its source: that is what :meth:`ensure` does.

        Raises:
            SampleFaultError: the image cannot be used.
        """
        relative = self._relative(path)
        file, fault = self._file(relative), self._faults.get(relative)
        if fault is None:
            try:
                return _load(file)
            except Exception:  # no copy, or one so damaged that NumPy may raise anything
                entry = self._verify(file.parent, [path], full=True).get(path)
                fault = self.build(path) if entry is None else entry.known_fault(path)
        if fault is not None:
            raise SampleFaultError([fault])
        return _load(file)

    def crop(
        self, path: Path, choose: BoxChoice, size: Sequence[int], mirror: bool = False, degrees: float = 0.0
    ) -> Tensor:
        """Cut the box that ``choose`` wants out of an image's copy, ``(C, *size)`` in [0, 1]; see :func:`cut_box`.

        Raises:
            SampleFaultError: the image cannot be used.
        """
        pixels = self.open(path)
        return cut_box(pixels, choose(pixels.shape[:2]), size, mirror, degrees)

    def faults(self) -> dict[Path, Fault]:
        """Return the images that cannot be used: those on record, by whichever run, and those of :meth:`ensure`."""
        known = dict(self._faults)
        for manifest in self.folder.glob("*/manifest.jsonl"):
            for relative, entry in self.read_manifest(manifest.parent).items():
                if entry.fault is not None:
                    known.setdefault(relative, _fault(self.root / relative, *entry.fault))
        return {self.root / relative: fault for relative, fault in sorted(known.items())}

    def check_sums(self) -> dict[Path, str]:
        """Return the check sums of the images on record."""
        return {
            self.root / relative: entry.xxh3
            for manifest in self.folder.glob("*/manifest.jsonl")
            for relative, entry in self.read_manifest(manifest.parent).items()
        }

    def estimated_bytes(self, paths: Sequence[Path]) -> int:
        """Estimate the size of the finished cache from the headers of at most ``SAMPLED_HEADERS`` of its images."""
        chosen = paths[:: max(1, -(-len(paths) // SAMPLED_HEADERS))]
        total = 0
        for path in chosen:
            try:
                height, width = reduced_size(*read_header(path), self.shorter_side)
            except ImageError:
                continue
            total += height * width * self.reader.channels + NPY_HEADER
        return total * len(paths) // max(1, len(chosen))


def _load(file: Path) -> NDArray[np.uint8]:
    pixels = np.lib.format.open_memmap(file, mode="c")  # private: nothing that is written to it reaches the file
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3):
        raise ValueError(f"{file} holds {pixels.dtype} of shape {pixels.shape}.")
    return pixels
