"""What readers notice that is no fault: said once, with a count, when a set has been read."""

from collections import defaultdict
from pathlib import Path
from threading import Lock

from common.runtime.reporting import print_line

_noticed: dict[str, set[str]] = defaultdict(set)
_lock = Lock()


def note(text: str, path: str | Path) -> None:
    """Count something that was noticed of one file, however often the file is read."""
    with _lock:
        _noticed[text].add(str(path))


def print_notes() -> None:
    """Print what was noticed since the last call, the commonest first."""
    with _lock:
        counted = sorted(((text, len(paths)) for text, paths in _noticed.items()), key=lambda entry: -entry[1])
        _noticed.clear()
    for text, count in counted:
        print_line(f"note: {text}: {count} {'file' if count == 1 else 'files'}")
