import numpy as np
import pytest

from common.errors import DataError
from datamodules.images.values import ImageError
from datamodules.labelled.siim import SIIMPneumothorax, decode_runs, encode_runs

TABLE = "ImageId, EncodedPixels\n1.2.1, -1\n1.2.2, 5 2 2 3\n1.2.3,0 1\n1.2.2,0 1\n1.2.4,-1\n"
EXAMPLE = [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 1, 0]]


@pytest.fixture
def root(tmp_path):
    (tmp_path / "train-rle.csv").write_text(TABLE)
    for name in ("dicom-images-train/9.1/9.1.1/1.2.1.dcm", "dicom-images-train/9.1/9.1.2/1.2.2.dcm",
                 "images/1.2.3.png", "images/1.2.2.png"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def test_images_in_studies_and_in_one_folder(root):
    layout = SIIMPneumothorax()
    assert layout.classes == ("Pneumothorax",)
    tree = root / "dicom-images-train"
    assert layout.find(root) == [
        ("1.2.1", "9.1", tree / "9.1/9.1.1/1.2.1.dcm", (0.0,), None, "", ()),
        ("1.2.2", "9.1", tree / "9.1/9.1.2/1.2.2.dcm", (1.0,), None, "", ("5 2 2 3", "0 1")),
        ("1.2.3", "1.2.3", root / "images/1.2.3.png", (1.0,), None, "", ("0 1",)),
        ("1.2.4", "1.2.4", tree / "1.2.4.dcm", (0.0,), None, "", ()),
    ]


def test_the_table_of_the_second_stage(root):
    (root / "train-rle.csv").rename(root / "stage_2_train.csv")
    (root / "stage_2_train.csv").write_text(TABLE.replace(" Enc", "Enc"))
    assert len(SIIMPneumothorax().find(root)) == 4


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("EncodedPixels", "Pixels", "has no column EncodedPixels; it has ImageId, Pixels"),
        ("1.2.3,0 1", "1.2.3,", "gives 1.2.3 an empty EncodedPixels; where there is no region it is -1"),
        ("1.2.3", "../3", r"has 1 rows whose ImageId is not a file name, first '\.\./3'"),
    ],
)
def test_bad_tables(root, old, new, message):
    (root / "train-rle.csv").write_text(TABLE.replace(old, new))
    with pytest.raises(DataError, match=message):
        SIIMPneumothorax().find(root)


def test_another_root(tmp_path):
    with pytest.raises(DataError, match=r"holds no train-rle.csv, so it is not SIIM-ACR Pneumothorax \(ROOT/"):
        SIIMPneumothorax().find(tmp_path)


def test_a_code_counts_from_the_end_of_the_run_before_and_columns_first():
    mask = decode_runs(["5 2 2 3"], (4, 4))
    assert mask.dtype == np.uint8
    assert mask.tolist() == EXAMPLE
    assert encode_runs(mask) == "5 2 2 3"


def test_several_codes_are_one_region():
    assert decode_runs(["0 2", "1 3", "-1"], (2, 3)).tolist() == [[1, 1, 0], [1, 1, 0]]
    assert decode_runs(["5 1 0 1 2 3", "15 0"], (4, 4)).tolist() == EXAMPLE


def test_no_region():
    assert not decode_runs([], (2, 3)).any()
    assert not decode_runs(["-1"], (2, 3)).any()
    assert encode_runs(np.zeros((2, 3))) == "-1"


def slow_decode(code, shape):
    """Follow a code pixel by pixel."""
    mask, place = np.zeros(shape, np.uint8), 0
    numbers = [int(word) for word in code.split()]
    for gap, run in zip(numbers[::2], numbers[1::2], strict=True):
        place += gap
        for pixel in range(place, place + run):
            mask[pixel % shape[0], pixel // shape[0]] = 1
        place += run
    return mask


def test_encoding_is_undone_by_decoding():
    rng = np.random.default_rng(0)
    for _ in range(200):
        shape = tuple(rng.integers(1, 12, 2).tolist())
        mask = (rng.random(shape) < rng.random()).astype(np.uint8)
        code = encode_runs(mask)
        assert np.array_equal(decode_runs([code], shape), mask)
        assert code == "-1" or np.array_equal(slow_decode(code, shape), mask)
        assert encode_runs(mask * 255) == code


@pytest.mark.parametrize(
    ("code", "detail"),
    [
        ("5 2 2", "of 3 numbers is not a list of pairs"),
        ("", "of 0 numbers is not a list of pairs"),
        ("5 -2", "holds '-2', which is not a whole number"),
        ("5 2.5", "holds '2.5'"),
        ("5 ²", "holds '²'"),
        ("-1 -1", "holds '-1'"),
        ("14 3", "covers 17 pixels of an image of 16"),
        (f"0 {10**30}", "pixels of an image of 16"),
    ],
)
def test_bad_codes(code, detail):
    assert decode_runs(["13 3"], (4, 4)).sum() == 3
    with pytest.raises(ImageError, match=detail) as error:
        decode_runs(["0 1", code], (4, 4))
    assert error.value.kind == "label"
