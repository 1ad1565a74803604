"""What ``medmim doctor`` checks in an archive of images with reports."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import numpy as np

from common.faults import Fault
from common.runtime.reporting import print_line
from datamodules.examination import Member, Terms, look_at_all, print_splits, report_faults
from datamodules.images.checks import check_images
from datamodules.reports.text import ReportError
from datamodules.reports.tokens import ReportTokenizer

_WORD = re.compile(r"[^\W\d_]+")


def check_sample(sample: Any, text_of: Callable[[Any], str], deep: bool) -> tuple[Member, str]:
    """Check the headers of a sample's images, or every pixel if ``deep``; also return the text that is used."""
    images = check_images(sample.images, sample.case_id, sample.patient_id, deep)
    faults = list(images.faults)
    try:
        text = text_of(sample)
    except ReportError as error:
        text = ""
        if error.kind != "empty":
            faults.append(Fault(str(sample.study.text), error.kind, error.detail, sample.case_id))
    if not sample.images and not text:
        faults.append(Fault(sample.case_id, "empty", "neither image nor text", sample.case_id))
    return images._replace(faults=faults, usable=images.usable or bool(text)), text


def _print_unseen(texts: Mapping[str, str], training: Set[str]) -> None:
    """Print how many words of held-out reports are in no training report; numbers and redactions do not count."""
    seen: Counter[str] = Counter()
    held_out: Counter[str] = Counter()
    for study, text in texts.items():
        (seen if study in training else held_out).update(_WORD.findall(text.lower()))
    unseen = Counter({word: count for word, count in held_out.items() if word not in seen})
    if held_out:
        print_line(f"words: {unseen.total()} of {held_out.total()} in held-out reports occur in no training report "
            f"({len(unseen)} of {len(held_out)} distinct ones)")  # fmt: skip


def _print_texts(terms: Terms, read: Sequence[str], tokenizer: Callable[[], ReportTokenizer], limit: int) -> None:
    """Print the lengths of reports, the unknown tokens, and the words not seen in training."""
    samples = terms.members
    texts = {sample.study.case_id: text for sample, text in zip(samples, read, strict=True) if text}
    without = len({sample.study.case_id for sample in samples}) - len(texts)
    if not texts:
        print_line("texts: none")
        return
    learned = tokenizer()
    encoded = [learned.encode(text, 1 << 20) for text in texts.values()]
    lengths = np.array([len(entry.ids) for entry in encoded])
    unknown = sum(int((entry.ids == learned.unk_id).sum()) for entry in encoded)
    print_line(f"texts: {len(texts)} studies with one, {without} without; tokens median {np.median(lengths):.0f}, "
        f"90th percentile {np.percentile(lengths, 90):.0f}, {np.mean(lengths > limit):.1%} lose their end after "
        f"{limit} (data.text.length); {unknown} of {lengths.sum()} tokens unknown to the vocabulary of "
        f"{learned.vocab_size}")  # fmt: skip
    _print_unseen(texts, {sample.study.case_id for sample in terms.splits["train"]})
    split_of = {sample.case_id: name for name, part in terms.splits.items() for sample in part}
    parts: dict[str, set[str]] = defaultdict(set)
    for sample in samples:
        if text := texts.get(sample.study.case_id):
            parts[text.lower()].add(split_of[sample.case_id])
    shared = sum(len(found) > 1 for found in parts.values())
    if shared:
        print_line(f"note: {shared} of {len(parts)} distinct texts occur in several splits, under different patients")


def examine(
    name: str,
    terms: Terms,
    text_of: Callable[[Any], str],
    tokenizer: Callable[[], ReportTokenizer],
    limit: int,
    deep: bool,
    workers: int,
) -> list[str]:
    """Print a report on an archive and return the reasons why training would refuse it.

    Args:
        name: Name of its layout.
        terms: What training requires.
        text_of: Returns the text of a sample; raises :class:`datamodules.reports.text.ReportError`.
        tokenizer: Returns the tokenizer; called only if there are texts.
        limit: Most tokens per text.
        deep: Whether to read every byte, not only headers.
        workers: Threads.
    """
    samples = terms.members
    print_splits(f"layout {name}", terms, "samples")
    views = Counter(view or "unknown" for s in {s.study.case_id: s.study for s in samples}.values() for view in s.views)
    if set(views) != {"unknown"}:
        print_line("views: " + (", ".join(f"{view} {count}" for view, count in views.most_common(8)) or "no images"))
    texts: dict[str, str] = {}

    def look_at(sample: Any) -> Member:
        member, texts[sample.case_id] = check_sample(sample, text_of, deep)
        return member

    found = look_at_all(look_at, samples, deep, workers)
    _print_texts(terms, [texts[sample.case_id] for sample in samples], tokenizer, limit)
    return report_faults(terms, found, "samples", deep)
