import pytest

from common.modalities import CANONICAL, TEMPLATES, canonical_channels, canonical_name, canonical_order, shown_names


@pytest.mark.parametrize(
    ("given", "expected"),
    [("T1w", "t1"), ("t1n", "t1"), ("T1_pre", "t1"), ("MPRAGE", "t1"), ("spgr", "t1"), ("BRAVO", "t1"),
     ("T1", "t1"),  # never guessed to be post-contrast
     ("T1ce", "t1c"), ("T1-Gd", "t1c"), ("t1 post", "t1c"), ("T2w", "t2"), ("t2f", "flair"), ("FLA", "flair"),
     ("T2_FLAIR", "flair"), ("PDw", "pd"), ("T2starw", "t2star"), ("high_b", "hbv"), ("TOF", "mra"), ("angio", "mra"),
     ("T1_IR", "t1ir"), ("1H", "1h"), ("Xe", "xe"), ("UNIT1", "unit1"), ("SWI", "swi"),
     ("B-1000", "b-1000"), (" T1rho ", "t1rho"), ("red", "red")],
)  # fmt: skip
def test_canonical_names(given, expected):
    assert canonical_name(given) == expected
    assert canonical_name(canonical_name(given)) == expected


def test_every_canonical_name_is_its_own():
    assert [canonical_name(name) for name in CANONICAL] == list(CANONICAL)
    assert TEMPLATES == ("flair", "t1", "t1c", "t2", "mra", "pd", "dwi", "adc")


def test_the_order_of_channels():
    assert canonical_order(["zz", "xe", "t2", "aa", "t1c", "t1", "flair", "t2"]) == (
        "flair", "t1", "t1c", "t2", "xe", "aa", "zz"
    )  # fmt: skip


def test_channels_of_old_checkpoints():
    assert canonical_channels(["t1c", "t1n", "t2f", "t2w"]) == ("t1c", "t1", "flair", "t2")
    # Two channels that would be one keep their own names: nothing matches them by mistake.
    assert canonical_channels(["T1w", "mprage", "T2w"]) == ("t1w", "mprage", "t2")


def test_a_modality_of_several_spellings_is_shown_by_its_canonical_name():
    assert shown_names({"t1": ["T1w"], "t1c": ["t1ce", "T1GD"]}) == {"t1": "T1w", "t1c": "t1c"}
