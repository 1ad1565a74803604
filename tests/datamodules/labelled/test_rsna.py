import pytest

from common.errors import DataError
from datamodules.labelled.rsna import RSNAPneumonia

TABLE = """patientId,x,y,width,height,Target
0004cfab-14fd,,,,,0
00436515-870c,264.0,152.0,213.0,379.0,1
00436515-870c,562.0,152.0,256.0,453.0,1
00436515-870c,,,,,0
"""


def write(root, text=TABLE):
    (root / "stage_2_train_labels.csv").write_text(text)
    return root


def test_an_image_has_pneumonia_if_any_row_says_so(tmp_path):
    layout = RSNAPneumonia()
    assert layout.classes == ("Pneumonia",)
    images = tmp_path / "stage_2_train_images"
    assert layout.find(write(tmp_path)) == [
        ("0004cfab-14fd", "0004cfab-14fd", images / "0004cfab-14fd.dcm", (0.0,), None, "", ()),
        ("00436515-870c", "00436515-870c", images / "00436515-870c.dcm", (1.0,), None, "", ()),
    ]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("Target", "Label", "has no column Target; it has patientId, x, y, width, height, Label"),
        (",,0", ",,11", "gives 0004cfab-14fd the Target '11'; known are '0', '1'"),
        ("0004cfab-14fd", "a/b", "has 1 rows whose patientId is not a file name, first 'a/b'"),
    ],
)
def test_bad_tables(tmp_path, old, new, message):
    with pytest.raises(DataError, match=message):
        RSNAPneumonia().find(write(tmp_path, TABLE.replace(old, new)))


def test_another_root(tmp_path):
    with pytest.raises(DataError, match=r"holds no stage_2_train_labels.csv, so it is not RSNA Pneumonia \(ROOT/"):
        RSNAPneumonia().find(tmp_path)
