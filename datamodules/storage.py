"""What every cache shares: where caches live, how large they are, and the check sum of a file."""

import os
import shutil
from pathlib import Path
from typing import Any

import xxhash

from common.runtime.reporting import say


def cache_root() -> Path:
    """Return the cache folder: ``MEDMIM_CACHE``, else ``~/.cache/medmim``."""
    return Path(os.environ.get("MEDMIM_CACHE") or "~/.cache/medmim").expanduser()


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
