"""Observations of readers that are not faults, printed once with a count after a set has been read."""

from collections import defaultdict
from pathlib import Path
from threading import Lock

from common.runtime.reporting import print_line

_noticed: dict[str, set[str]] = defaultdict(set)
_lock = Lock()


def note(text: str, path: str | Path) -> None:
    """Count an observation about one file, however often the file is read."""
    with _lock:
        _noticed[text].add(str(path))


def print_notes() -> None:
    """Print the observations since the last call, most frequent first."""
    with _lock:
        counted = sorted(((text, len(paths)) for text, paths in _noticed.items()), key=lambda entry: -entry[1])
        _noticed.clear()
    for text, count in counted:
        print_line(f"note: {text}: {count} {'file' if count == 1 else 'files'}")
