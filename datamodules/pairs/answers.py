"""Answers of visual question answering: their normal form, and which of them are classes."""

import re
from collections.abc import Iterable, Sequence

from common.errors import DataError

_ARTICLES = {"a", "an", "the"}
_NUMBERS = {name: str(value) for value, name in enumerate(
    ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"))}  # fmt: skip
#: Punctuation other than a point or comma between digits, a hyphen or an apostrophe inside a word.
_PUNCTUATION = re.compile(r"[;/\[\]\"{}()=+\\_<>@`?!:*]|(?<!\d)[.,]|[.,](?!\d)|(?<!\w)[-']|[-'](?!\w)")
_OPTIONAL = re.compile(r"\(([^()]*)\)")


def normalised_answer(answer: object) -> str:
    """Normalise an answer for comparison: lower case, no punctuation, no article, number words as digits.

    Unlike the published code "none" stays, hyphens stay inside words, and nothing depends on answers seen before.
    """
    words = _PUNCTUATION.sub(" ", str(answer).lower()).split()
    kept = [_NUMBERS.get(word, word) for word in words if word not in _ARTICLES]
    return " ".join(kept or words)


def accepted_answers(answer: object) -> tuple[str, ...]:
    """Return the accepted answers, normalised, the one used for training first.

    In VQA-Med ``#`` separates alternatives and parentheses mark what may be left out. None, the null of JSON, is no
    answer; the word "none" is one.
    """
    if answer is None:
        return ()
    found: dict[str, None] = {}
    for part in str(answer).split("#"):
        for text in (_OPTIONAL.sub(" ", part), part):
            if name := normalised_answer(text):
                found.setdefault(name)
    return tuple(found)


def answer_classes(training: Iterable[str]) -> tuple[str, ...]:
    """Return the distinct answers of the training split, sorted: the classes.

    Raises:
        DataError: there is none.
    """
    classes = tuple(sorted({answer for answer in training if answer}))
    if not classes:
        raise DataError("No training question has an answer, so there is nothing to choose from.")
    return classes


def unseen(answers: Iterable[Sequence[str]], classes: Sequence[str]) -> int:
    """Count the questions none of whose accepted answers is a class: they can only be answered wrongly."""
    known = set(classes)
    return sum(known.isdisjoint(accepted) for accepted in answers)
