"""Tables from outside: CSV, TSV, JSON lines and Parquet, every cell as text."""

from pathlib import Path

import pandas as pd

from common.errors import DataError


def read_table(path: Path) -> pd.DataFrame:
    """Read a table as text; names and values lose outer blanks, empty cells are empty text.

    Raises:
        DataError: the file cannot be read as what its name says.
    """
    name = path.name.lower()
    try:
        if name.endswith(".parquet"):
            table = pd.read_parquet(path)
        elif name.endswith(".jsonl"):
            table = pd.read_json(path, lines=True, dtype=False)
        else:
            mark = "\t" if name.endswith((".tsv", ".tsv.gz")) else ","
            table = pd.read_csv(path, sep=mark, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (ValueError, OSError) as error:
        raise DataError(f"{path} cannot be read as a table: {str(error).splitlines()[0]}") from error
    table.columns = [str(name).strip() for name in table.columns]
    table = table.astype(object).where(table.notna(), "")
    return table.map(lambda value: str(value).strip())
