"""Kinship, from genotypes or from a table, and its consequences for samples and splits.

Letters: P people, V variants.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError
from datamodules.files import listing
from datamodules.tables import read_numbers, read_words

#: Relatives of the third degree and closer (Manichaikul et al. 2010).
KINSHIP = 0.0884


def kinship(counts: NDArray[np.float32]) -> NDArray[np.float64]:
    """Estimate kinship from allele counts ``(P, V)`` as KING-robust does (Manichaikul et al. 2010, Eq. 11), ``(P, P)``.

    Variants that one of two people lacks do not count for them.
    """
    known = ~np.isnan(counts)
    single, none, two = ((counts == value).astype(np.float32) for value in (1, 0, 2))
    both, opposite = single @ single.T, none @ two.T + two @ none.T
    own = single @ known.T.astype(np.float32)  # heterozygous calls of a row where the column's person is known
    fewer = np.minimum(own, own.T)
    more = np.maximum(own, own.T)
    fewer = np.maximum(fewer, 1)
    result = (both - 2 * opposite) / (2 * fewer) + 0.5 - (fewer + more) / (4 * fewer)
    return result.astype(np.float64)


def unrelated(pairs: Sequence[tuple[str, str]], persons: Sequence[str]) -> list[str]:
    """Leave out the people with the most relatives first, until no two are related; ties by name.

    Args:
        pairs: Pairs of relatives.
        persons: Everyone, in an order that is kept.
    """
    relatives: dict[str, set[str]] = {name: set() for name in persons}
    for one, other in pairs:
        if one in relatives and other in relatives and one != other:
            relatives[one].add(other)
            relatives[other].add(one)
    while any(relatives.values()):
        worst = min(relatives, key=lambda name: (-len(relatives[name]), name))
        for other in relatives.pop(worst):
            relatives[other].discard(worst)
    return [name for name in persons if name in relatives]


def read_kinship(path: Path, threshold: float = KINSHIP) -> list[tuple[str, str]]:
    """Read the pairs above a kinship from a table of plink2 (``--make-king-table``), KING or UK Biobank.

    Raises:
        DataError: the table does not exist, or a column is missing.
    """
    if not path.is_file():
        raise DataError(f"The table of kinship {path} does not exist.")
    table = read_words(path)
    table.columns = [name.upper() for name in table.columns]
    columns = [next((name for name in names if name in table.columns), None)
               for names in (("IID1", "ID1"), ("IID2", "ID2"), ("KINSHIP",))]  # fmt: skip
    if None in columns:
        raise DataError(f"{path} needs the columns IID1, IID2 and KINSHIP; it has {listing(table.columns)}.")
    close = table[read_numbers(path, table[columns[2]], "values of kinship") > threshold]
    return list(zip(close[columns[0]], close[columns[1]], strict=True))
