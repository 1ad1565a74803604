"""Files that tables and manifests name."""

from pathlib import Path

from common.errors import DataError
from common.pseudonyms import public_name

#: Most bytes of one part of a path, and of a whole path.
_MAX_PART = 255
_MAX_PATH = 4000


def path_under(root: Path, name: str, source: object) -> Path:
    """Return the path of a file that a table or a manifest names.

    Args:
        root: Base of the name.
        name: The name.
        source: Where it is listed, for error messages.

    Raises:
        DataError: it is absolute, contains ``..``, or is not a valid file name.
    """
    path = Path(name)
    lengths = [len(part.encode("utf-8", "surrogatepass")) for part in path.parts]
    if max(lengths, default=0) > _MAX_PART or sum(lengths) + len(lengths) > _MAX_PATH:
        raise DataError(f"{source} names the file '{public_name(name)[:40]}'..., which is too long for a path.")
    if path.is_absolute() or ".." in path.parts or "\0" in name or name[:1] == "~":
        raise DataError(
            f"{source} names the file '{public_name(name)[:80]}', which does not lie under {root}; paths are "
            f"relative to it."
        )
    return root / path
