"""What synthetic archives are written with: tables, pictures, and the phrases and names that lie beside this file."""

import csv
import gzip
import io
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from numpy.typing import NDArray
from PIL import Image


@cache
def packaged(name: str) -> dict[str, Any]:
    """Return what ``layouts.yaml`` or ``phrases.yaml`` holds."""
    content: dict[str, Any] = yaml.safe_load(files("datamodules.synthetic").joinpath(name).read_text(encoding="utf-8"))
    return content


def write_table(
    path: Path, header: Sequence[str], rows: Iterable[Sequence[object] | Mapping[str, object]], separator: str = ","
) -> None:
    """Write a table, compressed where its name ends in ``.gz``; the same rows give the same bytes.

    Args:
        path: Where; its folder is made.
        header: Names of the columns.
        rows: Cells in the order of the columns, or by their names; a missing cell, and None, is empty.
        separator: Between cells.
    """
    text = io.StringIO()
    writer = csv.writer(text, delimiter=separator, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([row.get(name) for name in header] if isinstance(row, Mapping) else row for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = text.getvalue().encode()
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


def write_image(path: Path, image: NDArray[Any] | Image.Image, mode: str | None = None, quality: int = 95) -> None:
    """Write a picture, in another mode of Pillow's if one is given; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.convert(mode).save(path, quality=quality)
