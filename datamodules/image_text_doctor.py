"""What ``medmim doctor`` looks at in an archive of images with reports."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from tqdm import tqdm

from common.faults import Fault, FaultLedger
from common.reporting import say
from datamodules.cache import say_cache
from datamodules.image_cache import ImageCache
from datamodules.image_checks import check_image, copies
from datamodules.reports import ReportError

if TYPE_CHECKING:
    from datamodules.image_text import ImageTextDataModule, Sample


class Findings(NamedTuple):
    """What was found in one sample.

    Attributes:
        faults: What is broken.
        text: The text that would be used.
        sums: Check sum to path of every image that was read to its end.
        usable: Whether anything is left to train on.
    """

    faults: list[Fault]
    text: str
    sums: dict[str, str]
    usable: bool


def check_sample(datamodule: "ImageTextDataModule", sample: "Sample", deep: bool) -> Findings:
    """Look at the headers of a sample's images, or (``deep``) at every pixel, and read its report."""
    faults, sums, readable = [], {}, 0
    for path in sample.images:
        found = check_image(path, sample.case_id, deep)
        if isinstance(found, Fault):
            faults.append(found)
            continue
        readable += 1
        if found:
            sums[found] = str(path)
    try:
        text = datamodule.text_of(sample)
    except ReportError as error:
        text = ""
        if error.kind != "empty":
            faults.append(Fault(str(sample.study.text), error.kind, error.detail, sample.case_id))
    if not sample.images and not text:
        faults.append(Fault(sample.case_id, "empty", "neither image nor text", sample.case_id))
    return Findings(faults, text, sums, bool(readable or text))


def _say_texts(datamodule: "ImageTextDataModule", samples: Sequence["Sample"], findings: Sequence[Findings]) -> None:
    """Print how long the reports are and what the tokenizer does not know."""
    texts = {sample.study.case_id: found.text for sample, found in zip(samples, findings, strict=True) if found.text}
    without = len({sample.study.case_id for sample in samples}) - len(texts)
    if not texts:
        say("reports: none")
        return
    tokenizer = datamodule.tokenizer
    encoded = [tokenizer.encode(text, 1 << 20) for text in texts.values()]
    lengths = np.array([len(entry.ids) for entry in encoded])
    unknown = sum(int((entry.ids == tokenizer.unk_id).sum()) for entry in encoded)
    limit = datamodule.text.length
    say(f"reports: {len(texts)} studies with a text, {without} without; tokens median {np.median(lengths):.0f}, "
        f"90th percentile {np.percentile(lengths, 90):.0f}, {np.mean(lengths > limit):.1%} longer than {limit}; "
        f"{unknown} of {lengths.sum()} tokens unknown to the vocabulary of {tokenizer.vocab_size}")  # fmt: skip
    parts: dict[str, set[str]] = defaultdict(set)
    split_of = {sample.case_id: name for name, part in datamodule.splits.items() for sample in part}
    for sample in samples:
        if text := texts.get(sample.study.case_id):
            parts[text].add(split_of[sample.case_id])
    shared = sum(len(found) > 1 for found in parts.values())
    if shared:
        say(f"note: {shared} of {len(parts)} distinct texts occur in several splits, under different patients")


def examine(datamodule: "ImageTextDataModule", deep: bool, workers: int) -> list[str]:
    """Print a report on an archive and return the reasons why training would refuse it."""
    layout = datamodule.index()
    samples = [sample for part in datamodule.splits.values() for sample in part]
    say(f"layout {layout.name}: {len(samples)} samples of {len({s.patient_id for s in samples})} patients, "
        + ", ".join(f"{len(part)} {name}" for name, part in datamodule.splits.items()))  # fmt: skip
    views = Counter(view or "unknown" for s in {s.study.case_id: s.study for s in samples}.values() for view in s.views)
    say("views: " + (", ".join(f"{view} {count}" for view, count in views.most_common(8)) or "no images"))
    with ThreadPoolExecutor(workers) as pool:
        results = pool.map(lambda sample: check_sample(datamodule, sample, deep), samples)
        title = "reading every pixel" if deep else "reading headers"
        findings = list(tqdm(results, total=len(samples), desc=title, unit="image"))
    _say_texts(datamodule, samples, findings)
    ledger = FaultLedger(datamodule.ledger.max_fraction, datamodule.ledger.anonymise)
    ledger.num_samples = len(samples)
    ledger.add(fault for found in findings for fault in found.faults)
    reasons = []
    lost = {sample.case_id for sample, found in zip(samples, findings, strict=True) if not found.usable}
    train = datamodule.splits["train"]
    if all(sample.case_id in lost for sample in train):
        reasons.append("no sample of the training split can be used")
    if len(train) * datamodule.draws_per_image < datamodule.batch_size:
        reasons.append(f"the training split gives {len(train) * datamodule.draws_per_image} samples, fewer than one "
                       f"batch of {datamodule.batch_size}")  # fmt: skip
    if ledger.num_faulty:
        say(f"faults: {ledger.num_faulty} of {len(samples)} samples. {ledger.describe()}")
        if ledger.num_faulty > ledger.limit:
            reasons.append(f"{ledger.num_faulty} faulty samples, more than the {ledger.limit:g} that are tolerated")
    else:
        say("faults: none" + ("" if deep else " in the headers; only a deep examination reads the pixels"))
    pairs = zip(samples, findings, strict=True)
    if same := copies((sample.patient_id, found.sums) for sample, found in pairs):
        reasons.append(f"{len(same)} images occur in several patients, first {' = '.join(same[0])}")
    if not datamodule.splits["val"]:
        say("note: the val split is empty")
    if isinstance(datamodule.store, ImageCache):
        say_cache(datamodule.store.estimated_bytes(datamodule.paths_in_use()), datamodule.store.folder)
    return reasons
