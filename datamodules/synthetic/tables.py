"""The tables of synthetic archives."""

import csv
import gzip
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path


def write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[object] | Mapping[str, object]]) -> None:
    """Write a CSV file, compressed where its name ends in ``.gz``; the same rows give the same bytes.

    Args:
        path: Where; its folder is made.
        header: Names of the columns.
        rows: Cells in the order of the columns, or by their names; a missing cell, and None, is empty.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([row.get(name) for name in header] if isinstance(row, Mapping) else row for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = text.getvalue().encode()
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
