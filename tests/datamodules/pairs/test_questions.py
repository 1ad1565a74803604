"""VQA-RAD, SLAKE and VQA-Med-2019: layouts, answers, and the data module over them."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from PIL import Image

from common.errors import DataError
from datamodules.configs import CacheConfig, LoaderConfig, SplitConfig
from datamodules.pairs.answers import accepted_answers, normalised_answer
from datamodules.pairs.datamodule import PairImageConfig, other_images
from datamodules.pairs.questions import (
    QuestionConfig,
    QuestionDataModule,
    QuestionSplitConfig,
    SingleQuestion,
    ambiguous,
)
from datamodules.pairs.vqa import find_slake, find_vqa_med, find_vqa_rad, question_of
from datamodules.registry import Settings, open_archive
from datamodules.reports.archive import TextConfig
from datamodules.reports.datamodule import ImageTextDataModule, ReportImageConfig, ReportTextConfig, SampleConfig
from datamodules.reports.studies import studies_of
from datamodules.synthetic.figures import write_slake, write_vqa_med_2019, write_vqa_rad
from datamodules.tree import Tree

SMALL = {
    "image": PairImageConfig((32, 32)),
    "cache": CacheConfig(side=48),
    "text": TextConfig(16, tokenizer_kind="bpe", vocab_size=300, end_token=True),
}


def questions_of(root):
    archive = open_archive(root, needs={"images", "questions"})
    return archive, [question_of(record) for record in archive.records]


@pytest.fixture(scope="module")
def rad_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("vqa_rad")
    write_vqa_rad(root, 2, 0)
    return root


def module(root, **settings):
    groups = SMALL | {"split": QuestionSplitConfig(), "questions": QuestionConfig(), "loader": LoaderConfig()}
    made = {name: replace(group, **settings.pop(name, {})) for name, group in groups.items()}
    built = QuestionDataModule(str(root), **{"batch_size": 4, **settings}, **made)
    built.prepare_data()
    built.setup("fit")
    return built


@pytest.mark.parametrize(("answer", "normal"), [
    ("Yes ", "yes"), ("none", "none"), ("Two", "2"), (3, "3"), ("The left lung.", "left lung"), ("x-ray", "x-ray"),
    ("1.5 cm", "1.5 cm"), ("T2-weighted, axial", "t2-weighted axial"), ("a", "a"), ("  ", ""), ("Crohn's", "crohn's"),
])  # fmt: skip
def test_normal_form(answer, normal):
    assert normalised_answer(answer) == normal


def test_alternatives_and_parts_that_may_be_left_out():
    assert accepted_answers("CT (with contrast)#CAT scan") == ("ct", "ct with contrast", "cat scan")
    assert accepted_answers("") == ()


def test_three_layouts(tmp_path):
    for name, write, find in (
        ("vqa_rad", write_vqa_rad, find_vqa_rad),
        ("slake", write_slake, find_slake),
        ("vqa_med_2019", write_vqa_med_2019, find_vqa_med),
    ):
        write(tmp_path / name, 2, 0)
        archive, questions = questions_of(tmp_path / name)
        assert archive.layout.name == name
        assert questions == find(Tree(tmp_path / name))
        assert {q.split for q in questions} >= {"train", "test"}
        assert all(q.image.is_file() for q in questions)
        assert len({q.case_id for q in questions}) == len(questions)
        studies = studies_of(archive)
        assert 0 < len(studies) < len(questions), "calibration never sees the test split"
    slake = find_slake(Tree(tmp_path / "slake"))
    assert all(q.text.isascii() for q in slake)
    assert sum(not q.answers for q in slake) == 1
    med = find_vqa_med(Tree(tmp_path / "vqa_med_2019"))
    assert {q.category for q in med} == {"modality", "plane", "organ"}
    assert all("\t" not in q.text for q in med)
    assert len(find_vqa_med(Tree(tmp_path / "vqa_med_2019"), Settings(categories=("abnormality",)))) == 16
    (tmp_path / "slake/validate.json").rename(tmp_path / "slake/validation.json")
    assert find_slake(Tree(tmp_path / "slake")) == slake


def test_categories_of_vqa_med(tmp_path, rad_root):
    write_vqa_med_2019(tmp_path, 2, 0)
    asked = {q.category for part in module(tmp_path).splits.values() for q in part}
    assert asked == {"modality", "plane", "organ"}
    chosen = module(tmp_path, questions={"categories": ["plane", "abnormality"]})
    assert {q.category for q in chosen.splits["test"]} == {"plane", "abnormality"}
    assert {q.category for q in chosen.splits["train"]} == {"plane", "abnormality"}
    with pytest.raises(DataError, match="has no category 'colour'; it has modality, plane, organ, abnormality"):
        module(tmp_path, questions={"categories": ["colour"]})
    with pytest.raises(DataError, match="is of the layout vqa_rad, which has no setting categories"):
        module(rad_root, questions={"categories": ["plane"]})
    with pytest.raises(ValueError, match="empty list"):
        QuestionDataModule(str(tmp_path), questions=QuestionConfig(categories=[]))


def test_calibration_reads_questions_alone(rad_root):
    data = ImageTextDataModule(
        str(rad_root),
        samples=SampleConfig(complete=True),
        image=ReportImageConfig((32, 32)),
        cache=CacheConfig(side=48),
        text=ReportTextConfig(16, vocab_size=200),
        split=SplitConfig((0.9, 0.1, 0.0)),
    )
    data.index()
    answers = {str(row["answer"]).lower() for row in json.loads((rad_root / "trainset.json").read_text())} - {"disc"}
    texts = " ".join(sample.study.text.lower() for part in data.splits.values() for sample in part)
    assert not any(f" {answer} " in texts for answer in answers if answer not in ("yes", "no"))
    assert not data.splits["test"]
    held = {sample.patient_id for sample in data.splits["val"]}
    assert held.isdisjoint(sample.patient_id for sample in data.splits["train"])


def test_a_batch_holds_what_it_says(rad_root):
    data = module(rad_root)
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (4, 3, 32, 32)
    for label, answers in zip(batch["label"].tolist(), batch["answers"], strict=True):
        assert data.task_classes()[label] == answers[0]
    assert set(batch["kind"]) <= {"open", "closed"}, "trailing blanks are cut"
    held = {q.patient_id for q in data.splits["val"]}
    assert held
    assert held.isdisjoint(q.patient_id for q in data.splits["train"])
    assert {q.split for q in data.splits["val"]} == {"train"}


def test_a_copy_of_the_test_set_as_validation_is_not_read(tmp_path):
    """The valset.json that goes round with VQA-RAD is a copy of testset.json."""
    write_vqa_rad(tmp_path, 2, 0)
    path = tmp_path / "testset.json"
    rows = [{**row, "question": f"{row['question']} ({row['qid']})"} for row in json.loads(path.read_text())]
    path.write_text(json.dumps(rows))
    (tmp_path / "valset.json").write_text(path.read_text())
    asked = {row["question"] for row in rows}
    data = module(tmp_path)
    assert {q.text for q in data.splits["test"]} == asked
    for name in ("train", "val"):
        assert data.splits[name]
        assert asked.isdisjoint(q.text for q in data.splits[name])
    archive, questions = questions_of(tmp_path)
    assert {q.split for q in questions} == {"train", "test"}
    studies = studies_of(archive)
    assert len(studies) == len(questions) - len(rows)
    assert asked.isdisjoint(study.text for study in studies)
    assert {study.split for study in studies} == {None}, "no official validation split"


def test_vqa_rad_as_it_was_released(tmp_path):
    """Its form, after the specification: one list of all rows, with blanks, numbers and NULL where nothing is."""
    write_vqa_rad(tmp_path, 2, 0)
    train, test = (json.loads((tmp_path / f"{split}set.json").read_text()) for split in ("train", "test"))
    first = {"question": " Is the lesion bright? ", "answer_type": "CLOSED ", "answer": "Yes ", "qid": "1"}
    rows = [row | {"question_frame": "NULL", "question_rephrase": "NULL", "qid_linked_id": "x"} for row in train + test]
    rows[0] |= first | {"question_frame": "Is/Are the lesion bright? ", "phrase_type": "freeform"}
    rows[1] |= {"question": "Does the lesion shine?", "phrase_type": "para", "answer": 12, "question_frame": None}
    rows[-2] |= {"phrase_type": "test_para", "question_frame": "Is/Are the tested lesion bright?"}
    (tmp_path / "VQA_RAD Dataset Public.json").write_text(json.dumps(rows))
    (tmp_path / "images").rename(tmp_path / "VQA_RAD Image Folder")
    for split in ("train", "test"):
        (tmp_path / f"{split}set.json").unlink()
    archive, questions = questions_of(tmp_path)
    assert archive.layout.name == "vqa_rad"
    parts = {split: [q for q in questions if q.split == split] for split in ("train", "test")}
    assert (len(parts["train"]), len(parts["test"])) == (len(train) + 1, len(test))
    assert [q.text for q in parts["train"][:3]] == [
        "Is the lesion bright?", "Is/Are the lesion bright?", "Does the lesion shine?"
    ]  # fmt: skip
    assert [(q.answers, q.kind) for q in parts["train"][:2]] == [(("yes",), "closed")] * 2
    assert parts["train"][2].answers == ("12",)
    assert not any("tested" in q.text or q.text == "NULL" for q in questions), "a test question in other words"
    assert all(q.image.is_file() for q in questions)
    assert len({q.case_id for q in questions}) == len(questions)
    assert len(studies_of(archive)) == len(parts["train"])
    del rows[3]["phrase_type"]
    (tmp_path / "VQA_RAD Dataset Public.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match="question 3 has no phrase_type"):
        find_vqa_rad(Tree(tmp_path))


def test_questions_stay_out_of_tables_when_anonymised(rad_root):
    batch = next(iter(module(rad_root).train_dataloader()))
    hidden = next(iter(module(rad_root, anonymise=True).train_dataloader()))
    assert all(batch["text"])
    assert not any(hidden["text"])
    assert set(hidden["subject_id"]).isdisjoint(batch["subject_id"])


def test_classes_are_those_of_training(tmp_path, capsys):
    write_vqa_rad(tmp_path, 2, 0)
    rows = json.loads((tmp_path / "testset.json").read_text())
    rows[0]["answer"] = "Something unheard of "
    (tmp_path / "testset.json").write_text(json.dumps(rows))
    data = module(tmp_path)
    assert "something unheard of" not in data.task_classes()
    assert f"1 of {len(rows)} test" in capsys.readouterr().out
    labels = [label for batch in data.test_dataloader() for label in batch["label"].tolist()]
    assert labels.count(-1) == 1
    assert "something unheard of" in module(tmp_path, questions={"classes_from": "all_splits"}).task_classes()
    assert module(tmp_path, split={"val": "test"}).splits["val"] == data.splits["test"]
    assert "warning" in capsys.readouterr().out


def test_splits_by_image(rad_root):
    data = module(rad_root, split={"by": "image", "fractions": (0.6, 0.2, 0.2)})
    images = [{q.image for q in data.splits[name]} for name in ("train", "val", "test")]
    assert all(images)
    assert not images[0] & images[1]
    assert not (images[0] | images[1]) & images[2]


def test_other_images_and_none(rad_root):
    own, other, none = (
        next(iter(module(rad_root, image={"shown": shown}).test_dataloader())) for shown in ("own", "permuted", "blank")
    )
    assert torch.equal(own["input_ids"], other["input_ids"])
    assert not torch.equal(own["image"], other["image"])
    assert (none["image"] == 0).all()
    exchanged = other_images(q.image for q in module(rad_root).splits["test"])
    assert sorted(exchanged) == sorted(exchanged.values())
    assert all(path != stand_in for path, stand_in in exchanged.items())


def test_ambiguous_questions(rad_root):
    chosen = ambiguous(module(rad_root).splits["train"])
    assert {q.text for q in chosen} >= {"what shape is shown", "where is the lesion"}
    data = module(rad_root, questions={"chosen": "ambiguous"}, split={"fractions": (1.0, 0.0, 0.0)})
    assert data.splits["val"] == data.splits["train"]


def test_bad_rows(tmp_path, capsys):
    write_vqa_rad(tmp_path, 2, 0)
    path = tmp_path / "trainset.json"
    rows = json.loads(path.read_text())
    rows[0]["image_name"], rows[4]["question"], rows[8]["answer"] = "", " ", 7
    rows[9] |= {"answer": None, "question": "Which answer is null?"}
    rows[10] |= {"answer": "None", "question": "Which answer is a word?"}
    path.write_text(json.dumps(rows))
    data = module(tmp_path, split={"fractions": (1.0, 0.0, 0.0)}, loader={"max_fault_fraction": 1.0})
    assert {fault.kind for fault in data.ledger.faults} == {"missing", "empty"}
    assert {"7", "none"} <= set(data.task_classes())
    asked = {q.text: q.answers for q in data.splits["train"]}
    assert "Which answer is null?" not in asked
    assert asked["Which answer is a word?"] == ("none",)
    assert "1 training questions have no answer" in capsys.readouterr().out
    rows[1]["image_name"] = "../secret.jpg"
    path.write_text(json.dumps(rows))
    with pytest.raises(DataError, match="does not lie under"):
        find_vqa_rad(Tree(tmp_path))
    del rows[1]["image_name"]
    path.write_text(json.dumps(rows))
    with pytest.raises(DataError, match="question 1 has no image_name"):
        find_vqa_rad(Tree(tmp_path))
    path.write_text("[{")
    with pytest.raises(DataError, match="cannot be read as JSON"):
        find_vqa_rad(Tree(tmp_path))


def test_one_question(tmp_path, rad_root):
    Image.new("RGB", (50, 40), "red").save(tmp_path / "one.png")
    pixels = Image.open(tmp_path / "one.png")
    pixels.putpixel((3, 3), (0, 0, 255))
    pixels.save(tmp_path / "one.png")
    trained = module(rad_root)
    trained.tokenizer.save(tmp_path / "tokenizer.json")
    single = SingleQuestion(str(tmp_path / "one.png"), "What shape is  shown?")
    text = replace(SMALL["text"], tokenizer=str(tmp_path / "tokenizer.json"))
    data = QuestionDataModule(single=single, batch_size=4, **SMALL | {"text": text})
    data.prepare_data()
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    assert batch["text"] == ["What shape is shown?"]
    assert batch["image"].shape == (1, 3, 32, 32)
    assert data.task_classes() == ()
    with pytest.raises(ValueError, match="go together"):
        QuestionDataModule(single=SingleQuestion(image="x.png"))
    with pytest.raises(DataError, match="needs the tokenizer"):
        QuestionDataModule(single=SingleQuestion(image=str(tmp_path / "one.png"), question="What?")).index()
    with pytest.raises(DataError, match="no image at"):
        QuestionDataModule(single=SingleQuestion("gone.png", "What?"), text=text).index()


@pytest.mark.real_data
def test_real_vqa_rad(real_data):
    """Counts of the specification; its 597 ambiguous questions are 595 once "two" and "2" are one answer."""
    questions = find_vqa_rad(Tree(real_data("vqa_rad")))
    train, test = ([q for q in questions if q.split == split] for split in ("train", "test"))
    assert (len(train), len(test)) == (3064, 451)
    assert [sum(q.kind == kind for q in test) for kind in ("open", "closed")] == [179, 272]
    assert all(q.kind and q.answers and q.image.is_file() for q in questions)
    assert len({q.image for q in train}) == 314
    assert {q.image for q in test} <= {q.image for q in train}
    assert len(ambiguous(train)) == 595


@pytest.mark.real_data
def test_framed_questions_of_real_vqa_rad(real_data):
    """Each follows, by its number, the question that it frames: 983 of training, 284 of the test set."""
    rows = [{**row, "split": split} for split in ("train", "test")
            for row in json.loads((real_data("vqa_rad") / f"{split}set.json").read_text())]  # fmt: skip
    rows.sort(key=lambda row: row["qid"])
    framed = [(own, frame) for own, frame in pairwise(rows) if frame["phrase_type"] == "frame"]
    assert all(own["image_name"] == frame["image_name"] for own, frame in framed)
    assert all(accepted_answers(own["answer"]) == accepted_answers(frame["answer"]) for own, frame in framed)
    assert {frame["split"] for _, frame in framed} == {"train"}
    assert [sum(own["split"] == split for own, _ in framed) for split in ("train", "test")] == [983, 284]
