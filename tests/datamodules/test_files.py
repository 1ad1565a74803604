import gzip
import os
import zipfile
from pathlib import Path

import pytest

from common.errors import DataError
from datamodules.files import (
    decoded,
    first_line,
    json_lines,
    listed_names,
    listing,
    parse_json,
    parse_xml,
    read_bytes,
    read_lines,
    read_matrix,
    short,
    zipped_member,
)
from datamodules.listed_files import path_under


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("a,b\n1,é\n".encode("latin-1"), "x line 2 is not UTF-8: byte 6 of the file is 0xE9, as in Latin-1"),
        ("a,b\n1,é\n".encode("utf-16"), "x line 1 is not UTF-8: byte 0 of the file is 0xFF, as in UTF-16. Save"),
        ("a\nb\n".encode("utf-16-le"), "x line 1 is not UTF-8: byte 1 of the file is 0x00, as in UTF-16"),
        (b"\xef\xbb\xbfa\n\xff", "x line 2 is not UTF-8: byte 5 of the file is 0xFF"),
    ],
)
def test_other_encodings_are_refused_with_line_and_byte(data, message):
    with pytest.raises(DataError, match=message):
        decoded(data, "x")


def test_a_byte_order_mark_does_not_count(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes("é\r\n\u2028x\n\n y ".encode("utf-8-sig"))
    assert decoded(path.read_bytes(), "x")[0] == "é"
    assert read_lines(path) == ["é", "\u2028x", "", " y "]
    assert listed_names([path, path]) == ["é", "x", "y"] * 2
    assert first_line(path) == "é"
    assert first_line(tmp_path / "nowhere") == ""


def test_gzip_is_known_by_its_content_and_read_to_its_check_sum(tmp_path):
    path = tmp_path / "a.gz"
    path.write_bytes(b"plain")
    assert read_bytes(path) == b"plain"
    whole = gzip.compress(os.urandom(5000), mtime=0)
    path.write_bytes(whole)
    assert len(read_bytes(path)) == 5000
    flipped = bytearray(whole)
    flipped[3000] ^= 1
    for data in (whole[:-1], whole[:2000], bytes(flipped), whole + b"tail", b"\x1f\x8b"):
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"a.gz is damaged \(.*\): fetch it again"):
            read_bytes(path)


def test_bombs_and_what_is_no_file(tmp_path):
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(bytes(10**8)))
    with pytest.raises(DataError, match=r"a.gz holds more than 26,\d\d\d,\d\d\d bytes"):
        read_bytes(path)
    path.write_bytes(bytes(11))
    with pytest.raises(DataError, match="holds more than 10 bytes"):
        read_bytes(path, limit=10)
    os.mkfifo(tmp_path / "fifo")
    for name in ("fifo", "."):
        with pytest.raises(DataError, match="is not a regular file"):
            read_bytes(tmp_path / name)
    with pytest.raises(DataError, match="is not there"):
        read_bytes(tmp_path / "nowhere")


def test_zip_archives(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("one", "1" * 500)
    assert zipped_member(path) == b"1" * 500
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DataError, match="cannot be read as a zip archive"):
        zipped_member(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb", bytes(3 * 10**7))
    with pytest.raises(DataError, match="promises 30,000,000 bytes"):
        zipped_member(path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("two", "2")
    with pytest.raises(DataError, match="holds 2 files; it must hold exactly one table"):
        zipped_member(path)


def test_numbers_of_json_stay_as_written():
    text = '{"id": 9007199254740993, "x": [1.50, 1e400], "n": NaN, "t": true, "z": null}'
    assert parse_json(text, "x") == {"id": "9007199254740993", "x": ["1.50", "1e400"], "n": None, "t": True, "z": None}
    assert parse_json(f"[{'9' * 5000}]", "x") == ["9" * 5000]
    assert parse_json(r'["\\u0000"]', "x") == [r"\u0000"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "x cannot be read as JSON: Expecting property name enclosed in double quotes at column 2"),
        ("{\n1", "at line 2, column 1"),
        ('{"a": 1, "a": 2}', "the key 'a' occurs twice in one object"),
        ("[" * 100_000, "x is nested too deeply"),
        (r'["\ud800"]', r"the escape \\ud800 is half of a character"),
        (r'["\u0000"]', r"the escape \\u0000 is not a valid character"),
    ],
)
def test_what_json_is_refused(text, message):
    with pytest.raises(DataError, match=message):
        parse_json(text, "x")


def test_json_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}')
    assert list(json_lines(path)) == [{"a": "1"}, {"a": "2"}]
    path.write_text('{"a": 1}\n[2]')
    with pytest.raises(DataError, match="line 2 is not a JSON object"):
        list(json_lines(path))


def test_xml():
    element = parse_xml("<a><b>c</b></a>", "x")
    assert element is not None
    assert element[0].text == "c"
    assert parse_xml("<a><b>", "x") is None
    with pytest.raises(DataError, match="x has a DOCTYPE or ENTITY"):
        parse_xml("<!DOCTYPE a><a/>", "x")


def test_matrices_are_looked_at_before_they_are_read(tmp_path):
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "m.h5"
    with h5py.File(path, "w") as file:
        file["G"] = [[1, 2]]
        file.create_dataset("huge", (10**9, 10**6), "f8", chunks=(1000, 1000))
        file["text"] = [["a", "b"]]
        file["link"] = h5py.ExternalLink(str(path), "G")
        file.create_group("group")
        file.create_dataset("outside", (1, 2), "f4", external=[(str(tmp_path / "m.raw"), 0, 8)])
    assert read_matrix(path, "G", (1, 2), "scores").tolist() == [[1.0, 2.0]]
    for name, message in (("huge", "holds 1000000000 x 1000000 values, its names are 1 x 2"),
                          ("text", "holds object instead of numbers"), ("link", "stores link in another file"),
                          ("outside", "stores outside in another file"), ("group", "cannot be read as scores"),
                          ("none", "cannot be read as scores")):  # fmt: skip
        with pytest.raises(DataError, match=message):
            read_matrix(path, name, (1, 2), "scores")
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(DataError, match="cannot be read as scores"):
        read_matrix(path, "G", (1, 2), "scores")


@pytest.mark.parametrize("name", ["/etc/x.png", "a/../../x.png", "..", "~/x.png", "a\0.png", "a" * 256, "a/" * 3000])
def test_paths_stay_inside(name):
    with pytest.raises(DataError, match=r"table.csv names .*(which does not lie under /archive|too long for a path)"):
        path_under(Path("/archive"), name, "table.csv")


def test_paths_inside():
    assert path_under(Path("/archive"), "a/b..c/d.png", "table.csv") == Path("/archive/a/b..c/d.png")


def test_what_a_refusal_quotes_is_short_and_on_one_line():
    assert short("a\nb\x1b[31m") == "a?b?[31m"
    assert short("x" * 61) == "x" * 60 + "..."
    assert listing(["a", "b"]) == "a, b"
    assert listing([]) == "none"
    assert listing(f"column {i}" for i in range(50)).endswith("column 8, column 9, ... (50 in all)")
    assert len(listing(["x" * 5000] * 5)) < 150
