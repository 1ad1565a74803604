import csv
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from common import commands
from common.errors import DataError
from common.faults import SampleFaultError
from datamodules.configs import CacheConfig, LoaderConfig
from datamodules.images.cache import SourceImages
from datamodules.labelled.classification import (
    FoldConfig,
    LabelledImageConfig,
    LabelledImageDataModule,
    ShuffleConfig,
    shuffled_targets,
    strata_of,
)
from datamodules.labelled.layout import UNKNOWN, LabelledImage, LabelledTable
from datamodules.loading import Draw


@pytest.fixture
def root(tmp_path):
    """Sixty images of thirty patients; a third of the patients have ``one``, every tenth has ``rare``."""
    folder = tmp_path / "archive"
    folder.mkdir()
    lines = ["image,subject,one,rare"]
    for number in range(60):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 50)).astype(np.uint8)
        pixels[:20] //= 2
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
        patient = number // 2
        lines.append(f"{number:02}.png,p{patient:02},{int(patient % 3 == 0)},{int(patient % 10 == 0)}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return folder


def module(root, **options):
    groups = {
        "image": LabelledImageConfig((32, 32)),
        "cache": CacheConfig(side=40),
        "split": FoldConfig((0.7, 0.1, 0.2)),
        "shuffle": ShuffleConfig(),
        "loader": LoaderConfig(),
    }
    made = {name: replace(group, **options.pop(name, {})) for name, group in groups.items()}
    options = {"batch_size": 8, **options}
    return LabelledImageDataModule(str(root), LabelledTable(["one", "rare"]), **options, **made)


def ready(root, **options):
    datamodule = module(root, **options)
    datamodule.prepare_data()
    datamodule.setup("fit")
    return datamodule


def patients(images):
    return {item.patient_id for item in images}


def test_a_batch(root):
    datamodule = ready(root)
    batch = next(iter(datamodule.train_dataloader()))
    assert batch["image"].shape == (8, 1, 32, 32)
    assert batch["image"].dtype == torch.float32
    assert batch["target"].shape == batch["target_mask"].shape == (8, 2)
    assert batch["target_mask"].all()
    spec = datamodule.input_spec
    assert spec.classes == ("one", "rare")
    assert len(spec.channels) == 3


def test_splits_are_by_patient_and_stratified(root):
    datamodule = module(root)
    datamodule.index()
    parts = [patients(part) for part in datamodule.splits.values()]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 30
    shares = [np.mean([item.targets[0] for item in part]) for part in datamodule.splits.values()]
    assert max(shares) - min(shares) < 0.2


def test_fractions_are_nested_and_stratified(root):
    kept = {}
    for fraction in (0.2, 0.5, 1.0):
        datamodule = module(root, label_fraction=fraction)
        datamodule.index()
        kept[fraction] = patients(datamodule.splits["train"])
        share = np.mean([item.targets[0] for item in datamodule.splits["train"]])
        assert 0.2 <= share <= 0.5
    assert kept[0.2] < kept[0.5] < kept[1.0]
    assert len(kept[0.2]) == 5


def test_folds_share_no_patient_and_cover_all(root):
    tested = Counter()
    for fold in range(3):
        datamodule = module(root, split={"fold": fold, "num_folds": 3})
        datamodule.index()
        parts = {name: patients(part) for name, part in datamodule.splits.items()}
        assert not parts["train"] & parts["test"]
        assert not parts["val"] & (parts["test"] | parts["train"])
        assert parts["val"]
        tested.update(item.case_id for item in datamodule.splits["test"])
    assert len(tested) == 60
    assert set(tested.values()) == {1}


def test_patients_with_the_same_note_are_in_one_fold(root, monkeypatch):
    found = LabelledTable(["one"]).find(root)
    noted = [item._replace(group="a note" if item.patient_id in ("p01", "p02", "p04") else "") for item in found]
    monkeypatch.setattr(LabelledTable, "find", lambda self, root: noted)
    for fold in range(5):
        datamodule = LabelledImageDataModule(
            str(root), LabelledTable(["one"]), split=FoldConfig((0.7, 0.1, 0.2), fold=fold)
        )
        datamodule.index()
        together = [len(patients(part) & {"p01", "p02", "p04"}) for part in datamodule.splits.values()]
        assert sorted(together) == [0, 0, 3]


def test_shuffled_targets_belong_to_patients(root):
    images = LabelledTable(["one", "rare"]).find(root)
    shuffled = shuffled_targets(images, 1)
    assert [item.image for item in shuffled] == [item.image for item in images]
    assert Counter(item.targets for item in shuffled) == Counter(item.targets for item in images)
    assert all(len({item.targets for item in shuffled if item.patient_id == name}) == 1 for name in patients(images))
    assert shuffled != images
    assert shuffled == shuffled_targets(images, 1)


def test_shuffling_can_leave_what_is_tested_true(root):
    true, shuffled = module(root), module(root, shuffle={"seed": 1, "tested": False})
    true.index()
    shuffled.index()
    assert shuffled.splits["test"] == true.splits["test"]
    for name in ("train", "val"):
        assert [item.image for item in shuffled.splits[name]] == [item.image for item in true.splits[name]]
    assert shuffled.splits["train"] != true.splits["train"]


def test_the_stratum_is_the_rarest_class():
    def item(name, *targets):
        return LabelledImage(name, name, None, targets)

    images = [item("a", 1, 0), item("b", 1, 1), item("c", 0, 0), item("d", 1, UNKNOWN)]
    assert strata_of(images) == {"a": "0", "b": "1", "c": "none", "d": "0"}


def test_unknown_targets_are_masked(root):
    text = (root / "labels.csv").read_text().replace("00.png,p00,1,1", "00.png,p00,,1")
    (root / "labels.csv").write_text(text)
    datamodule = ready(root, label_fraction=1.0, split={"fractions": (1.0, 0.0, 0.0)})
    batches = list(datamodule.central_samples(("train",)))
    known = {name: row for b in batches for name, row in zip(b["subject_id"], b["target_mask"].tolist(), strict=True)}
    assert known["00.png"] == [False, True]
    assert known["01.png"] == [True, True]
    assert all(not batch["target"].isnan().any() for batch in batches)


def test_training_crops_change_with_the_epoch_and_evaluation_does_not(root):
    datamodule = ready(root)
    dataset = datamodule._dataset(datamodule.splits["train"], train=True)
    first, second, again = (dataset[Draw(0, epoch, 0)]["image"] for epoch in (0, 1, 0))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    whole = datamodule._dataset(datamodule.splits["train"], train=False)
    assert torch.equal(whole[Draw(0, 0, 0)]["image"], whole[Draw(0, 5, 0)]["image"])


def test_without_a_cache_evaluation_sees_the_same(root):
    cached, direct = ready(root), ready(root, cache={"format": "none"})
    assert isinstance(direct.store, SourceImages)
    pairs = zip(cached.val_dataloader(), direct.val_dataloader(), strict=True)
    assert all((one["image"] - other["image"]).abs().max() < 0.02 for one, other in pairs)


def test_a_broken_image_is_a_row_and_is_not_evaluated(root):
    for name in ("00.png", "31.png"):
        (root / name).write_bytes(b"broken")
    datamodule = ready(root, loader={"max_fault_fraction": 0.1})
    assert datamodule.ledger.num_faulty == 2
    seen = [name for batch in datamodule.central_samples() for name in batch["subject_id"]]
    assert len(seen) == 58


def test_a_fault_met_while_reading_names_its_case(root):
    (root / "00.png").write_bytes(b"broken")
    dataset = module(root, cache={"format": "none"}, split={"fractions": (1.0, 0.0, 0.0)})
    dataset.index()
    images = dataset._dataset(dataset.splits["train"], train=False)
    with pytest.raises(SampleFaultError) as error:
        images.read(Draw(0, 0, 0))
    assert error.value.faults[0].sample == "00.png"


def test_a_fold_and_a_split_file_exclude_each_other(root):
    with pytest.raises(ValueError, match="set one of them to null"):
        module(root, split={"fold": 0, "file": "split.csv"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("subject", "person"), "has no column subject; it has image, person"),
        (lambda text: text.replace("p00,1", "p00,2"), "gives 00.png the one '2'"),
        (lambda text: text.replace("00.png", "../00.png"), "does not lie under"),
        (lambda text: text + "00.png,p09,1,0\n", "00.png is there twice"),
    ],
)
def test_bad_tables(root, change, message):
    (root / "labels.csv").write_text(change((root / "labels.csv").read_text()))
    with pytest.raises(DataError, match=message):
        module(root).index()


def test_another_archive_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"no labels.csv, so it is not a labelled table \(ROOT/.*; it holds notes"):
        module(tmp_path).index()
    with pytest.raises(DataError, match="is not a folder"):
        module(tmp_path / "gone").index()


@pytest.fixture
def config(root, tmp_path):
    path = tmp_path / "task.yaml"
    path.write_text(f"""
data:
  class_path: datamodules.labelled.classification.LabelledImageDataModule
  init_args:
    root: {root}
    labels: {{class_path: datamodules.labelled.layout.LabelledTable, init_args: {{classes: [one, rare]}}}}
    batch_size: 8
""")
    return ["--config", str(path)]


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_doctor_counts_classes_and_finds_copies(root, config, capsys):
    commands.main(["doctor", *config, "--deep"])
    said = capsys.readouterr().out
    assert "60 images of 30 patients" in said
    assert "one: positive" in said
    (root / "59.png").write_bytes((root / "00.png").read_bytes())
    with pytest.raises(SystemExit):
        commands.main(["doctor", *config, "--deep"])
    assert "files occur in several patients" in capsys.readouterr().err


def test_a_split_file_serves_other_configurations(config, tmp_path):
    fold = ["--set", "split.fold=1", "--set", "split.num_folds=3"]
    commands.main(["split", *config, *fold, "--by", "patient", "--out", str(tmp_path / "fold.csv")])
    rows = rows_of(tmp_path / "fold.csv")
    assert list(rows[0]) == ["patient_id", "split"]
    assert len(rows) == 30


def test_published_lists_that_overlap_are_refused_or_repaired(config, tmp_path, capsys):
    lists = {"train": ["00.png 1", "01", "02", "04", "06"], "val": ["08", "10"], "test": ["03 0", "06"]}
    for name, lines in lists.items():
        (tmp_path / name).write_text("\n".join(lines))
    given = ["split", *config, "--out", str(tmp_path / "s.csv"), "--lists", *(str(tmp_path / name) for name in lists)]
    with pytest.raises(SystemExit):
        commands.main(given)
    assert "Patients are in several of the lists (2 of train" in capsys.readouterr().err
    commands.main([*given, "--repair"])
    assert "2 of train left out" in capsys.readouterr().out
    found = {row["case_id"]: row["split"] for row in rows_of(tmp_path / "s.csv")}
    assert found == {
        "00.png": "train", "01.png": "train", "04.png": "train", "08.png": "val", "10.png": "val",
        "03.png": "test", "06.png": "test",
    }  # fmt: skip
    (tmp_path / "val").write_text("zz\n")
    with pytest.raises(SystemExit):
        commands.main(given)
    assert "names none of the 60 cases" in capsys.readouterr().err
