"""Untrusted tables: CSV, TSV, JSON lines, Parquet, and whitespace-separated words; every cell is text.

A table is UTF-8, every row has as many fields as the header, column names are unique, and quotes are closed.
Violations are refused with their line and never corrected, as a wrong subject is worse than none.
:mod:`datamodules.ids` joins a table's ids with those of an archive.
"""

import csv
import re
from collections import Counter
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from common.errors import DataError
from common.runtime.reporting import print_line
from datamodules.files import MAX_BYTES, decoded, json_lines, listing, read_bytes, read_text, short, zipped_member

#: Most characters of a cell; no report is longer.
MAX_CELL = 2**20
#: Rows collected before they become columns of bytes, which take a tenth of the memory.
_BLOCK = 50_000
_DELIMITERS = ",\t;"
_QUOTED = re.compile(r'"[^"]*"')
_EXACT = 2.0**53
#: Unknown values in a column of numbers.
_NO_NUMBER = ("", "nan", "na", "n/a", "none", "null", ".", "-nan")


def read_table(path: Path) -> pd.DataFrame:
    """Read a table as text: names and cells are stripped, empty cells and nulls become empty texts.

    The suffix gives the format: ``.parquet``, ``.jsonl``, ``.zip`` with one table in it, otherwise text delimited by
    commas, tabs or semicolons, whichever is most frequent in its header. Columns without a name and rows
    without a value are left out.

    Raises:
        DataError: the file cannot be read, is not UTF-8, or breaks a rule of tables; the message names the line.
    """
    name = path.name.lower()
    if name.endswith(".parquet"):
        return _parquet_text(path)
    if name.endswith((".jsonl", ".ndjson")):
        return _json_table(path)
    data = zipped_member(path) if name.endswith(".zip") else read_bytes(path)
    return parse_table(decoded(data, str(path)), str(path))


def parse_table(
    text: str, place: str, delimiter: str | None = None, quotes: bool = True, skipped: int = 0
) -> pd.DataFrame:
    """Parse a table with a header; see :func:`read_table`.

    Args:
        text: The table.
        place: Its name in error messages.
        delimiter: Delimiter of fields; None: the most frequent one in the header.
        quotes: Whether quotes enclose fields.
        skipped: Number of lines of the file before the text.

    Raises:
        DataError: a rule of tables is broken; the message names the line.
    """
    if "\r" in text:
        text = text.replace("\r\n", "\n") if "\n" in text else text.replace("\r", "\n")
    if delimiter is None:
        delimiter = _delimiter_of(text)
    plain = None if (quotes and '"' in text) or "\r" in text else _plain_table(text, place, delimiter)
    return _quoted_table(text, place, delimiter, quotes, skipped) if plain is None else plain


def _delimiter_of(text: str) -> str:
    """Return the delimiter of the first nonblank line."""
    bare = _QUOTED.sub("", text[:MAX_CELL].lstrip().partition("\n")[0])
    return max(_DELIMITERS, key=bare.count)


def _plain_table(text: str, place: str, delimiter: str) -> pd.DataFrame | None:
    """Parse a table without quotes, ten times as fast as row by row; None if it is malformed.

    Raises:
        DataError: two columns with the same name.
    """
    head = text[:MAX_CELL].lstrip("\n").partition("\n")[0].split(delimiter)
    if not any(name.strip() for name in head):
        return None
    kinds = {f"f{index}": pa.large_string() for index in range(len(head))}
    try:
        table = pa_csv.read_csv(
            pa.BufferReader(text.encode()),
            pa_csv.ReadOptions(use_threads=False, autogenerate_column_names=True, block_size=MAX_CELL),
            pa_csv.ParseOptions(delimiter=delimiter, quote_char=False),
            pa_csv.ConvertOptions(column_types=kinds, strings_can_be_null=False),
        )
    except pa.ArrowInvalid:
        return None
    cells = [pc.utf8_trim_whitespace(column) for column in table.columns]
    if len(cells) != len(head) or any((pc.max(pc.binary_length(column)).as_py() or 0) > MAX_CELL for column in cells):
        return None
    columns = _Columns([column[0].as_py() for column in cells], place)
    filled = reduce(pc.or_, [pc.not_equal(column, "") for column in cells])
    columns.append([column.filter(filled)[1:] for column in cells])
    return columns.table()


def _quoted_table(text: str, place: str, delimiter: str, quotes: bool, skipped: int) -> pd.DataFrame:
    """Parse a table row by row; see :func:`parse_table`.

    Raises:
        DataError: a rule of tables is broken; the message names the line.
    """
    csv.field_size_limit(MAX_CELL)
    quoting: Any = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
    ended = (line + "\n" for line in text.split("\n"))
    reader = csv.reader(ended, delimiter=delimiter, strict=True, skipinitialspace=True, quoting=quoting)
    columns: _Columns | None = None
    before = 0
    try:
        for row in reader:
            first, before = before + 1, reader.line_num
            if not any(row):
                continue
            if columns is None:
                columns = _Columns([name.strip() for name in row], place)
                continue
            if len(row) != columns.width:
                raise DataError(_miscounted(place, skipped + first, len(row), columns.width))
            if before > first:
                _check_swallowed(row, delimiter, place, skipped + first, skipped + before)
            columns.add(row)
    except csv.Error as error:
        raise DataError(_broken(str(error), place, skipped + before + 1, skipped + reader.line_num)) from error
    if columns is None:
        raise DataError(f"{place} cannot be read as a table: it is empty.")
    return columns.table()


def _miscounted(place: str, line: int, found: int, wanted: int) -> str:
    return (
        f"{place} line {line} has {found} fields, the header has {wanted}: correct the line, or put quotes around a "
        f"cell that holds the character between fields."
    )


def _broken(error: str, place: str, first: int, last: int) -> str:
    """Describe a parser error about quotes."""
    if error.startswith("unexpected end"):
        return f"{place} line {first} opens a quote that is never closed: close it, or double a quote that is text."
    if "limit" in error:
        return f"{place} line {first} has a cell of more than {MAX_CELL:,} characters: is a quote not closed?"
    if "expected after" in error:
        return (
            f"{place} line {last} goes on after a closing quote (the row began in line {first}): close every quote, "
            f"and double a quote that is text."
        )
    return f"{place} line {last} cannot be read as a row of a table: {error}."


def _shape(text: str) -> str:
    """Return the kinds of words in a name: letters, digits, or both."""
    return re.sub(r"\w+", lambda word: "a" if word[0].isalpha() else "0" if word[0].isdigit() else "m", text.strip())


def _check_swallowed(row: Sequence[str], delimiter: str, place: str, first: int, last: int) -> None:
    """Refuse a row that spans lines which would each be a row: a stray quote swallowed them.

    Most such rows break a rule of quotes. This finds the rest, between two stray quotes: every line has enough fields
    and begins with the same kind of name as the row.

    Raises:
        DataError: names the lines.
    """
    place_of = next(index for index, cell in enumerate(row) if "\n" in cell or "\r" in cell)
    parts = re.split(r"\r\n|\r|\n", row[place_of])
    fields = [part.count(delimiter) + 1 for part in parts]
    fields[0] += place_of
    fields[-1] += len(row) - 1 - place_of
    kind = _shape(row[0] if place_of else parts[0].split(delimiter)[0])
    begins = [_shape(part.split(delimiter)[0]) for part in parts[1:]]
    if min(fields) >= len(row) and all(begin == kind for begin in begins):
        raise DataError(
            f"{place} lines {first} to {last} are one row by their quotes and {len(parts)} rows by their fields: close "
            f"the quote in line {first}, or double it; a text of such lines can stand in a .jsonl table."
        )


class _Columns:
    """The columns of a table, filled row by row.

    Args:
        names: Their names; columns without one are dropped.
        place: The table's name in error messages.

    Raises:
        DataError: a name occurs twice.
    """

    def __init__(self, names: Sequence[str], place: str) -> None:
        self.width = len(names)
        self._names = names
        self._rows: list[Sequence[str]] = []
        self._parts: list[list[pa.Array]] = [[] for _ in names]
        twice = next((name for name, count in Counter(names).items() if count > 1 and name), None)
        if twice is not None:
            raise DataError(f"{place} has two columns called {short(twice)!r}: rename one of them.")

    def add(self, row: Sequence[str]) -> None:
        """Add a row with one field per name."""
        self._rows.append(row)
        if len(self._rows) == _BLOCK:
            self._close()

    def _close(self) -> None:
        cells = zip(*self._rows, strict=True) if self._rows else [[] for _ in self._names]
        self.append([pc.utf8_trim_whitespace(pa.array(column, pa.large_string())) for column in cells])
        self._rows = []

    def append(self, cells: Sequence[pa.Array | pa.ChunkedArray]) -> None:
        """Add rows given as columns."""
        for parts, column in zip(self._parts, cells, strict=True):
            parts += column.chunks if isinstance(column, pa.ChunkedArray) else [column]

    def table(self) -> pd.DataFrame:
        """Return all rows."""
        self._close()
        columns = zip(self._names, self._parts, strict=True)
        return pd.DataFrame({name: pa.chunked_array(parts, pa.large_string()).to_pandas() for name, parts in columns
                             if name})  # fmt: skip


def read_words(path: Path, names: Sequence[str] | None = None) -> pd.DataFrame:
    """Read a whitespace-separated table, such as those of PLINK.

    Args:
        path: The table.
        names: Names of its first columns; None: the first line has names and may begin with ``#``.

    Raises:
        DataError: it cannot be read, is not UTF-8, or a line has a different number of words than the first.
    """
    columns: _Columns | None = None
    for number, line in enumerate(read_text(path).split("\n"), 1):
        words = line.split()
        if not words:
            continue
        if columns is None:
            if names is None:
                columns = _Columns([word.lstrip("#") for word in words], str(path))
                continue
            if len(words) < len(names):
                raise DataError(f"{path} line {number} has {len(words)} words, and {len(names)} are needed: "
                                f"{', '.join(names)}.")  # fmt: skip
            columns = _Columns([*names, *[""] * (len(words) - len(names))], str(path))
        if len(words) != columns.width:
            raise DataError(f"{path} line {number} has {len(words)} words, the first line {columns.width}: correct it.")
        columns.add(words)
    if columns is None:
        raise DataError(f"{path} cannot be read as a table: it is empty.")
    return columns.table()


def _json_table(path: Path) -> pd.DataFrame:
    """Read JSON lines as a table: one column per key, in order of appearance.

    Raises:
        DataError: a line is not an object, or a name or cell is too long.
    """
    rows = [{name: _json_cell(value) for name, value in row.items()} for row in json_lines(path)]
    names = list(dict.fromkeys(name for row in rows for name in row))
    if not names:
        raise DataError(f"{path} cannot be read as a table: it is empty.")
    longest = max((len(cell) for row in rows for cell in row.values()), default=0)
    if longest > MAX_CELL:
        raise DataError(f"{path} has a cell of {longest:,} characters; {MAX_CELL:,} are read at most.")
    columns = _Columns([name.strip() for name in names], str(path))
    for row in rows:
        columns.add([row.get(name, "") for name in names])
    return columns.table()


def _json_cell(value: Any) -> str:
    """Return the text of a value: null is empty, and numbers are already text."""
    if value is None or isinstance(value, str):
        return value or ""
    return str(value).lower() if isinstance(value, bool) else str(value)


def read_parquet(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a Parquet file in pieces, with a memory limit.

    Args:
        path: The file.
        columns: Columns to read; None: all.

    Raises:
        DataError: it is missing, damaged, too large, has a duplicate column, or lacks a requested one.
    """
    if not path.is_file():
        raise DataError(f"{path} is not there.")
    try:
        with pq.ParquetFile(path) as plain:
            schema = plain.schema_arrow
            texts = [entry.name for entry in schema if pa.types.is_string(entry.type)]
        _check_names(path, schema.names, columns or ())
        batches, total = [], 0
        # Dictionaries: a text stored once and repeated a million times is checked before it is expanded.
        with pq.ParquetFile(path, read_dictionary=texts) as file:
            for batch in file.iter_batches(columns=None if columns is None else list(columns)):
                total += sum(_unfolded_size(path, column) for column in batch.columns)
                if total > MAX_BYTES:
                    raise DataError(f"{path} holds more than {MAX_BYTES:,} bytes, more than is read.")
                batches.append(batch)
            if not batches:
                return schema.empty_table() if columns is None else schema.empty_table().select(list(columns))
    except DataError:
        raise
    except (OSError, ValueError, TypeError, KeyError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0][:120]}") from error
    return pa.concat_tables([pa.Table.from_batches([batch]).unify_dictionaries() for batch in batches])


def _check_names(path: Path, names: Sequence[str], wanted: Sequence[str]) -> None:
    """Refuse a file with duplicate column names, or without a requested column.

    Raises:
        DataError: names it.
    """
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise DataError(f"{path} has two columns called {short(twice)!r}: rename one of them.")
    missing = [name for name in wanted if name not in names]
    if missing:
        raise DataError(f"{path} has no column {', '.join(missing)}; it has {listing(names)}.")


def _unfolded_size(path: Path, column: pa.Array) -> int:
    """Return the expanded size of a column in bytes, counting repeated texts.

    Raises:
        DataError: a cell is too long.
    """
    if not pa.types.is_dictionary(column.type):
        return column.nbytes
    lengths = pc.binary_length(column.dictionary)
    if (pc.max(lengths).as_py() or 0) > 4 * MAX_CELL:
        raise DataError(f"{path} has a cell of more than {MAX_CELL:,} characters.")
    return pc.sum(pc.take(lengths, column.indices)).as_py() or 0


def _parquet_text(path: Path) -> pd.DataFrame:
    """Read a Parquet file as text; columns of lists or bytes are left out, which is noted.

    Raises:
        DataError: it is damaged, or a column name occurs twice.
    """
    table = read_parquet(path)
    found: dict[str, pd.Series] = {}
    left_out = []
    try:
        for name, column in zip(table.column_names, table.columns, strict=True):
            text = _as_text(column)
            if text is None:
                left_out.append(name)
            else:
                found[name.strip()] = pc.utf8_trim_whitespace(pc.fill_null(text, "")).to_pandas()
    except (ValueError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read as text: {str(error).splitlines()[0][:120]}") from error
    if left_out:
        print_line(f"note: {path.name}: {', '.join(left_out)} hold lists or bytes, no text, and are left out")
    if len(found) + len(left_out) < table.num_columns:
        raise DataError(f"{path} has two columns whose names differ only in outer spaces: rename one of them.")
    return pd.DataFrame(found)


def _as_text(column: pa.ChunkedArray) -> pa.ChunkedArray | None:
    """Return a column as text, keeping nulls; None if it holds no text.

    pandas stores whole numbers as floats as soon as one is missing: such columns become whole numbers again.
    """
    kind = column.type
    if pa.types.is_dictionary(kind):
        column, kind = column.cast(kind.value_type), kind.value_type
    if pa.types.is_floating(kind):
        values = column.to_numpy().astype(np.float64)
        known = ~np.isnan(values)
        whole = known.any() and bool(np.all((values[known] % 1 == 0) & (np.abs(values[known]) < _EXACT)))
        texts = [str(int(value) if whole else value) if there else None
                 for value, there in zip(column.to_pylist(), known, strict=True)]  # fmt: skip
        return pa.chunked_array([pa.array(texts, pa.large_string())])
    if pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return None
    if pa.types.is_null(kind):
        return pa.chunked_array([pa.nulls(len(column), pa.large_string())])
    return column.cast(pa.large_string())


def read_numbers(path: Path, column: pd.Series, what: str) -> pd.Series:
    """Return a column as float64; NaN for empty or unknown cells.

    Args:
        path: The table, for error messages.
        column: Its cells.
        what: Their description in error messages.

    Raises:
        DataError: a cell is not a finite number.
    """
    known = ~column.str.lower().isin(_NO_NUMBER)
    values = pd.to_numeric(column, errors="coerce").astype(np.float64)
    odd = column[known & ~np.isfinite(values)]
    if len(odd):
        raise DataError(f"{path} has {len(odd)} {what} that are not numbers, first {short(odd.iloc[0])!r}.")
    return values.where(known)


def read_positions(path: Path, column: pd.Series) -> pd.Series:
    """Return a column of positions on a chromosome as int64; 0 if unknown.

    Raises:
        DataError: a cell is not a whole number.
    """
    values = read_numbers(path, column, "positions").fillna(0)
    odd = column[(values % 1 != 0) | (values.abs() >= _EXACT)]
    if len(odd):
        raise DataError(f"{path} has {len(odd)} positions that are not whole numbers, first {short(odd.iloc[0])!r}.")
    return values.astype(np.int64)
