from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.errors import DataError
from datamodules.tables import (
    MAX_CELL,
    parse_table,
    read_numbers,
    read_parquet,
    read_positions,
    read_table,
    read_words,
)


def cells(table):
    return table.to_dict("list")


@pytest.mark.parametrize("quote", ["", '"'])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("delimiter", [",", "\t", ";"])
def test_cells_are_the_text_that_was_written(tmp_path, quote, end, delimiter):
    """With and without quotes two parsers are at work; both must say the same."""
    rows = [["", ""], [" id ", f"{quote}name{quote}"], ["007", " 1.50"], ["nan", "é "], ["", ""], ["1e5", "NULL"]]
    path = tmp_path / "table.csv"
    path.write_bytes(end.join(delimiter.join(row) for row in rows).encode("utf-8-sig"))
    table = read_table(path)
    assert cells(table) == {"id": ["007", "nan", "1e5"], "name": ["1.50", "é", "NULL"]}


def test_columns_without_a_name_are_left_out():
    assert cells(parse_table("a,,b,\n1,x,2,\n,,,,,,\n", "x")) == {"a": ["1"], "b": ["2"]}
    assert cells(parse_table('a,,"b",\n1,x,2,\n,,,,,,\n', "x")) == {"a": ["1"], "b": ["2"]}
    assert cells(parse_table("a\n", "x")) == {"a": []}


def test_quotes_that_are_meant():
    text = 'image,text\na.png,"one, two\nthree ""four"""\nb.png,5" wide\nc.png, "x, y"\n'
    assert parse_table(text, "x")["text"].tolist() == ['one, two\nthree "four"', '5" wide', "x, y"]
    assert cells(parse_table('a\tb\n"1\t2\n', "x", "\t", quotes=False)) == {"a": ['"1'], "b": ["2"]}
    prose = 'image,text,subject\na.png,"Opacity, left\nEffusion, right",p1\n'
    assert parse_table(prose, "x")["subject"].tolist() == ["p1"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2,3\n", "x line 2 has 3 fields, the header has 2"),
        ("a,b\n1,2\n\n\n1\n", "x line 5 has 1 fields"),
        ("a,b\n1,2,3\n4,5,6\n", "x line 2 has 3 fields"),
        ('a,b\n"1\n2",3\n4\n', "x line 4 has 1 fields"),
        ("a,a\n1,2\n", "x has two columns called 'a'"),
        ('"a",a\n1,2\n', "x has two columns called 'a'"),
        ("", "x cannot be read as a table: it is empty"),
        ("\n , \n", "x cannot be read as a table: it is empty"),
        ('i,t,s\na.png,"x,p1\nb.png,y,p2\n', "x line 2 opens a quote that is never closed"),
        ('i,t,s\na.png,"x,p1\nb.png,"y",p2\n', r"x line 3 goes on after a closing quote \(the row began in line 2\)"),
        ('i,t,s\na.png,"x,p1\nc.png,z,p3\nb.png,y",p2\n', "x lines 2 to 4 are one row by their quotes and 3 rows by"),
        ('i,s,t\na.png,p1,"x\nb.png,p2,y"\n', "x lines 2 to 3 are one row by their quotes"),
        (f"a,b\n1,{'x' * (MAX_CELL + 1)}\n", "x line 2 has a cell of more than 1,048,576 characters"),
        (f'a,b\n1,"{"x" * (10 * MAX_CELL)}"\n', "x line 2 has a cell of more than 1,048,576 characters"),
    ],
)
def test_rules_of_tables(text, message):
    with pytest.raises(DataError, match=message) as error:
        parse_table(text, "x")
    assert len(str(error.value)) <= 300


def test_lines_count_from_the_top_of_the_file():
    with pytest.raises(DataError, match="x line 12 has 3 fields"):
        parse_table("a,b\n1,2,3\n", "x", skipped=10)


def test_large_tables_come_in_blocks():
    rows = [f'"{index}",{"é" * (index % 7)}' for index in range(120_001)]
    table = parse_table("\n".join(["a,b", *rows]), "x")
    assert table["a"].tolist() == [str(index) for index in range(120_001)]
    assert table["b"].iloc[-1] == "é" * (120_000 % 7)


def test_json_lines_keep_their_numbers(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"subject": 9007199254740993, "x": null}\n{"subject": 1.50, "y": true, "x": [1, "a"]}\n')
    table = read_table(path)
    assert cells(table) == {"subject": ["9007199254740993", "1.50"], "x": ["", "['1', 'a']"], "y": ["", "true"]}
    for text, message in (("", "empty"), ('{"a": 1, " a": 2}', "two columns called 'a'"),
                          (f'{{"a": "{"x" * (MAX_CELL + 1)}"}}', "a cell of 1,048,577 characters")):  # fmt: skip
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            read_table(path)


def test_parquet_ids_with_a_null_are_whole_numbers(tmp_path):
    path = tmp_path / "a.parquet"
    pd.DataFrame({"id": [1001, None, 3], "share": [0.5, None, 1.0], "name": [" x", None, "1001.0"]}).to_parquet(path)
    expected = {"id": ["1001", "", "3"], "share": ["0.5", "", "1.0"], "name": ["x", "", "1001.0"]}
    assert cells(read_table(path)) == expected
    other = {"big": [9007199254740993, None], "flag": [True, None], "kind": pa.array(["a", None]).dictionary_encode(),
             "none": pa.nulls(2)}  # fmt: skip
    pq.write_table(pa.table(other), path)
    assert cells(read_table(path)) == {"big": ["9007199254740993", ""], "flag": ["true", ""], "kind": ["a", ""],
                                       "none": ["", ""]}  # fmt: skip


def test_what_parquet_is_refused(tmp_path, capsys):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"a": ["x" * (5 * MAX_CELL)]}), path)
    with pytest.raises(DataError, match="a cell of more than 1,048,576"):
        read_table(path)
    # A text that is stored once and meant 3,000 times: 3 GB from a small file.
    folded = pa.DictionaryArray.from_arrays(pa.array([0] * 3000, pa.int32()), pa.array(["x" * MAX_CELL]))
    pq.write_table(pa.table({"a": folded}), path)
    assert path.stat().st_size < 10**6
    with pytest.raises(DataError, match="holds more than 2,147,483,648 bytes"):
        read_table(path)
    pq.write_table(pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"]), path)
    with pytest.raises(DataError, match="two columns called 'a'"):
        read_table(path)
    pq.write_table(pa.table({"a": [1], "vector": [[1.0, 2.0]]}), path)
    assert cells(read_table(path)) == {"a": ["1"]}
    assert "note: a.parquet: vector hold lists or bytes" in capsys.readouterr().out
    with pytest.raises(DataError, match="has no column b; it has a, vector"):
        read_parquet(path, ["a", "b"])
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read_table(path)


def test_words(tmp_path):
    path = tmp_path / "a.sscore"
    path.write_text("#IID  SCORE\n\n a\t1\nb 2 \n")
    assert cells(read_words(path)) == {"IID": ["a", "b"], "SCORE": ["1", "2"]}
    assert cells(read_words(path, ["who"])) == {"who": ["#IID", "a", "b"]}
    for text, message in (("a b\n1 2\n1 2 3", "line 3 has 3 words, the first line 2"), ("\n", "is empty"),
                          ("a a\n1 2", "two columns called 'a'")):  # fmt: skip
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            read_words(path)
    with pytest.raises(DataError, match="line 1 has 2 words, and 3 are needed: x, y, z"):
        read_words(path, ["x", "y", "z"])


def test_numbers():
    path = Path("x")
    assert read_positions(path, pd.Series(["12", "", "NA", "1e3", "-4"])).tolist() == [12, 0, 0, 1000, -4]
    assert read_numbers(path, pd.Series(["1", "nan", "-2e1", ""]), "weights").fillna(7).tolist() == [1.0, 7, -20.0, 7]
    with pytest.raises(DataError, match="x has 3 weights that are not numbers, first '1e400'"):
        read_numbers(path, pd.Series(["nan", "1", "1e400", "y", "-inf"]), "weights")
    with pytest.raises(DataError, match=r"x has 2 positions that are not whole numbers, first '1\.5'"):
        read_positions(path, pd.Series(["1", "1.5", "9" * 30]))


@pytest.mark.real_data
def test_real_tables_read_as_a_plain_reader_reads_them(real_data):
    """Every CSV of the samples, cell by cell, against pandas; names and cells without outer blanks."""
    root = real_data("covid_cxr").parent
    paths = [path for path in sorted(root.rglob("*.csv")) if path.is_file()]
    assert len(paths) >= 8
    for path in paths:
        plain = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig", header=None)
        names = [name.strip() for name in plain.iloc[0]]
        rows = [[cell.strip() for cell, name in zip(row, names, strict=True) if name] for row in plain.values[1:]]
        table = read_table(path)
        assert list(table.columns) == [name for name in names if name]
        assert table.to_numpy().tolist() == rows
