import unicodedata
from string import ascii_letters, digits

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import DataError
from common.names import MAX_BYTES, case_twins, printable, safe_name
from datamodules.listed_files import path_under

ORDINARY = (
    "BraTS-GLI-00001-000",
    "sub-01",
    "002_S_0295",
    "s50414267",
    "case.1",
    "_",
    "x" * MAX_BYTES,
    "2026-11-23_10-00-00",
)
STRANGE = (
    "", ".", "..", "...", "./../../.../victim", "../../victim", "/etc/passwd", "sub-01/ses-1", "a\\b", "C:x", "a\nb",
    "a\r", "a\0b", "n" * 101, "n" * 250, "n" * 300, "\u00fc" * 300, "a.", "a ", " a", "a..", ".hidden", "-rf", "~root",
    "a~b", "CON", "nul.txt", "com1.nii.gz", "\ud800", "caf\u00e9", "cafe\u0301", "\u202ea", "key=1", "a b", "$HOME",
    "*", "a:b",
)  # fmt: skip


@pytest.mark.parametrize("name", ORDINARY)
def test_an_ordinary_id_stays_as_it_is(name):
    assert safe_name(name) == name


@pytest.mark.parametrize("name", STRANGE)
def test_any_other_text_becomes_one_bounded_part_of_a_path(name, tmp_path):
    part = safe_name(name)
    assert part != name
    assert len(part.encode()) <= MAX_BYTES
    (tmp_path / part).mkdir()
    assert [path.name for path in tmp_path.iterdir()] == [part]
    assert part[0] not in ".-~"
    assert part[-1] != "."


def folded(name):
    """Return what a file system that knows neither case nor normalisation makes of a name."""
    return unicodedata.normalize("NFKC", name).casefold()


def test_no_two_texts_share_a_name():
    names = [*ORDINARY, *STRANGE, *(safe_name(name) for name in STRANGE)]
    assert len({folded(safe_name(name)) for name in names}) == len(set(names))


def test_names_that_differ_only_in_case_differ_in_more_than_case():
    names = ["Case-1", "case-1", "CASE-1", "other", "Stra\u00dfe", "strasse"]
    twins = case_twins(names)
    assert twins == {"Case-1", "case-1", "CASE-1", "Stra\u00dfe", "strasse"}
    assert len({folded(safe_name(name, twins)) for name in names}) == len(names)
    assert safe_name("other", twins) == "other"


@given(st.text(st.characters(exclude_categories=()), max_size=300))
def test_whatever_a_name_holds_it_stays_in_its_folder(name):
    part = safe_name(name)
    assert set(part) <= set(f"{ascii_letters}{digits}._-~")
    assert part.strip(".")
    assert len(part) <= MAX_BYTES
    assert printable(name).isprintable()


@pytest.mark.parametrize("name", ["../b.png", "/b.png", "a/../../b.png", "a\0.png"])
def test_a_listed_file_that_leaves_its_root_is_refused(tmp_path, name):
    with pytest.raises(DataError, match="does not lie under") as error:
        path_under(tmp_path, name, "list.csv")
    assert str(error.value).isprintable()
    assert path_under(tmp_path, "a/b..png", "list.csv") == tmp_path / "a/b..png"


def test_no_name_can_colour_or_break_a_line():
    assert printable("a\x1b[31mb\nc\udcff\u00e9") == "a\\x1b[31mb\\nc\\udcff\u00e9"
