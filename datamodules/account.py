"""The account of an archive's files: each is used, ignored for one of these reasons, or listed as unknown."""

import csv
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from common.errors import DataError
from datamodules.members import REFUSED
from datamodules.registry import Archive, shortened
from datamodules.tree import IMAGE_KINDS, Kind, Tree, TreeFile

SHADOW = "shadow file of macOS"
STORE = ".DS_Store"
HIDDEN = "hidden file"
NAMED = "named under ignore"
SIDECAR = "sidecar"
TEXT = "text"
TABLE = "table that is not read"
GENETICS = "genetics"
MASK = "mask that masks: does not name"
RUN = "another run of"
TIME = "series over time or direction"
PARAMETRIC = "parametric series"
MAP = "quantitative map"
PART = "phase, real or imaginary part"
ACQUISITION = "another kind of acquisition"
SOURCE = "source data, code or stimuli"
LISTED = "named in .bidsignore"
PIPELINE = "derivative that pipeline: does not name"
DISAGREE = "name and folder disagree"
UNLISTED = "not listed in dataset.json"
PUBLIC = "other files of a public set"
UNUSED = "left out by a setting"
ROWLESS = "without a row in the table"
#: All reasons; :data:`RUN` is followed by the modality.
REASONS = frozenset({
    SHADOW, STORE, HIDDEN, NAMED, SIDECAR, TEXT, TABLE, GENETICS, MASK, RUN, TIME, PARAMETRIC, MAP, PART, ACQUISITION,
    SOURCE, LISTED, PIPELINE, DISAGREE, UNLISTED, PUBLIC, UNUSED, ROWLESS,
})  # fmt: skip
_BY_KIND: dict[Kind, str] = {"sidecar": SIDECAR, "text": TEXT, "table": TABLE, "genetics": GENETICS}
#: Tolerated share of image-like files without a place, and number of cases in which one kind of them may occur.
_MAX_UNKNOWN, _MAX_CASES = 0.01, 2
_MAX_LINES = 12
_EXAMPLES = 3
_ITEM_NAMES: dict[Kind, str] = {"volume": "volumes", "image": "images", "series": "DICOM files", "refused": "files"}


class Row(NamedTuple):
    """One line of the account.

    Attributes:
        use: ``used``, ``ignored`` or ``unknown``.
        reason: Kind of a used file, reason of an ignored one, suffix of an unknown one.
        count: Number of files.
        examples: The first three of them.
    """

    use: str
    reason: str
    count: int  # type: ignore[assignment]  # tuple has a method of this name
    examples: tuple[str, ...]


class Account:
    """What became of every file of an archive.

    Args:
        archive: The archive.
        used: The used files, as path and kind; None: all files of its records.

    Raises:
        DataError: an unknown reason, which is a bug in the layout.
    """

    def __init__(self, archive: Archive, used: Iterable[tuple[str, Path]] | None = None) -> None:
        tree = archive.tree
        held = {tree.name_of(path): what for record in archive.records for what, path in record.files()}
        # A second file of a modality is refused by name, a clearer message than that it has no place.
        held |= {tree.name_of(path): "volume" for record in archive.records for path in record.surplus}
        self._used = held if used is None else {tree.name_of(path): what for what, path in used}
        self._used |= dict.fromkeys((tree.name_of(name) for name in archive.tables), "table")
        self._reasons = dict.fromkeys(held.keys() - self._used.keys(), UNUSED)
        for reason, names in archive.reasons.items():
            if reason not in REASONS and not reason.startswith(RUN):
                raise DataError(f"The layout {archive.layout.name} gives the unknown reason {reason!r}.")
            self._reasons |= {tree.name_of(name): reason for name in names}
        self._public = archive.layout.public
        self.total = len(tree) + len(tree.ignored)
        self.unknown: list[TreeFile] = []
        self.rows = self._rows(tree)
        counted = sum(row.count for row in self.rows)
        assert counted == self.total, f"{counted} of {self.total} files are accounted for"
        self._kinds = Counter(file.kind for file in tree.images)

    def _rows(self, tree: Tree) -> list[Row]:
        found: dict[tuple[str, str], list[str]] = {("ignored", NAMED): [file.name for file in tree.ignored]}
        for file in tree.files:
            place = self._place(file)
            found.setdefault(place, []).append(file.name)
            if place[0] == "unknown":
                self.unknown.append(file)
        order = ("used", "ignored", "unknown")
        rows = [Row(*place, len(names), tuple(names[:_EXAMPLES])) for place, names in found.items() if names]
        return sorted(rows, key=lambda row: (order.index(row.use), -row.count, row.reason))

    def _place(self, file: TreeFile) -> tuple[str, str]:
        """Return how a file is used, and why."""
        if what := self._used.get(file.name):
            return "used", what
        if reason := self._reasons.get(file.name):
            return "ignored", reason
        if file.hidden:
            base = file.name.rpartition("/")[2]
            return "ignored", SHADOW if base.startswith("._") else STORE if base == STORE else HIDDEN
        if file.kind in _BY_KIND:
            return "ignored", _BY_KIND[file.kind]
        if file.kind == "voxels" and self._used.get(f"{file.name[: -len(file.suffix)]}.mhd"):
            return "used", "volume"
        if self._public and (file.kind in IMAGE_KINDS or file.kind == "voxels"):
            return "ignored", PUBLIC
        return "unknown", file.suffix or file.stem

    def count(self, use: str) -> int:
        """Return how many files are ``used``, ``ignored`` or ``unknown``."""
        return sum(row.count for row in self.rows if row.use == use)

    def check(self) -> None:
        """Refuse an archive if too many image-like files have no place: it was misunderstood.

        Raises:
            DataError: more than 1 % have none, or one kind of them has none in three cases or more.
        """
        lost = [file for file in self.unknown if file.kind in IMAGE_KINDS]
        if not lost:
            return
        kinds = _kinds(lost)
        count = kinds[0][1]
        if len(lost) <= _MAX_UNKNOWN * self._kinds.total() and count <= _MAX_CASES:
            return
        if all(file.kind == "refused" for file in lost):
            raise DataError(f"{len(lost)} files such as {shortened(lost[0].name, 80)} have no place: "
                            f"{REFUSED[lost[0].suffix]}.")  # fmt: skip
        same = {file.kind for file in lost}
        item_name = _ITEM_NAMES[lost[0].kind] if len(same) == 1 else "image files"
        total = sum(self._kinds[kind] for kind in same)
        words = [f"{shortened(name, 30)} in {count}" for name, count in kinds[:3]]
        shown = ", ".join([f"{words[0]} cases", *words[1:]])
        raise DataError(f"{len(lost)} of {total} {item_name} have no place ({shown}): name them under modalities or "
                        f"ignore; medmim init DIR writes the file.")  # fmt: skip

    def lines(self) -> list[str]:
        """Return the account in at most twelve lines."""
        counts = ", ".join(f"{self.count(use)} {use}" for use in ("used", "ignored", "unknown"))
        lines = [f"files: {self.total}, of which {counts}"]
        for use in ("used", "ignored", "unknown"):
            rows = [row for row in self.rows if row.use == use]
            if rows:
                shown = "; ".join(f"{row.count} {row.reason}" for row in rows[:6])
                more = f"; {sum(row.count for row in rows[6:])} for {len(rows) - 6} more reasons" if rows[6:] else ""
                lines.append(f"  {use:<8} {shown}{more}")
        return lines[:_MAX_LINES]

    def write(self, path: Path, examples: bool = True) -> None:
        """Write the account as CSV.

        Args:
            path: The file.
            examples: Whether to name files; names may identify patients.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["class", "reason", "count", *(f"example_{number}" for number in range(1, _EXAMPLES + 1))])
            for row in self.rows:
                named = (*row.examples, *[""] * _EXAMPLES)[:_EXAMPLES] if examples else ("",) * _EXAMPLES
                writer.writerow([row.use, row.reason, row.count, *named])


def _kinds(files: Sequence[TreeFile]) -> list[tuple[str, int]]:
    """Return the file names inside cases, by stem or suffix, with the number of cases that have each."""
    cases: dict[str, set[str]] = {}
    for file in files:
        parts = file.stem.replace("-", "_").split("_")
        cases.setdefault(parts[-1] if len(parts) > 1 else file.stem, set()).add(file.folder or file.stem)
        cases.setdefault(f"*{file.suffix}", set()).add(file.folder or file.stem)
    counts = {name: len(places) for name, places in cases.items()}
    stems = [(name, count) for name, count in counts.items() if not name.startswith("*") and count > _MAX_CASES]
    return sorted(stems or counts.items(), key=lambda item: (-item[1], item[0]))
