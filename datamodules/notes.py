"""What readers notice that is no fault: said once, with a count, when a set has been read."""

from collections import Counter
from threading import Lock

from common.runtime.reporting import say

_counts: Counter[str] = Counter()
_lock = Lock()


def note(text: str) -> None:
    """Count something that was noticed of one file; ``text`` goes on after ``in 12 files``."""
    with _lock:
        _counts[text] += 1


def say_notes() -> None:
    """Print what was noticed since the last call, the commonest first."""
    with _lock:
        counted = _counts.most_common()
        _counts.clear()
    for text, count in counted:
        say(f"note: in {count} files {text}" if count > 1 else f"note: in 1 file {text}")
