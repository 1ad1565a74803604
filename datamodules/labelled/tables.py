"""Shared by the layouts of labelled images: columns of labels, columns of file names, and listing of files."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import pandas as pd

from common.errors import DataError
from common.pseudonyms import public_name
from datamodules.labelled.layout import label_value
from datamodules.tree import Tree

_FILE_NAME = r"\w[\w.-]*"


def column_targets(
    path: Path, table: pd.DataFrame, column: str, allowed: Mapping[str, float], case_ids: Sequence[str]
) -> list[float]:
    """Return the meaning of the cells of a label column.

    Args:
        path: The table's file.
        table: Its content as text.
        column: One of its columns.
        allowed: Allowed cell to its meaning.
        case_ids: Name of each row.

    Raises:
        DataError: unknown value.
    """
    texts = table[column].tolist()
    meaning: dict[str, float] = {}
    for text, case_id in zip(texts, case_ids, strict=True):
        if text not in meaning:
            meaning[text] = label_value(text, allowed, path, case_id, column)
    return [meaning[text] for text in texts]


def column_names(path: Path, table: pd.DataFrame, column: str) -> list[str]:
    """Return a column of valid file names.

    Raises:
        DataError: invalid name, such as one that leads outside its folder.
    """
    odd = table.loc[~table[column].str.fullmatch(_FILE_NAME), column]
    if len(odd):
        raise DataError(f"{path} has {len(odd)} rows whose {column} is not a file name, first "
                        f"'{public_name(odd.iloc[0])}'.")  # fmt: skip
    return table[column].tolist()


def files_under(tree: Tree, folders: Iterable[str | Path], suffixes: Sequence[str]) -> Iterator[Path]:
    """Yield files with some suffixes under some folders of a tree, in a fixed order; folders may be missing."""
    for folder in folders:
        yield from (tree / file.name for file in tree.under(folder, suffixes))
