import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from common.errors import DataError
from common.maskers.random import RandomMasker
from common.randomness import KeyedGenerator, numpy_generator
from datamodules.configs import CacheConfig, LoaderConfig, SplitConfig
from datamodules.images.crops import center_box, cut_box, random_box
from datamodules.loading import Draw
from datamodules.reports.datamodule import (
    ImageTextDataModule,
    ReportImageConfig,
    ReportTextConfig,
    SampleConfig,
    swap_sides,
)
from datamodules.synthetic.labelled import write_covid_cxr
from datamodules.synthetic.reports import write_mimic_cxr

NOTES = ["The left lung is clear.", "A mass lies at the right base.", "No effusion. Heart size is normal."]


@pytest.fixture(scope="session")
def mimic_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("mimic_cxr")
    write_mimic_cxr(root, 12, seed=0, size=(72, 80))
    return root


@pytest.fixture
def manifest_root(tmp_path):
    """Twelve images of six patients; one file is truncated, one is 1 x 1, one has no text."""
    root, rng = tmp_path / "archive", np.random.default_rng(0)
    root.mkdir()
    rows = []
    for index in range(12):
        name = f"{index:02d}.jpg"
        pixels = rng.integers(0, 255, (1, 1) if index == 3 else (48, 64), dtype=np.uint8)
        Image.fromarray(pixels).save(root / name)
        text = "" if index == 5 else f"{NOTES[index % 3]} Case number {index}."
        rows.append({"image": name, "text": text, "subject": f"p{index // 2}"})
    (root / "02.jpg").write_bytes((root / "02.jpg").read_bytes()[:300])
    pd.DataFrame(rows).to_csv(root / "manifest.csv", index=False)
    return root


def module(root, **settings):
    groups = {
        "image": ReportImageConfig((32, 32)),
        "cache": CacheConfig(side=48),
        "text": ReportTextConfig(24, vocab_size=200),
        "samples": SampleConfig(),
        "split": SplitConfig(),
        "loader": LoaderConfig(),
    }
    made = {name: replace(group, **settings.pop(name, {})) for name, group in groups.items()}
    built = ImageTextDataModule(str(root), **{"batch_size": 2, **settings}, **made)
    built.prepare_data()
    built.setup("fit")
    return built


def test_a_batch_holds_what_it_says(mimic_root):
    data = module(mimic_root)
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (2, 1, 32, 32)
    assert batch["image"].dtype == torch.float32
    hidden = batch["labels"] != -100
    assert (batch["input_ids"][hidden] == data.tokenizer.mask_id).all()
    assert (batch["attention_mask"][hidden] == 1).all()
    assert (batch["input_ids"][:, 0] == data.tokenizer.cls_id).all()
    assert torch.equal(batch["hidden_ids"], batch["labels"][hidden])
    assert torch.equal(batch["hidden_index"], hidden.flatten().nonzero()[:, 0])
    assert batch["input_ids"].shape[1] == int(batch["attention_mask"].sum(1).max()) <= 24


def test_texts_padded_in_full(mimic_root):
    short, full = (next(iter(module(mimic_root, text={"pad_to_length": pad, "length": 400}).val_dataloader()))
                   for pad in (False, True))  # fmt: skip
    width = short["input_ids"].shape[1]
    assert width < full["input_ids"].shape[1] == full["attention_mask"].shape[1] == full["labels"].shape[1] == 400
    assert torch.equal(full["input_ids"][:, :width], short["input_ids"])
    assert not full["attention_mask"][:, width:].any()
    assert (full["labels"][:, width:] == -100).all()
    assert torch.equal(full["hidden_ids"], short["hidden_ids"])
    assert torch.equal(full["labels"].flatten()[full["hidden_index"]], full["hidden_ids"])


def test_redactions_stay_where_they_are_wanted(mimic_root):
    texts = [
        " ".join(module(mimic_root, text={"part": "full", "keep_redactions": keep}).training_texts())
        for keep in (False, True)
    ]
    assert "_" not in texts[0]
    assert texts[1].count("___") > 5
    assert " ".join(texts[1].replace("___", " ").split()) == texts[0]


def test_draws_are_functions_of_seed_epoch_and_subject(mimic_root):
    data = module(mimic_root)
    dataset = data.train_dataloader().dataset
    first, again, later = (dataset[Draw(1, epoch, 0)] for epoch in (0, 0, 1))
    assert torch.equal(first["image"], again["image"])
    assert torch.equal(first["input_ids"], again["input_ids"])
    assert not torch.equal(first["image"], later["image"])
    assert first["key"] != later["key"]
    other_run = module(mimic_root, seed=7).val_dataloader().dataset[Draw(0, 0, 0)]
    fixed = data.val_dataloader().dataset[Draw(0, 0, 0)]
    assert torch.equal(other_run["image"], fixed["image"])
    assert torch.equal(other_run["labels"], fixed["labels"])


@pytest.mark.parametrize("scheme", ["independent", "bert"])
def test_hidden_words_say_nothing_about_hidden_patches(mimic_root, scheme):
    """Both hang on the sample's key; with the same numbers, word i would be hidden where patch i is shown."""
    dataset = module(mimic_root, text={"mask_scheme": scheme}).train_dataloader().dataset
    items = [dataset[Draw(0, epoch, 0)] for epoch in range(400)]
    words = torch.stack([item["labels"] != -100 for item in items])[:, 1:].double()
    keys = torch.stack([item["key"] for item in items])
    patches = RandomMasker(0.75)(400, words.shape[1] + 1, generator=KeyedGenerator(keys)).mask.double()
    count = words.shape[1]
    together = torch.corrcoef(torch.cat([words, patches], dim=1).T)[:count, count:]
    assert together.abs().max() < 0.25


def test_the_control_is_another_patient(mimic_root):
    batch = next(iter(module(mimic_root).val_dataloader()))
    assert batch["control_image"].shape == batch["image"].shape
    assert not torch.equal(batch["control_image"], batch["image"])


def test_pairs_and_views(mimic_root):
    by_image, by_study = (module(mimic_root, samples={"pair": pair}) for pair in ("image", "study"))
    count = {name: sum(map(len, data.splits.values())) for name, data in (("image", by_image), ("study", by_study))}
    assert count["study"] == 12 < count["image"]
    views = {
        view
        for part in module(mimic_root, samples={"views": ["PA"]}).splits.values()
        for s in part
        for view in s.study.views
    }
    assert "PA" in views
    with pytest.raises(DataError, match="views OBLIQUE"):
        module(mimic_root, samples={"views": ["OBLIQUE"]})


def test_broken_images_leave_their_text_and_a_row(manifest_root):
    data = module(manifest_root, split={"fractions": (1.0, 0.0, 0.0)}, loader={"max_fault_fraction": 1.0})
    faults = {fault.path.rsplit("/", 1)[-1]: fault.kind for fault in data.ledger.faults}
    assert faults == {"02.jpg": "unreadable", "03.jpg": "shape"}
    dataset = data.train_dataloader().dataset
    items = {dataset.subject(index): dataset[Draw(index, 0, 0)] for index in range(len(dataset))}
    assert items["02.jpg"]["modality_mask"].tolist() == [False, True]
    assert (items["02.jpg"]["image"] == 0).all()
    assert items["05.jpg"]["modality_mask"].tolist() == [True, False]
    assert items["05.jpg"]["faults"] == []
    assert items["05.jpg"]["input_ids"].tolist() == [data.tokenizer.cls_id]
    assert (items["05.jpg"]["labels"] == -100).all()


def test_neither_image_nor_text_is_replaced(manifest_root):
    table = pd.read_csv(manifest_root / "manifest.csv", keep_default_na=False)
    table.loc[2, "text"] = ""
    table.to_csv(manifest_root / "manifest.csv", index=False)
    dataset = module(manifest_root, split={"fractions": (1.0, 0.0, 0.0)}).train_dataloader().dataset
    item = dataset[Draw(next(i for i in range(12) if dataset.subject(i) == "02.jpg"), 0, 0)]
    assert item["subject_id"] != "02.jpg"
    assert [fault.kind for fault in item["faults"]] == ["unreadable"]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_other_tables_and_other_names(manifest_root, suffix):
    table = pd.read_csv(manifest_root / "manifest.csv", keep_default_na=False)
    table = table.rename(columns={"image": "file", "text": "note ", "subject": "person"})
    (manifest_root / "manifest.csv").unlink()
    path = manifest_root / f"manifest{suffix}"
    table.to_parquet(path) if suffix == ".parquet" else path.write_text(table.to_json(orient="records", lines=True))
    with pytest.raises(DataError, match=r"no column image, subject; it has file, note, person.*data\.columns"):
        module(manifest_root)
    data = module(manifest_root, columns={"image": "file", "text": "note", "subject": "person"})
    assert len(data.training_texts()) > 5


COVID_COLUMNS = {"image": "filename", "folder": "folder", "text": "clinical_notes", "subject": "patientid",
                 "view": "view"}  # fmt: skip


def test_a_table_of_another_name_by_its_columns(tmp_path):
    write_covid_cxr(tmp_path / "covid", 8, seed=0, size=(48, 64))
    data = module(tmp_path / "covid", table="metadata.csv", columns=COVID_COLUMNS)
    known = module(tmp_path / "covid")
    assert (data.index().layout.name, known.index().layout.name) == ("manifest", "covid_cxr")
    named, recognised = ([s.study._replace(attributes={}) for s in each.samples] for each in (data, known))
    assert named[:-1] == recognised
    assert named[-1].case_id == "volumes/ct_001.nii.gz"  # the layout of the collection keeps radiographs alone


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"table": "metadata.csv"}, r"has no column image, subject; it has .*patientid"),
        ({"table": "notes.csv"}, r"no table notes\.csv \(data\.table\) under .*; it holds images/, metadata\.csv"),
        ({"columns": COVID_COLUMNS}, r"not of the layout manifest \(ROOT/manifest.*data\.table"),
        ({"table": "metadata.csv", "columns": {**COVID_COLUMNS, "text": "note"}}, r"no column note; it has"),
        ({"table": "metadata.csv", "columns": {**COVID_COLUMNS, "note": "text"}}, "the role note; known are folder, "),
        ({"layout": "covid_cxr", "columns": COVID_COLUMNS}, "not the layout covid_cxr"),
        ({"layout": "covid_cxr", "table": "metadata.csv"}, "not the layout covid_cxr"),
    ],
)
def test_tables_that_are_not_what_is_said(tmp_path, settings, message):
    write_covid_cxr(tmp_path / "covid", 2, seed=0, size=(48, 64))
    with pytest.raises(ValueError, match=message):
        module(tmp_path / "covid", **settings)


def test_images_outside_the_root_are_refused(manifest_root):
    table = pd.read_csv(manifest_root / "manifest.csv", keep_default_na=False)
    table.loc[0, "image"] = "../secret.png"
    table.to_csv(manifest_root / "manifest.csv", index=False)
    with pytest.raises(DataError, match="does not lie under"):
        module(manifest_root)


def test_a_patient_in_two_splits_is_refused(manifest_root):
    table = pd.read_csv(manifest_root / "manifest.csv", keep_default_na=False)
    table["split"] = ["train", "val"] * 6
    table.to_csv(manifest_root / "manifest.csv", index=False)
    with pytest.raises(DataError, match="several splits"):
        module(manifest_root)


def with_rows(root, *rows):
    """Add rows to a manifest."""
    table = pd.read_csv(root / "manifest.csv", keep_default_na=False, dtype=str)
    pd.concat([table, pd.DataFrame(rows)]).fillna("").to_csv(root / "manifest.csv", index=False)


def test_a_study_in_two_splits_is_refused(manifest_root):
    table = pd.read_csv(manifest_root / "manifest.csv", keep_default_na=False)
    table.assign(split="train").to_csv(manifest_root / "manifest.csv", index=False)
    with_rows(manifest_root, {"image": "00.jpg", "subject": "p9", "split": "test"})
    with pytest.raises(DataError, match=r"manifest\.csv puts 00\.jpg into both train and test"):
        module(manifest_root)


def test_subjects_who_share_a_file_are_one_patient(manifest_root, capsys):
    """Else what else there is of the second one could be in another split."""
    Image.new("L", (48, 64), 9).save(manifest_root / "12.jpg")
    with_rows(manifest_root, {"image": "00.jpg", "subject": "p9"}, {"image": "12.jpg", "subject": "p9"})
    data = module(manifest_root)
    patients = {sample.case_id: sample.patient_id for part in data.splits.values() for sample in part}
    assert len(patients) == 13
    assert {patients[name] for name in ("00.jpg", "01.jpg", "12.jpg")} == {"p0"}
    assert "1 files under several subjects, such as 00.jpg under p0 and p9" in capsys.readouterr().out


def test_text_alone_is_a_study(manifest_root):
    with_rows(manifest_root, {"text": "Clear lungs.", "subject": "p9"}, {"text": "No mass."}, {"subject": "p9"})
    data = module(manifest_root, split={"fractions": (1.0, 0.0, 0.0)}, samples={"views": None})
    dataset = data.train_dataloader().dataset
    assert len(dataset) == 14
    places = {dataset.subject(index): index for index in range(14)}
    item = dataset[Draw(places["row 13"], 0, 0)]
    assert (item["patient_id"], item["modality_mask"].tolist()) == ("p9", [False, True])
    assert dataset[Draw(places["row 14"], 0, 0)]["patient_id"] == "row 14"
    assert data.examine(deep=True, workers=1) == []
    assert (
        len(module(manifest_root, samples={"complete": True}, split={"fractions": (1.0, 0.0, 0.0)}).splits["train"])
        == 11
    )


def test_the_vocabulary_knows_the_training_split_alone(mimic_root, tmp_path):
    data = module(mimic_root)
    texts = data.training_texts()
    assert 0 < len(texts) < 12
    assert data.token_counts().sum() == sum(int(data.tokenizer.encode(t, 24).maskable.sum()) for t in texts)
    spec = data.input_spec.vocabulary
    other = module(mimic_root, text={"vocab_size": 150}).input_spec.vocabulary
    assert spec["size"] > 150 >= other["size"]
    assert spec["fingerprint"] != other["fingerprint"]
    assert module(mimic_root).input_spec.vocabulary == spec


def test_unique_texts_are_split_after_duplicates_have_gone(manifest_root):
    table = pd.read_csv(manifest_root / "manifest.csv", keep_default_na=False)
    table["text"] = [NOTES[i % 3].upper() if i > 5 else NOTES[i % 3] for i in range(12)]
    table.to_csv(manifest_root / "manifest.csv", index=False)
    data = module(manifest_root, text={"unique": True}, batch_size=1)
    assert sum(map(len, data.splits.values())) == 3


def test_doctor_counts_words_that_no_training_report_has(manifest_root, capsys):
    table = pd.read_csv(manifest_root / "manifest.csv", keep_default_na=False).iloc[4:10]
    table["text"] = ["Clear lungs.", "No mass, 2 cm.", "", "Lungs hyperinflated; ___ 3 cm", "Mass!", "Hyperinflated"]
    table["split"] = ["train", "train", "test", "test", "val", "val"]
    table.to_csv(manifest_root / "manifest.csv", index=False)
    module(manifest_root).examine(deep=False, workers=1)
    words = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("words: "))
    assert words.startswith("words: 2 of 5 in held-out reports occur in no training report (1 of 4 distinct")


def test_swapping_sides():
    assert swap_sides("Left-sided effusion, RIGHT base, bright.") == "Right-sided effusion, LEFT base, bright."
    assert swap_sides(swap_sides(NOTES[0])) == NOTES[0]


@pytest.mark.parametrize("flip", ["swap_words", "naive"])
def test_mirrored_crops(mimic_root, flip):
    plain, mirrored = (module(mimic_root, image={"flip": name}, text={"length": 300}) for name in ("off", flip))
    index = next(i for i, s in enumerate(plain.splits["train"]) if "left" in plain.text_of(s))
    datasets = [data.train_dataloader().dataset for data in (plain, mirrored)]
    texts = set()
    for epoch in range(8):
        item = datasets[1][Draw(index, epoch, 0)]
        ids = torch.where(item["labels"] == -100, item["input_ids"], item["labels"])
        texts.add(" ".join(mirrored.tokenizer.token(i) for i in ids.tolist()))
    assert len(texts) == (2 if flip == "swap_words" else 1)


def test_boxes():
    for draw in range(50):
        left, top, right, bottom = random_box((300, 200), (0.2, 1.0), numpy_generator("box", draw))
        assert 0 <= left < right <= 200
        assert 0 <= top < bottom <= 300
        assert 0.18 <= (right - left) * (bottom - top) / 60000 <= 1
    assert center_box((300, 200), (64, 64)) == (0, 50, 200, 250)
    assert center_box((300, 200), (32, 64)) == (0, 100, 200, 200)


def test_a_cut_box_equals_a_cut_then_a_resize_and_mirrors():
    pixels = np.tile(np.linspace(0, 255, 90).astype(np.uint8), (60, 1))
    whole = cut_box(pixels, (0, 0, 90, 60), (60, 90))
    assert torch.allclose(whole[0], torch.from_numpy(pixels) / 255)
    mirrored = cut_box(pixels, (0, 0, 90, 60), (60, 90), mirror=True)
    assert torch.equal(mirrored, whole.flip(2))


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="`length` of a text"):
        ImageTextDataModule("nowhere", text=ReportTextConfig(length=1))
    with pytest.raises(ValueError, match="crop_scale"):
        ImageTextDataModule("nowhere", image=ReportImageConfig(crop_scale=(0.5, 0.2)))


@pytest.mark.real_data
def test_distinct_reports_of_open_i(real_data):
    """Tokens are lower case, so reports that differ in capitals alone are one to the network."""
    data = ImageTextDataModule(str(real_data("openi_reports")), text=ReportTextConfig(unique=True))
    data.index()
    assert len(data.samples) == 3157
    train, val, test = ({data.text_of(sample).lower() for sample in part} for part in data.splits.values())
    assert not train & (val | test)
    assert not val & test


@pytest.mark.real_data
def test_covid(real_data):
    data = module(real_data("covid_cxr"), samples={"views": ["AP", "PA", "AP Supine"]})
    patients = [{sample.patient_id for sample in part} for part in data.splits.values()]
    assert not patients[0] & patients[1]
    assert sum(map(len, data.splits.values())) == 148
    assert data.ledger.faults == []
    batch = next(iter(data.val_dataloader()))
    assert batch["modality_mask"].all()


@pytest.mark.real_data
def test_covid_by_the_names_of_its_columns(real_data):
    root = real_data("covid_cxr")
    table = pd.read_csv(root / "metadata.csv", dtype=str, keep_default_na=False)
    noted = table[table["clinical_notes"].str.strip() != ""]
    data = ImageTextDataModule(str(root), table="metadata.csv", columns=COVID_COLUMNS)
    data.index()
    found = [sample for sample in data.samples if sample.images and sample.study.text]
    assert len(found) == noted["filename"].nunique() == 218
    assert len(data.samples) == table["filename"].nunique()
    assert all(sample.images[0].is_file() for sample in found)


def test_the_run_keeps_its_tokenizer(mimic_root, tmp_path):
    data = module(mimic_root)
    data.tokenizer.save(tmp_path / "tokenizer.json")
    again = module(mimic_root, text={"tokenizer": str(tmp_path / "tokenizer.json")})
    assert again.input_spec.vocabulary == data.input_spec.vocabulary
    (tmp_path / "broken.json").write_text(json.dumps({"model": None}))
    with pytest.raises(DataError, match=r"no tokenizer at .*broken\.json"):
        module(mimic_root, text={"tokenizer": str(tmp_path / "broken.json")})
