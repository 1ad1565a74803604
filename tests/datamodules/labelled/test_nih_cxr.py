import pytest

from common.errors import DataError
from datamodules.labelled.nih_cxr import NIHChestXray14

TABLE = """Image Index,Finding Labels,Follow-up #,Patient ID,OriginalImage[Width,Height],
00000001_000.png,Cardiomegaly|Emphysema,0,1,2682,2749,
00000001_001.png,No Finding,1,1,2682,2749,
00000002_000.png,Hernia|Pleural_Thickening,0,2,2682,2749,
00000003_000.png,Atelectasis,0,3,2682,2749,
"""


@pytest.fixture
def root(tmp_path):
    (tmp_path / "Data_Entry_2017.csv").write_text(TABLE)
    for name in ("images/00000001_000.png", "images_001/images/00000001_001.png", "images_012/images/00000002_000.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    return tmp_path


def test_images_of_all_folders(root):
    images = NIHChestXray14().find(root)
    assert [str(image.image.relative_to(root)) for image in images] == [
        "images/00000001_000.png",
        "images_001/images/00000001_001.png",
        "images_012/images/00000002_000.png",
        "images/00000003_000.png",
    ]
    assert [image.case_id for image in images] == [image.image.name for image in images]
    assert [image.patient_id for image in images] == ["1", "1", "2", "3"]
    assert {image.split for image in images} == {None}


def test_findings(root):
    layout = NIHChestXray14()
    classes = [{name for name, target in zip(layout.classes, image.targets, strict=True) if target}
               for image in layout.find(root)]  # fmt: skip
    assert classes == [{"Cardiomegaly", "Emphysema"}, set(), {"Hernia", "Pleural_Thickening"}, {"Atelectasis"}]
    assert (len(layout.classes), layout.classes[0], layout.classes[12]) == (14, "Atelectasis", "Pleural_Thickening")


def test_the_newer_table_is_taken(root):
    (root / "Data_Entry_2017_v2020.csv").write_text("Image Index,Finding Labels,Patient ID\nx.png,Mass,9\n")
    assert [image.case_id for image in NIHChestXray14().find(root)] == ["x.png"]


def test_official_lists(root):
    (root / "train_val_list.txt").write_text("00000001_000.png\n00000001_001.png")
    with pytest.raises(DataError, match=r"has train_val_list.txt without test_list.txt; fetch it too"):
        NIHChestXray14().find(root)
    (root / "test_list.txt").write_text("00000002_000.png\n")
    assert [image.split for image in NIHChestXray14().find(root)] == ["train", "train", "test", None]
    (root / "test_list.txt").write_text("00000002_000.png\n00000001_001.png")
    with pytest.raises(
        DataError, match=r"1 images are in both train_val_list.txt and test_list.txt .*00000001_001.png"
    ):
        NIHChestXray14().find(root)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("Hernia|", "Cyst|", "gives 00000002_000.png the finding 'Cyst'; known are No Finding and Atelectasis, Card"),
        ("Finding Labels", "Findings", "has no column Finding Labels; it has Image Index, Findings, Follow-up #"),
        ("00000003_000.png", "../3.png", r"whose Image Index is not a file name, first '\.\./3.png'"),
    ],
)
def test_bad_tables(root, old, new, message):
    (root / "Data_Entry_2017.csv").write_text(TABLE.replace(old, new))
    with pytest.raises(DataError, match=message):
        NIHChestXray14().find(root)


def test_another_root(tmp_path):
    with pytest.raises(DataError, match=r"holds no Data_Entry_2017_v2020.csv, so it is not NIH ChestX-ray14 \(ROOT/"):
        NIHChestXray14().find(tmp_path)
