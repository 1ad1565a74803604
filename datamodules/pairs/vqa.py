"""Questions about images with answers: VQA-RAD, SLAKE and VQA-Med-2019 in their official layouts."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import DataError
from common.pseudonyms import public_name
from datamodules.files import read_json, read_lines
from datamodules.listed_files import path_under
from datamodules.pairs.answers import accepted_answers
from datamodules.registry import NO_SETTINGS, Layout, Record, Settings, marked
from datamodules.reports.medicat import collapsed
from datamodules.tree import Tree


class Question(NamedTuple):
    """One question about one image.

    Attributes:
        case_id: Unique name.
        patient_id: The image; splits are by this, except official ones.
        image: Its file.
        text: The question, white space collapsed; may be empty.
        answers: The accepted answers, normalised, the one used for training first; empty if there are none.
        kind: ``"open"``, ``"closed"`` or, where the archive does not say, empty.
        split: ``train``, ``val`` or ``test``.
        category: Further kind of question, such as ``modality``; empty: unknown.
    """

    case_id: str
    patient_id: str
    image: Path
    text: str
    answers: tuple[str, ...]
    kind: str
    split: str | None
    category: str = ""

    def record(self) -> Record:
        """Return the question as every data module can read it."""
        facts = {"kind": self.kind, "category": self.category}
        return Record(self.case_id, self.patient_id, images=((self.image, ""),), text=self.text or None,
                      attributes=facts, answers=self.answers or ("",), split=self.split)  # fmt: skip


def question_of(record: Record) -> Question:
    """Return a record that asks something as a question about its first image."""
    facts, image = record.attributes, record.images[0][0]
    answers = tuple(answer for answer in record.answers if answer)
    return Question(record.case_id, record.patient_id, image, str(record.text or ""), answers, facts.get("kind", ""),
                    record.split, facts.get("category", ""))  # fmt: skip


def _json_rows(path: Path, needed: Sequence[str]) -> list[dict[str, Any]]:
    """Read a list of objects."""
    rows = read_json(path)
    if not isinstance(rows, list):
        raise DataError(f"{path} is not a list of questions.")
    for number, row in enumerate(rows):
        missing = [name for name in needed if not isinstance(row, dict) or name not in row]
        if missing:
            raise DataError(f"{path}: question {number} has no {', '.join(missing)}.")
    return rows


def _under(root: Path, name: object, source: Path) -> Path:
    """Return the file that a table names under ``root``; where it names none, one that is not there."""
    return path_under(root, str(name or "").strip() or "(no image)", source)


def _kind(value: object) -> str:
    """Return ``open`` or ``closed`` of what may have trailing blanks and any case; empty where it is neither."""
    word = str(value or "").strip().lower()
    return word if word in ("open", "closed") else ""


def _rad_question(row: Mapping[str, Any], text: str, case: str, split: str, images: Path, source: Path) -> Question:
    """Return a row of VQA-RAD as a question."""
    image = _under(images, row["image_name"], source)
    return _question(row, case, image.name, image, text, split, "question_type")


def _question(
    row: Mapping[str, Any], case: str, patient: str, image: Path, text: str, split: str, category: str
) -> Question:
    """Return a row as a question; ``category`` is the field of its category."""
    return Question(f"{split}/{case}", patient, image, text, accepted_answers(row["answer"]),
                    _kind(row.get("answer_type")), split, str(row.get(category) or "").strip())  # fmt: skip


def find_vqa_rad(root: Tree) -> list[Question]:
    """List VQA-RAD in its community split: ``{trainset,testset}.json`` and ``images/``; else its official release.

    A third-party ``valset.json`` is not read: the one in circulation is a copy of the test set.

    Raises:
        DataError: a damaged list.
    """
    if not root.is_file("trainset.json") or not root.is_dir("images"):
        return _find_rad_release(root)
    paths = {split: root / f"{split}set.json" for split in ("train", "test") if root.is_file(f"{split}set.json")}
    return [
        _rad_question(
            row, collapsed(row["question"]), f"{row.get('qid', number)}-{number}", split, root / "images", path
        )
        for split, path in paths.items()
        for number, row in enumerate(_json_rows(path, ("image_name", "question", "answer")))
    ]


def _find_rad_release(root: Tree) -> list[Question]:
    """List VQA-RAD as it was released: ``VQA_RAD Dataset Public.json`` and ``VQA_RAD Image Folder/``; empty without.

    Each row's ``question`` is read, free-form or rephrased (a rephrased question has a row of its own), those whose
    ``phrase_type`` begins with "test" for testing; rows of training have their framed question too. By the numbers of
    the community split these are 1,797 rows and 983 framed questions, and 451 rows for testing. That split trains on
    284 further ones: the framed questions of test rows, with their answers. They are left out here.
    """
    path, images = root / "VQA_RAD Dataset Public.json", root / "VQA_RAD Image Folder"
    if not root.is_file(path) or not root.is_dir(images):
        return []
    found = []
    for number, row in enumerate(_json_rows(path, ("image_name", "question", "answer", "phrase_type"))):
        split = "test" if str(row["phrase_type"]).strip().lower().startswith("test") else "train"
        case, framed = f"{row.get('qid', number)}-{number}", collapsed(row.get("question_frame"))
        texts = {case: collapsed(row["question"])}
        if split == "train" and framed not in ("", "NULL"):
            texts[f"{case}-framed"] = framed
        found += [_rad_question(row, text, name, split, images, path) for name, text in texts.items()]
    return found


def find_slake(root: Tree) -> list[Question]:
    """List SLAKE in English: ``{train,validate or validation,test}.json`` and ``imgs/``; empty without."""
    if not root.is_file("train.json") or not root.is_dir("imgs"):
        return []
    names = {"train": ("train",), "val": ("validate", "validation"), "test": ("test",)}
    found: list[Question] = []
    for split, given in names.items():
        path = next((root / f"{name}.json" for name in given if root.is_file(f"{name}.json")), None)
        if path is None:
            continue
        for row in _json_rows(path, ("img_name", "question", "answer", "q_lang")):
            if str(row["q_lang"]).strip().lower() == "en":
                image, case = _under(root / "imgs", row["img_name"], path), row.get("qid", len(found))
                text = collapsed(row["question"])
                found.append(_question(row, case, image.parent.name, image, text, split, "content_type"))
    return found


_MED_FILES = {"modality": "Modality", "plane": "Plane", "organ": "Organ", "abnormality": "Abnormality"}
#: Categories of VQA-Med-2019 where none are named: all but abnormality, as the published code.
MED_CATEGORIES = ("modality", "plane", "organ")


def _med_lines(path: Path, fields: int) -> list[list[str]]:
    """Split lines at ``|``; the question keeps tabs as blanks, the answer all that is left."""
    rows = []
    for number, line in enumerate(read_lines(path), 1):
        parts = line.split("|", fields - 1)
        if len(parts) < fields and line.strip():
            raise DataError(f"{path} line {number} has {len(parts)} fields between |, {fields} are needed: "
                            f"'{public_name(line[:60])}'.")  # fmt: skip
        if line.strip():
            rows.append([collapsed(part) for part in parts])
    return rows


def _med_folder(root: Tree, *names: str) -> Path | None:
    return next((path for name in names for path in root.glob(name) if root.is_dir(path)), None)


def find_vqa_med(root: Tree, settings: Settings = NO_SETTINGS) -> list[Question]:
    """List VQA-Med-2019 in its official folders for training, validation and test; empty where there is no training.

    Raises:
        DataError: a damaged line, or an unknown category.
    """
    categories = settings.categories or MED_CATEGORIES
    unknown = [name for name in categories if name not in _MED_FILES]
    if unknown:
        raise DataError(f"VQA-Med-2019 has no category {unknown[0]!r}; it has {', '.join(_MED_FILES)}.")
    training = _med_folder(root, "ImageClef-2019-VQA-Med-Training*", "*Training*")
    if training is None or not root.is_dir(training / "QAPairsByCategory"):
        return []
    test = _med_folder(root, "VQAMed2019Test*", "*Test*")
    parts = {"train": training, "val": _med_folder(root, "*Validation*"), "test": test}
    found: list[Question] = []
    for split, folder in parts.items():
        part = None if folder is None else root.sub(root.name_of(folder))
        images = None if part is None else _med_folder(part, "*[Ii]mages")
        if part is None or images is None:
            continue
        rows = _med_test(part, categories) if split == "test" else _med_training(part, categories)
        for name, category, question, answer in rows:
            image = images / (name if Path(name).suffix else f"{name}.jpg")
            patient = f"{split}/{image.stem}"
            case = f"{patient}/{category}-{len(found)}"
            found.append(Question(case, patient, image, question, accepted_answers(answer), "", split, category))
    return found


def _med_training(folder: Tree, categories: Sequence[str]) -> Iterator[list[str]]:
    """Yield image, category, question and answer of a folder with one file per category."""
    for category in categories:
        for path in folder.glob(f"QAPairsByCategory/C*_{_MED_FILES[category]}_*.txt"):
            yield from ([name, category, question, answer] for name, question, answer in _med_lines(path, 3))


def _med_test(folder: Tree, categories: Sequence[str]) -> Iterator[list[str]]:
    """Yield the same of the test folder, whose one file names the category of each question."""
    for path in folder.glob("*Questions_w_Ref_Answers.txt"):
        for name, category, question, answer in _med_lines(path, 4):
            if category.lower() in categories:
                yield [name, category.lower(), question, answer]


VQA_RAD = Layout(
    "vqa_rad",
    "ROOT/{trainset,testset}.json and ROOT/images/, or ROOT/VQA_RAD Dataset Public.json and ROOT/VQA_RAD Image Folder/",
    find_vqa_rad,
    marked(("trainset.json", "VQA_RAD Dataset Public.json"), ("images", "VQA_RAD Image Folder")),
    tables=("*set.json", "VQA_RAD Dataset Public.json"),
)
SLAKE = Layout(
    "slake",
    "ROOT/{train,validate,test}.json and ROOT/imgs/",
    find_slake,
    marked("train.json", "imgs"),
    tables=("train.json", "valid*.json", "test.json"),
)
VQA_MED = Layout(
    "vqa_med_2019",
    "ROOT/ImageClef-2019-VQA-Med-{Training,Validation}/ and ROOT/VQAMed2019Test/",
    find_vqa_med,
    marked("*Training*/QAPairsByCategory"),
    takes=("categories",),
    tables=("*/QAPairsByCategory/*.txt", "*/*Questions_w_Ref_Answers.txt"),
)
