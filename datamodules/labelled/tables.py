"""What the layouts of labelled images share: a column of labels, a column of file names, and where files lie."""

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
    """Return what the cells of a label column mean.

    Args:
        path: The table's file.
        table: What it holds, as text.
        column: One of its columns.
        allowed: What a cell may hold, and what that means.
        case_ids: Name of each row.

    Raises:
        DataError: a cell means nothing.
    """
    texts = table[column].tolist()
    meaning: dict[str, float] = {}
    for text, case_id in zip(texts, case_ids, strict=True):
        if text not in meaning:
            meaning[text] = label_value(text, allowed, path, case_id, column)
    return [meaning[text] for text in texts]


def column_names(path: Path, table: pd.DataFrame, column: str) -> list[str]:
    """Return a column of names, each of which can be a file's.

    Raises:
        DataError: one cannot, such as one that leaves its folder.
    """
    odd = table.loc[~table[column].str.fullmatch(_FILE_NAME), column]
    if len(odd):
        raise DataError(f"{path} has {len(odd)} rows whose {column} is no name of a file, first "
                        f"'{public_name(odd.iloc[0])}'.")  # fmt: skip
    return table[column].tolist()


def files_under(tree: Tree, folders: Iterable[str | Path], suffixes: Sequence[str]) -> Iterator[Path]:
    """Yield the files of some suffixes under some folders of a tree, in one order; a folder may be absent."""
    for folder in folders:
        yield from (tree / file.name for file in tree.under(folder, suffixes))
