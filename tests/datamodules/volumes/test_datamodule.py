import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from common.errors import DataError, TooManyFaultsError
from datamodules.configs import SplitConfig
from datamodules.loading import Draw
from datamodules.volumes.datamodule import (
    CropConfig,
    LabelConfig,
    TargetConfig,
    VolumeCacheConfig,
    VolumeDataModule,
    VolumeLoaderConfig,
)


def make(root, **options):
    groups = {
        "crops": CropConfig((32, 32, 32)),
        "labels": LabelConfig(),
        "target": TargetConfig(),
        "cache": VolumeCacheConfig(),
        "split": SplitConfig(),
        "loader": VolumeLoaderConfig(val_draws=2),
    }
    made = {name: replace(group, **options.pop(name, {})) for name, group in groups.items()}
    datamodule = VolumeDataModule(str(root), **{"batch_size": 2, "seed": 1, **options}, **made)
    datamodule.prepare_data()
    datamodule.setup("fit")
    return datamodule


def batches(loader, datamodule):
    return [datamodule.on_before_batch_transfer(batch, 0) for batch in loader]


@pytest.fixture
def copy(brats_root, tmp_path):
    return shutil.copytree(brats_root, tmp_path / "brats")


def test_batches(brats_root):
    datamodule = make(brats_root, loader={"draws": 2})
    batch = batches(datamodule.train_dataloader(), datamodule)[0]
    assert batch["image"].shape == (2, 4, 32, 32, 32)
    assert batch["image"].dtype == torch.float32
    assert batch["modality_mask"].dtype == torch.bool
    assert batch["key"].dtype == torch.int64
    assert len(batch["subject_id"]) == 2
    assert datamodule.input_spec.channels == ("t1c", "t1", "flair", "t2")
    assert datamodule.input_spec.names == ("t1c", "t1n", "t2f", "t2w")
    assert datamodule.input_spec.image_size == (32, 32, 32)


def test_a_missing_modality_is_masked_without_a_row(brats_root):
    datamodule = make(brats_root, split={"fractions": (1.0, 0.0, 0.0)})
    seen = {}
    for batch in batches(datamodule.train_dataloader(), datamodule):
        seen |= dict(zip(batch["subject_id"], batch["modality_mask"].tolist(), strict=True))
        for image, mask in zip(batch["image"], batch["modality_mask"], strict=True):
            assert (image[~mask] == 0).all()
    assert seen["BraTS-GLI-00002-000"] == [True, True, False, True]
    assert datamodule.ledger.faults == []


def test_draws_are_functions_of_what_they_are_for(brats_root):
    one, other = make(brats_root).train_dataloader().dataset, make(brats_root, batch_size=4).train_dataloader().dataset
    a, b = one[Draw(1, 3, 2)], other[Draw(1, 3, 2)]
    assert torch.equal(a["image"], b["image"])
    assert a["key"] == b["key"]
    for draw in (Draw(1, 4, 2), Draw(1, 3, 1)):
        assert a["key"] != one[draw]["key"]
    seeded = make(brats_root, seed=2).train_dataloader().dataset[Draw(1, 3, 2)]
    assert a["key"] != seeded["key"]


def test_validation_is_the_same_in_every_run(brats_root):
    first, second = make(brats_root, seed=1), make(brats_root, seed=2)
    for a, b in zip(batches(first.val_dataloader(), first), batches(second.val_dataloader(), second), strict=True):
        assert torch.equal(a["image"], b["image"])
        assert torch.equal(a["key"], b["key"])


def test_the_control_is_another_patient(brats_root):
    datamodule = make(brats_root)
    for batch in batches(datamodule.val_dataloader(), datamodule):
        assert batch["control_image"].shape == batch["image"].shape
        assert not torch.equal(batch["control_image"], batch["image"])


def test_flips_turn_image_and_label_together(brats_root):
    datamodule = make(brats_root, labels={"needed": True}, crops={"flip_axes": (0, 1, 2), "label_probability": 1.0})
    dataset = datamodule.train_dataloader().dataset
    for draw in range(8):
        sample = dataset[Draw(0, 0, draw)]
        whole_tumour, image = sample["label"][0] > 0, sample["image"]
        assert whole_tumour.any()
        assert (image[:, whole_tumour].amax(0) > 0).all()


def test_labels_become_regions_and_whole_volumes(brats_root):
    datamodule = make(brats_root, labels={"needed": True})
    batch = next(iter(datamodule.val_dataloader()))
    assert batch["label"].shape[1] == 3
    assert batch["image"].shape[2:] == batch["label"].shape[2:]
    whole, core, enhancing = batch["label"][0]
    assert (core <= whole).all()
    assert (enhancing <= core).all()
    assert list(datamodule.input_spec.regions) == ["WT", "TC", "ET"]


def test_a_share_of_the_labels(brats_root):
    kept = [
        {c.case_id for c in make(brats_root, labels={"needed": True, "fraction": f}).splits["train"]}
        for f in (0.2, 0.6, 1.0)
    ]
    assert kept[0] < kept[1] < kept[2]


def test_targets(brats_root, pi_cai_root):
    datamodule = make(brats_root, target={"name": "idh", "file": str(brats_root / "idh.csv")})
    names = [name for batch in datamodule.train_dataloader() for name in batch["subject_id"]]
    assert len(names) == len(set(names))
    central = list(datamodule.central_samples(("train", "val")))
    assert {"image", "target", "patient_id"} <= central[0].keys()
    assert set(torch.cat([batch["target"] for batch in central]).tolist()) == {0, 1}
    assert make(pi_cai_root, target={"name": "csPCa"}, crops={"size": (32, 32, 16)}).targets


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("case_id,grade\nx,1\n", "needs the columns case_id and idh"),
        ("case_id,idh\nBraTS-GLI-00000-000,2\n", "of BraTS-GLI-00000-000 is '2'; it must be 0, 1 or empty"),
        ("case_id,idh\nBraTS-GLI-00000-000,1\n", "known for 1 of 8 cases and has one class"),
        ("case_id,idh\nx,1\n", "8 of 8 cases are not in idh.csv, such as BraTS-GLI-00000-000; it lists x"),
    ],
)
def test_bad_targets(brats_root, tmp_path, content, message):
    others = "".join(f"BraTS-GLI-0000{number}-000,\n" for number in range(1, 8) if "BraTS" in content)
    (tmp_path / "idh.csv").write_text(content + others)
    with pytest.raises(DataError, match=message):
        make(brats_root, target={"name": "idh", "file": str(tmp_path / "idh.csv")})
    with pytest.raises(DataError, match="does not exist"):
        make(brats_root, target={"name": "idh", "file": "nowhere.csv"})


def test_anonymised(copy):
    for path in (copy / "BraTS-GLI-00004-000").glob("*-t1c.nii.gz"):
        path.write_bytes(b"broken")
    datamodule = make(copy, anonymise=True, split={"fractions": (1.0, 0.0, 0.0)})
    names = {name for batch in batches(datamodule.train_dataloader(), datamodule) for name in batch["subject_id"]}
    assert all(name.startswith("subject-") for name in names)
    assert len(names) == 8
    datamodule.ledger.write(copy.parent / "faults.csv")
    text = (copy.parent / "faults.csv").read_text()
    assert "unreadable" in text
    assert "00004" not in text


def test_a_broken_case_is_replaced_by_the_same_one_every_time(copy):
    for path in (copy / "BraTS-GLI-00001-000").glob("*.nii.gz"):
        path.write_bytes(b"broken")
    datamodule = make(copy, split={"fractions": (1.0, 0.0, 0.0)})
    dataset = datamodule.train_dataloader().dataset
    index = [c.case_id for c in dataset.cases].index("BraTS-GLI-00001-000")
    first, second = dataset[Draw(index, 0, 0)], dataset[Draw(index, 0, 0)]
    assert first["subject_id"] == second["subject_id"] != "BraTS-GLI-00001-000"
    assert torch.equal(first["image"], second["image"])
    assert len(first["faults"]) == 4
    assert len({dataset[Draw(index, epoch, 0)]["subject_id"] for epoch in range(20)}) > 2
    batches(datamodule.train_dataloader(), datamodule)
    assert len(datamodule.ledger.faults) == 4
    assert datamodule.ledger.num_faulty == 1


def test_evaluation_leaves_broken_cases_out(copy):
    datamodule = make(copy, split={"fractions": (0.5, 0.5, 0.0)})
    broken = datamodule.splits["val"][0]
    for path in broken.images.values():
        path.write_bytes(b"broken")
    again = make(copy, split={"fractions": (0.5, 0.5, 0.0)})
    names = [name for batch in batches(again.val_dataloader(), again) for name in batch["subject_id"]]
    assert broken.case_id not in names
    assert set(names) == {c.case_id for c in datamodule.splits["val"][1:]}


def test_too_many_broken_cases_stop_the_run(copy):
    for folder in sorted(copy.iterdir())[:6]:
        for path in folder.glob("*-t1c.nii.gz") if folder.is_dir() else []:
            path.write_bytes(b"broken")
    datamodule = make(copy)
    with pytest.raises(
        TooManyFaultsError, match=r"6 of 8 samples are faulty, more than the 5 .* By kind: unreadable 6. First:"
    ):
        datamodule.train_dataloader()


def test_nothing_usable(copy):
    for path in copy.rglob("*.nii.gz"):
        path.write_bytes(b"broken")
    with pytest.raises(DataError, match=r"None of the 8 cases .* can be used. By kind: unreadable"):
        make(copy)


def test_without_a_cache_files_may_vanish_during_the_run(copy):
    datamodule = make(copy, cache={"format": "none"}, split={"fractions": (1.0, 0.0, 0.0)})
    loader = datamodule.train_dataloader()
    batches(loader, datamodule)
    gone = [next(iter(case.images.values())) for case in datamodule.splits["train"][:3]]
    for path in gone:
        path.unlink()
    loader.sampler.set_epoch(1)
    assert len(batches(loader, datamodule)) == 4
    assert sorted((f.path, f.kind) for f in datamodule.ledger.faults) == sorted((str(p), "missing") for p in gone)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_change_nothing(brats_root, workers):
    datamodule = make(brats_root, num_workers=workers)
    keys = [key for batch in batches(datamodule.train_dataloader(), datamodule) for key in batch["key"].tolist()]
    reference = make(brats_root)
    assert keys == [k for b in batches(reference.train_dataloader(), reference) for k in b["key"].tolist()]


def test_reference_samples_are_never_mirrored(brats_root):
    datamodule = make(brats_root)
    samples = list(datamodule.reference_samples(20))
    assert sum(len(batch["image"]) for batch in samples) >= 20
    assert samples[0]["image"].shape[1:] == (4, 32, 32, 32)
    again = list(datamodule.reference_samples(20))
    assert torch.equal(samples[0]["image"], again[0]["image"])


def test_labels_that_do_not_exist_or_mean_nothing(brats_root, tmp_path):
    folder = tmp_path / "generic" / "a"
    folder.mkdir(parents=True)
    case = brats_root / "BraTS-GLI-00000-000"
    shutil.copy(case / f"{case.name}-t1c.nii.gz", folder / "t1c.nii.gz")
    with pytest.raises(DataError, match="does not say what its labels mean"):
        make(tmp_path / "generic", labels={"needed": True})
    with pytest.raises(DataError, match=r"No case .* has a label file"):
        make(tmp_path / "generic", labels={"needed": True, "regions": {"lesion": [1]}})
    shutil.copy(case / f"{case.name}-seg.nii.gz", folder / "seg.nii.gz")
    assert list(
        make(tmp_path / "generic", labels={"needed": True, "regions": {"lesion": [1, 3]}}).input_spec.regions
    ) == ["lesion"]


def test_bad_numbers(brats_root):
    with pytest.raises(ValueError, match="batch_size"):
        VolumeDataModule(str(brats_root), batch_size=0)


def test_batches_are_mostly_head(brats_root):
    datamodule = make(brats_root, crops={"overhang": 0.0})
    images = torch.cat([b["image"] for b in batches(datamodule.train_dataloader(), datamodule)])
    assert 0.2 < float((images != 0).any(1).float().mean()) < 1
    assert np.isfinite(images.numpy()).all()


def test_a_case_without_a_label_is_left_out_and_no_fault(pi_cai_root):
    datamodule = make(
        pi_cai_root, labels={"needed": True}, crops={"size": (32, 32, 16)}, split={"fractions": (1.0, 0.0, 0.0)}
    )
    assert len(datamodule.splits["train"]) == 7
    seen = {name for batch in datamodule.train_dataloader() for name in batch["subject_id"]}
    assert seen <= {case.case_id for case in datamodule.splits["train"]}
    assert datamodule.ledger.faults == []


def test_a_test_without_cases_is_refused(brats_root, capsys):
    datamodule = make(brats_root, split={"fractions": (1.0, 0.0, 0.0)})
    assert "the val split is empty" in capsys.readouterr().out
    with pytest.raises(DataError, match="no case to test on"):
        datamodule.test_dataloader()
