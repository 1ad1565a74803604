from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.errors import DataError
from common.faults import SampleFaultError
from common.types import InputSpec
from datamodules.labelled.targets import RegionImageDataModule, TargetImageDataModule
from datamodules.registry import FileRef, Record
from datamodules.targets import TargetColumns
from datamodules.tree import Tree


def picture(path, value=100, size=(40, 36)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full(size, value, np.uint8)
    if value > 50:  # no mask: a picture of one colour is broken
        pixels[:20] = 0
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folders(tmp_path):
    """Class folders: forty pictures of four grades."""
    for index in range(40):
        picture(tmp_path / "own" / f"grade {(1, 2, 10, 3)[index % 4]}" / f"{index:03d}.png")
    return tmp_path / "own"


def test_class_folders_need_no_name_and_splits_hold_every_class(folders):
    data = TargetImageDataModule(str(folders), subject="file", batch_size=8)
    data.index()
    assert data.input_spec.classes == ("grade 1", "grade 2", "grade 3", "grade 10")
    assert data.input_spec.target == {"kind": "classes"}
    for part in ("train", "val", "test"):
        assert np.sum([item.targets for item in data.splits[part]], 0).min() >= 1
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["target"].sum(1).tolist() == [1] * len(batch["target"])
    assert batch["target_mask"].all()


def test_shares_of_the_labels_are_nested_and_hold_every_class(folders):
    names = []
    for share in (1.0, 0.5, 0.25):
        data = TargetImageDataModule(str(folders), subject="file", label_fraction=share)
        data.index()
        names.append({item.case_id for item in data.splits["train"]})
        assert np.sum([item.targets for item in data.splits["train"]], 0).min() >= 1
    assert names[2] < names[1] < names[0]


def test_a_class_with_few_patients_stops_training_but_not_the_look_at_it(folders):
    data = TargetImageDataModule(str(folders), subject="file", target=TargetColumns(fewest=9))
    data.index()
    assert any("fewer than 9 training patients" in reason for reason in data.examine(deep=False, workers=1))
    with pytest.raises(DataError, match="Fewer than 9"):
        data.setup("fit")
    data.setup("test")


def test_a_table_of_labels_is_the_list_of_images(folders, tmp_path):
    rows = [f"{path.relative_to(folders)},p{index // 2},{index % 2}.5" for index, path in
            enumerate(sorted(folders.rglob("*.png")))]  # fmt: skip
    (tmp_path / "labels.csv").write_text("\n".join(["image,subject,size", *rows]))
    target = TargetColumns("size", str(tmp_path / "labels.csv"), "regression")
    data = TargetImageDataModule(str(folders), target=target)
    data.index()
    assert len({item.patient_id for item in data.images}) == 20
    assert sorted({item.targets for item in data.images}) == [(0.5,), (1.5,)]


def test_all_is_predicted_without_labels(folders):
    data = TargetImageDataModule(str(folders), target=TargetColumns("dx", "gone.csv"))
    data.predict_all(InputSpec(("red", "green", "blue"), (16, 16)))
    data.index()
    assert {name: len(items) for name, items in data.splits.items()} == {"train": 0, "val": 0, "test": 40}
    assert data.input_spec.classes == ()


def test_masks_have_values_that_the_description_or_a_person_names(tmp_path):
    for index in range(10):
        picture(tmp_path / f"own/{index}.png")
    rows = "".join(f"{i}.png,p{i},m{i}.png\n" for i in range(10))
    (tmp_path / "own/manifest.csv").write_text("image,subject,mask\n" + rows)
    for index in range(10):
        picture(tmp_path / f"own/m{index}.png", 9 if index else 3)
    with pytest.raises(DataError, match="does not say what values of its masks mean"):
        RegionImageDataModule(str(tmp_path / "own")).index()
    data = RegionImageDataModule(str(tmp_path / "own"), regions={"both": [7, 9], "core": [9]})
    data.index()
    items = {item.case_id: item for item in data.images}
    assert data.masks_of(items["1.png"]).sum((1, 2)).tolist() == [1440, 1440]
    with pytest.raises(SampleFaultError, match="holds 3, which is of no region"):
        data.masks_of(items["0.png"])
    assert data.input_spec.regions == {"both": (7, 9), "core": (9,)}


def test_an_archive_file_says_what_is_learned(folders):
    merge = {"late": ["grade 3", "grade 10"], "early": ["grade 1", "grade 2"]}
    rule = {"column": "class", "classes": ["late", "early"], "merge": merge}
    data = TargetImageDataModule(str(folders), archive={"subject": "file", "targets": {"stage": rule}})
    data.index()
    assert data.input_spec.classes == ("late", "early")
    assert len(data.images) == 40


def test_an_image_with_several_masks_is_refused(tmp_path):
    refs = {name: FileRef(Path(f"{name}.png")) for name in "ab"}
    record = Record("1", "1", images=((Path("1.png"), ""),), masks=refs)
    with pytest.raises(DataError, match="1 images and 2 masks"):
        RegionImageDataModule(str(tmp_path)).items(record, Tree(tmp_path))
