"""The checks of ``medmim doctor`` for archives of images with one text each."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.faults import Fault
from common.runtime.reporting import print_line
from datamodules.examination import Member, Terms, look_at_all, report_faults
from datamodules.images.checks import check_images


def examine(
    name: str, item_name: str, paths: Sequence[Path], terms: Terms, deep: bool, workers: int, more: str = ""
) -> list[str]:
    """Print a report on an archive, and ``more``, and return the reasons why training would refuse it.

    ``paths`` are the images in use, each once; with ``deep`` every byte is read, not only headers.
    """
    sizes = ", ".join(f"{len(part)} {split}" for split, part in terms.splits.items())
    print_line(f"{name}: {len(terms.members)} {item_name} of {len(paths)} images, {sizes}{more}")
    images = look_at_all(lambda path, whole: check_images([path], str(path), str(path), whole), paths, deep, workers)
    by_path = dict(zip(paths, images, strict=True))
    train = terms.splits["train"]
    seen, read = {pair.image for pair in train}, {pair.text for pair in train}
    for split in ("val", "test"):
        part = terms.splits[split]
        shared = Counter((pair.image in seen, pair.text in read) for pair in part)
        if part:
            print_line(f"{split}: {shared[True, True] + shared[True, False]} of {len(part)} show a training image, "
                f"{shared[True, True] + shared[False, True]} have a text that occurs in training")  # fmt: skip
    found = [_member(pair, by_path[pair.image]) for pair in terms.members]
    return report_faults(terms, found, item_name)


def _member(pair: Any, image: Member) -> Member:
    """Return what is wrong with a pair; images are shared, so they are nobody's copies."""
    faults = [fault._replace(sample=pair.case_id) for fault in image.faults]
    if not pair.text:
        faults.append(Fault(pair.case_id, "empty", "no text", pair.case_id))
    usable = image.usable and bool(pair.text)
    return Member(pair.case_id, pair.case_id, faults, usable=usable, whole=image.whole)
