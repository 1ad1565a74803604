"""Visual question answering: one data module for VQA-RAD, SLAKE and VQA-Med-2019."""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from common.errors import DataError
from common.pseudonyms import public_name
from common.runtime.reporting import print_line
from datamodules.loading import Draw, ResumableLoader
from datamodules.pairs.answers import answer_classes, unseen
from datamodules.pairs.datamodule import PairDataModule
from datamodules.pairs.vqa import Question, question_of
from datamodules.registry import Settings
from datamodules.splits import SPLITS, seeded_split


def ambiguous(questions: Sequence[Question]) -> list[Question]:
    """Keep the questions that occur word for word with more than one answer: only the image decides which.

    Their texts become their words alone, since case and full stops tell some of the answers apart.
    """
    answers: dict[str, set[str]] = defaultdict(set)
    texts = [" ".join(re.findall(r"\w+", question.text.lower())) for question in questions]
    for text, question in zip(texts, questions, strict=True):
        answers[text].update(question.answers[:1])
    chosen = zip(texts, questions, strict=True)
    return [question._replace(text=text) for text, question in chosen if len(answers[text]) > 1]


@dataclass(frozen=True)
class QuestionSplitConfig:
    """Who is trained, validated and tested on.

    Args:
        by: ``"official"``, or ``"image"``: all questions dealt anew, no image in two splits.
        fractions: Shares of images for train, val and test where they are dealt; where an official split names no
            validation, it is cut out of training in the ratio of the first two.
        val: ``"held_out"`` as above; ``"test"`` selects on the test split, as the published code does.
        seed: Seed of the split alone.
    """

    by: Literal["official", "image"] = "official"
    fractions: tuple[float, float, float] = (0.9, 0.1, 0.0)
    val: Literal["held_out", "test"] = "held_out"
    seed: int = 0


@dataclass(frozen=True)
class QuestionConfig:
    """Which questions are asked, and what may be answered.

    Args:
        chosen: ``"all"``, or ``"ambiguous"``: those of training that occur word for word with more than one answer, as
            words alone.
        classes_from: ``"train"``, or ``"all_splits"`` as the published code, so that no answer is unseen.
        categories: Of VQA-Med-2019 alone: which of ``modality``, ``plane``, ``organ`` and ``abnormality`` to ask about;
            None takes the first three, as the published code does.

    Raises:
        ValueError: ``categories`` is empty.
    """

    chosen: Literal["all", "ambiguous"] = "all"
    classes_from: Literal["train", "all_splits"] = "train"
    categories: list[str] | None = None

    def __post_init__(self) -> None:
        if self.categories is not None and not self.categories:
            raise ValueError("`categories` is an empty list: name at least one, or leave it out.")


@dataclass(frozen=True)
class SingleQuestion:
    """One question about one image.

    Args:
        image: The image's file.
        question: The question.

    Raises:
        ValueError: one is given without the other.
    """

    image: str | None = None
    question: str | None = None

    def __post_init__(self) -> None:
        if (self.image is None) != (self.question is None):
            raise ValueError("`image` and `question` go together: give both, or neither.")


class QuestionDataModule(PairDataModule):
    """Questions about images, with answers as classes.

    The classes are the answers of the training split; a test question whose answer is none of them can only be answered
    wrongly, and is counted so.

    Args:
        root: The archive.
        layout: Name of its layout; ``"auto"`` recognises it from the tree.
        split: Who is trained, validated and tested on.
        questions: Which questions are asked, and what may be answered.
        single: With ``lightning predict``: one question about one image, in place of the archive.
        **settings: Those of :class:`datamodules.pairs.datamodule.PairDataModule`.
    """

    item_name = "questions"
    needs = frozenset({"images", "questions"})
    split_keys = ("fractions", "seed")
    personal = ("single.image", "single.question")

    def __init__(
        self,
        root: str = "",
        layout: str = "auto",
        split: QuestionSplitConfig = QuestionSplitConfig(),
        questions: QuestionConfig = QuestionConfig(),
        single: SingleQuestion = SingleQuestion(),
        **settings: Any,
    ) -> None:
        super().__init__(root, **settings)
        self._layout = layout
        self._split, self._val, self._fractions, self._split_seed = split.by, split.val, split.fractions, split.seed
        self._classes_from, self._questions = questions.classes_from, questions.chosen
        self._categories = questions.categories
        self._single = None if single.image is None else (Path(single.image), str(single.question))
        self._frequent: dict[str, str] = {}
        self._number: dict[str, int] = {}

    def find(self, root: str) -> dict[str, list[Question]]:
        """List the questions by split; training questions without an answer are left out.

        Raises:
            DataError: an unknown layout, a damaged table, ``categories`` that the archive does not have, or no answer
                to learn.
        """
        if self._single is not None:
            return self._one_question(*self._single)
        archive = self.open(root, self._layout, Settings(categories=tuple(self._categories or ())))
        self.layout_name = archive.layout.name
        splits = self._assign_splits([question_of(record) for record in archive.records])
        silent = [question for question in splits["train"] if not question.answers]
        splits["train"] = [question for question in splits["train"] if question.answers]
        if silent:
            print_line(f"note: {len(silent)} training questions have no answer and are left out")
        if self._questions == "ambiguous":
            splits["train"] = ambiguous(splits["train"])
            splits["val"] = splits["train"] if not splits["val"] else splits["val"]
        learned = [q.answers[0] for q in splits["train"]]
        if self._classes_from == "all_splits":
            learned += [q.answers[0] for name in ("val", "test") for q in splits[name] if q.answers]
        self._classes = answer_classes(learned)
        self._number = {name: index for index, name in enumerate(self._classes)}
        self.archive = archive
        return splits

    def _assign_splits(self, found: Sequence[Question]) -> dict[str, list[Question]]:
        """Return the questions of each split."""
        if self._split == "image":
            parts = seeded_split(found, self._fractions, self._split_seed)
            return {name: [q for q in found if parts[q.case_id] == name] for name in SPLITS}
        splits = {name: [q for q in found if q.split == name] for name in SPLITS}
        if self._val == "test":
            print_line("warning: validation uses the test split, so the best checkpoint is chosen with its answers")
            splits["val"] = splits["test"]
        elif not splits["val"] and self._fractions[1]:
            share = self._fractions[1] / (self._fractions[0] + self._fractions[1])
            parts = seeded_split(splits["train"], (1 - share, share, 0.0), self._split_seed)
            splits["val"] = [q for q in splits["train"] if parts[q.case_id] == "val"]
            splits["train"] = [q for q in splits["train"] if parts[q.case_id] == "train"]
        return splits

    def _one_question(self, image: Path, question: str) -> dict[str, list[Question]]:
        """Return the one question that was asked on the command line."""
        if not image.is_file():
            raise DataError(f"There is no image at {public_name(image)}.")
        if not question.strip():
            raise DataError("The question is empty: give one with --data.single.question.")
        self.layout_name, self.test_split = "one question", "test"
        one = [Question(image.name, image.name, image, " ".join(question.split()), (), "", "test")]
        return {"train": one, "val": [], "test": one}

    def index(self) -> str:
        """List the questions; return the layout's name (a single question needs no archive)."""
        if self._single is not None and not self.splits:
            if self._tokenizer_path is None:
                raise DataError("One question needs the tokenizer of the checkpoint: give --ckpt_path a run folder.")
            self.root, self._cache = str(self._single[0].parent), "none"
        return super().index()

    def most_frequent(self) -> dict[str, str]:
        """Return the most frequent training answer to each kind of question, and under ``""`` to any."""
        if not self._frequent:
            counts: dict[str, Counter[str]] = defaultdict(Counter)
            for question in self.splits["train"]:
                for kind in {question.kind, ""}:
                    counts[kind][question.answers[0]] += 1
            self._frequent = {kind: count.most_common(1)[0][0] for kind, count in counts.items()}
        return self._frequent

    def describe(self) -> str:
        """Return how many answers there are and how many questions cannot be answered."""
        if not self._classes:
            return ""
        lost = ", ".join(
            f"{unseen([q.answers for q in self.splits[name]], self._classes)} of {len(self.splits[name])} {name}"
            for name in ("val", "test")
            if self.splits[name]
        )
        return f", {len(self._classes)} answers" + (f"; answers not among them: {lost}" if lost else "")

    def facts(self, pair: Question, draw: Draw) -> Mapping[str, Any]:
        """Return the class of the answer (-1 = none), what else counts as right, and the kind of question."""
        label = next((self._number[name] for name in pair.answers if name in self._number), -1)
        return {"label": label, "answers": list(pair.answers), "kind": pair.kind}

    def predict_dataloader(self) -> ResumableLoader:
        """Return the one question, or those that ``test`` reads (Lightning hook)."""
        if self._single:
            return self.evaluation_loader(self._dataset(self.splits["test"]))
        return super().predict_dataloader()
