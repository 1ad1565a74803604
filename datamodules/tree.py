"""The files of an archive, listed in one walk: layouts look names up here and never walk again."""

import os
import re
from collections.abc import Iterable, Iterator
from fnmatch import translate
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

from common.errors import DataError
from common.runtime.reporting import say
from datamodules.members import PICTURES, REFUSED, VOLUMES

#: What a file's suffix says it is. ``series`` may be an image or a slice of a volume; ``voxels`` belong to a header
#: beside them; ``refused`` formats are image-like and never read.
Kind = Literal["volume", "image", "series", "voxels", "refused", "table", "sidecar", "text", "genetics", "other"]

_SERIES = (".dcm", ".dicom")
_SUFFIXES: dict[Kind, tuple[str, ...]] = {
    "volume": (*VOLUMES, ".seg.nrrd"),
    "image": tuple(suffix for suffix in PICTURES if suffix not in _SERIES),
    "series": _SERIES,
    "voxels": (".raw", ".zraw"),
    "refused": tuple(REFUSED),
    "table": (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".jsonl", ".ndjson", ".parquet"),
    "sidecar": (".json", ".bval", ".bvec", ".xml", ".yaml", ".yml"),
    "text": (".txt", ".md", ".rst", ".pdf", ".html", ".log", ".bib"),
    "genetics": (".bed", ".bim", ".fam", ".bgen", ".bgi", ".sample", ".pgen", ".pvar", ".psam", ".sscore"),
}
_KINDS: dict[str, Kind] = {suffix: kind for kind, suffixes in _SUFFIXES.items() for suffix in suffixes}
#: Names without a suffix that are text wherever they lie.
_TEXTS = ("readme", "license", "licence", "changes", "changelog", "citation", "authors")
#: What shows something, and therefore must have a place in the account.
IMAGE_KINDS: frozenset[Kind] = frozenset({"volume", "image", "series", "refused"})
#: Pointers of Git LFS and git-annex are shorter than this, and no image is.
_MAX_POINTER = 300
_POINTERS = ((b"version https://git-lfs", "git lfs pull"), (b"/annex/objects/", "datalad get ."))
_OPENED_POINTERS = 20
#: Share of image-like files that may be links without content.
_MAX_HOLLOW = 0.05


def suffix_of(name: str) -> str:
    """Return a file's suffix in lower case, a double one such as ``.nii.gz`` or ``.seg.nrrd`` whole."""
    parts = name.lower().rsplit("/", 1)[-1].rsplit(".", 2)
    double = f".{parts[1]}.{parts[2]}" if len(parts) == 3 else ""
    if double in _KINDS:
        return double
    return f".{parts[-1]}" if len(parts) > 1 and (parts[0] or len(parts) == 3) else ""


def stem_of(name: str) -> str:
    """Return a file's name without folders and without its suffix, a double one whole."""
    base = name.rsplit("/", 1)[-1]
    return base[: len(base) - len(suffix_of(base))]


def kind_of(name: str) -> Kind:
    """Return what a file's name says it is."""
    kind = _KINDS.get(suffix_of(name))
    if kind is None:
        return "text" if stem_of(name).lower() in _TEXTS else "other"
    return kind


class TreeFile(NamedTuple):
    """One file.

    Attributes:
        name: Path under the root, with ``/`` between folders.
        size: Bytes; -1 where a link leads nowhere.
        kind: What its suffix says it is.
        link: What it links to; None where it is no link.
        mtime_ns: When it was last changed; 0 where that is not known.
    """

    name: str
    size: int
    kind: Kind
    link: str | None
    mtime_ns: int = 0

    @property
    def suffix(self) -> str:
        """Its suffix in lower case."""
        return suffix_of(self.name)

    @property
    def stem(self) -> str:
        """Its name without folders and suffix."""
        return stem_of(self.name)

    @property
    def folder(self) -> str:
        """The folder it lies in, relative to the root; empty = the root."""
        return self.name.rpartition("/")[0]

    @property
    def hidden(self) -> bool:
        """Whether its name begins with a point, as those of the files that macOS leaves behind."""
        return self.name.rpartition("/")[2].startswith(".")


class _Folder(NamedTuple):
    files: list[TreeFile]
    below: list[str]


@lru_cache(maxsize=512)
def _matcher(pattern: str) -> re.Pattern[str]:
    return re.compile(translate(pattern))


class Tree:
    """All files under a root, listed once. Folders whose names begin with a point are not entered.

    ``tree / name`` is a path under the root, so that what reads single files needs no more than the tree.

    Args:
        root: The archive.

    Raises:
        DataError: the root is not a folder, or cannot be opened.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).expanduser()
        if not self.root.is_dir():
            raise DataError(f"The data root {self.root} is not a folder.")
        #: Folders that could not be opened.
        self.closed: list[str] = []
        #: Files that were left aside by :meth:`without`.
        self.ignored: list[TreeFile] = []
        self._folders: dict[str, _Folder] = {}
        self._index: dict[str, TreeFile] | None = None
        self._walk()
        if "" in self.closed:
            raise DataError(f"The data root {self.root} cannot be opened: check its permissions.")

    def _walk(self) -> None:
        """List every folder, parents before children, in the order of names."""
        linked: set[tuple[int, int]] = set()
        waiting = [""]
        while waiting:
            folder = waiting.pop()
            files, below = self._list(folder, linked)
            self._folders[folder] = _Folder(files, below)
            waiting += [f"{folder}/{name}" if folder else name for name in reversed(below)]

    def _list(self, folder: str, linked: set[tuple[int, int]]) -> tuple[list[TreeFile], list[str]]:
        """List one folder. Linked folders are entered once, so that a ring of links ends."""
        files, below = [], []
        prefix = f"{folder}/" if folder else ""
        try:
            with os.scandir(self.root / folder) as entries:
                for entry in sorted(entries, key=lambda item: item.name):
                    if entry.is_dir():
                        if not entry.name.startswith(".") and _first_time(entry, linked):
                            below.append(entry.name)
                        continue
                    size, mtime = _facts(entry)
                    link = os.readlink(entry) if entry.is_symlink() else None
                    files.append(TreeFile(prefix + entry.name, size, kind_of(entry.name), link, mtime))
        except OSError:
            self.closed.append(folder)
        return files, below

    def __truediv__(self, name: str) -> Path:
        return self.root / name

    def __str__(self) -> str:
        return str(self.root)

    @property
    def files(self) -> Iterator[TreeFile]:
        """All files: those of a folder before those of its folders."""
        return (file for folder in self._folders.values() for file in folder.files)

    @property
    def images(self) -> list[TreeFile]:
        """Files that show something: volumes, images, DICOM, and what looks like one of them; no shadow files."""
        return [file for file in self.files if file.kind in IMAGE_KINDS and not file.hidden]

    def __len__(self) -> int:
        return sum(len(folder.files) for folder in self._folders.values())

    def name_of(self, path: str | Path) -> str:
        """Return a path under the root as the tree names it; another path as it is."""
        text, start = str(path), f"{self.root}/"
        return text[len(start) :] if text.startswith(start) else "" if text == str(self.root) else text

    def get(self, path: str | Path) -> TreeFile | None:
        """Return a file by its name or path; None where there is none."""
        if self._index is None:
            self._index = {file.name: file for file in self.files}
        return self._index.get(self.name_of(path))

    def is_file(self, path: str | Path) -> bool:
        """Whether there is such a file."""
        return self.get(path) is not None

    def is_dir(self, path: str | Path) -> bool:
        """Whether there is such a folder."""
        return _plain(self.name_of(path)) in self._folders

    def folders(self, folder: str | Path = "") -> list[str]:
        """Return the names of the folders in a folder, sorted; none where there is no such folder."""
        found = self._folders.get(_plain(self.name_of(folder)))
        return list(found.below) if found else []

    def listed(self, folder: str | Path = "") -> list[TreeFile]:
        """Return the files that lie directly in a folder, sorted; none where there is no such folder."""
        found = self._folders.get(_plain(self.name_of(folder)))
        return list(found.files) if found else []

    def under(self, folder: str | Path = "", suffixes: Iterable[str] = ()) -> Iterator[TreeFile]:
        """Yield the files under a folder, at any depth.

        Args:
            folder: The folder; nothing is yielded where it is not there.
            suffixes: Suffixes in lower case; none = all.
        """
        wanted = frozenset(suffixes)
        waiting = [_plain(self.name_of(folder))]
        while waiting:
            place = waiting.pop()
            found = self._folders.get(place)
            if found is None:
                continue
            yield from (file for file in found.files if not wanted or file.suffix in wanted)
            waiting += [f"{place}/{name}" if place else name for name in reversed(found.below)]

    def glob(self, pattern: str) -> list[Path]:
        """Return the files and folders that fit a pattern, sorted; the pattern is :meth:`pathlib.Path.glob`'s."""
        names = set(self._matches("", [part for part in pattern.split("/") if part != "."]))
        return [self.root / name for name in sorted(names, key=lambda name: name.split("/"))]

    def first(self, *patterns: str) -> Path | None:
        """Return the first file or folder that fits the first pattern with any; None where there is none."""
        return next((path for pattern in patterns for path in self.glob(pattern)), None)

    def _matches(self, folder: str, parts: list[str]) -> Iterator[str]:
        found = self._folders.get(folder)
        if found is None:
            return
        part, rest = parts[0], parts[1:]
        if part == "**":
            if rest:
                yield from self._matches(folder, rest)
            for name in found.below:
                yield from self._matches(f"{folder}/{name}" if folder else name, parts)
            return
        fits = _matcher(part).match
        for name in found.below:
            if fits(name):
                place = f"{folder}/{name}" if folder else name
                if rest:
                    yield from self._matches(place, rest)
                else:
                    yield place
        if not rest:
            yield from (file.name for file in found.files if fits(file.name.rpartition("/")[2]))

    def sub(self, folder: str) -> "Tree":
        """Return the tree of a folder, of the same walk."""
        tree = Tree.__new__(Tree)
        tree.root, tree.closed, tree.ignored, tree._index = self.root / folder, [], [], None
        tree._folders = {
            place[len(folder) :].lstrip("/"): _Folder(
                [file._replace(name=file.name[len(folder) + 1 :]) for file in found.files], found.below
            )
            for place, found in self._folders.items()
            if place == folder or place.startswith(f"{folder}/")
        }
        return tree

    def without(self, patterns: Iterable[str]) -> "Tree":
        """Return the tree without the files that fit a pattern, by their names or by their paths under the root."""
        fits = [_matcher(pattern).match for pattern in patterns]

        def left_aside(file: TreeFile) -> bool:
            return any(fit(file.name) or fit(file.name.rpartition("/")[2]) for fit in fits)

        tree = Tree.__new__(Tree)
        tree.root, tree.closed, tree._index = self.root, self.closed, None
        tree.ignored = [*self.ignored, *filter(left_aside, self.files)]
        tree._folders = {
            place: _Folder([file for file in found.files if not left_aside(file)], found.below)
            for place, found in self._folders.items()
        }
        return tree

    def report_content(self) -> None:
        """Print how many files are links without content.

        Raises:
            DataError: they are more than one in twenty.
        """
        if words := self.check_content():
            say(f"note: {words}")

    def check_content(self) -> str | None:
        """Say how many image-like files are links without content, or pointers of Git LFS; None where none is.

        Raises:
            DataError: they are more than one in twenty.
        """
        images = self.images
        broken = [file for file in images if file.size < 0]
        small = [file for file in images if 0 < file.size <= _MAX_POINTER]
        remedies = [remedy for file in small[:_OPENED_POINTERS] if (remedy := _pointer(self.root / file.name))]
        count = len(broken) + (len(small) if len(small) > _OPENED_POINTERS and remedies else len(remedies))
        if not count:
            return None
        remedy = remedies[0] if remedies else "datalad get ."
        words = f"{count} of {len(images)} files are links without content: run {remedy}"
        if count > _MAX_HOLLOW * len(images):
            raise DataError(f"{words} in {self.root}.")
        return words


def as_tree(root: "str | Path | Tree") -> Tree:
    """Return the tree of a root; one that is walked already stays as it is."""
    return root if isinstance(root, Tree) else Tree(root)


def _plain(name: str) -> str:
    return "" if name in (".", "") else name.strip("/")


def _facts(entry: os.DirEntry[str]) -> tuple[int, int]:
    """Return size and modification time of a file, -1 and 0 of a link that leads nowhere."""
    try:
        stat = entry.stat()
    except OSError:
        return -1, 0
    return stat.st_size, stat.st_mtime_ns


def _first_time(entry: os.DirEntry[str], linked: set[tuple[int, int]]) -> bool:
    """Whether a folder is to be entered: always, but for a link upwards, or to where another link led."""
    if not entry.is_symlink():
        return True
    facts = entry.stat()
    key = (facts.st_dev, facts.st_ino)
    target, here = os.path.realpath(entry.path), os.path.realpath(os.path.dirname(entry.path))
    if key in linked or f"{here}/".startswith(f"{target}/"):
        return False
    linked.add(key)
    return True


def _pointer(path: Path) -> str | None:
    """Return the command that fetches a file which is a pointer; None where it is a file of its own."""
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError:
        return None
    return next((remedy for mark, remedy in _POINTERS if start.startswith(mark)), None)
