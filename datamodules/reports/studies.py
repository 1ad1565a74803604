"""Images with text: studies, where their reports lie, and what a layout of such archives is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


class ReportFile(NamedTuple):
    """Where a report lies.

    Attributes:
        path: A text file, or the archive that holds it.
        member: Name inside a zip archive; None for a plain file.
    """

    path: Path
    member: str | None = None


class Study(NamedTuple):
    """Images that share one text.

    Attributes:
        case_id: Unique name.
        patient_id: Splits are by this.
        images: Its views; empty = text alone.
        views: What each image shows, such as ``PA``; empty text = unknown.
        text: The report, or where it lies; None = there is none.
        split: ``train``, ``val`` or ``test`` where the archive says so.
        attributes: Further facts by name, such as a finding; empty text = unknown.
    """

    case_id: str
    patient_id: str
    images: tuple[Path, ...]
    views: tuple[str, ...] = ()
    text: str | ReportFile | None = None
    split: str | None = None
    attributes: Mapping[str, str] = {}


@dataclass(frozen=True)
class StudyLayout:
    """A way in which images with text lie on disk.

    Attributes:
        name: What ``LAYOUT=`` takes.
        tree: One line that shows the tree, for a person whose root was not recognised.
        find: Lists the studies under a root; an empty list means the root is not of this layout.
        extract: Makes the text that is used from a report as it stands; see :mod:`datamodules.reports.text`. Takes the
            report, the part and whether redactions stay.
        prefer: A layout of higher preference wins where several recognise a root.
    """

    name: str
    tree: str
    find: Callable[[Path], list[Study]]
    extract: Callable[[str, str, bool], str]
    prefer: int = 0

    def recognised(self, root: Path) -> list[Study]:
        """List the studies if the root is plainly of this layout."""
        return self.find(root)
