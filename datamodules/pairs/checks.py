"""What ``medmim doctor`` looks at in an archive of images with a text each."""

from collections import Counter
from typing import TYPE_CHECKING

from common.faults import Fault
from common.runtime.reporting import say
from datamodules.examination import Member, judge, look_at_all
from datamodules.images.checks import check_images

if TYPE_CHECKING:
    from datamodules.pairs.datamodule import Pair, PairDataModule


def examine(datamodule: "PairDataModule", deep: bool, workers: int) -> list[str]:
    """Print a report on an archive and return the reasons why training would refuse it."""
    name = datamodule.index()
    pairs, paths = datamodule.all_cases(), datamodule.paths_in_use()
    sizes = ", ".join(f"{len(part)} {split}" for split, part in datamodule.splits.items())
    say(f"{name}: {len(pairs)} {datamodule.noun} of {len(paths)} images, {sizes}{datamodule.describe()}")
    images = look_at_all(lambda path: check_images([path], str(path), str(path), deep), paths, deep, workers)
    by_path = dict(zip(paths, images, strict=True))
    train = datamodule.splits["train"]
    seen, read = {pair.image for pair in train}, {pair.text for pair in train}
    for split in ("val", "test"):
        part = datamodule.splits[split]
        shared = Counter((pair.image in seen, pair.text in read) for pair in part)
        if part:
            say(f"{split}: {shared[True, True] + shared[True, False]} of {len(part)} show a training image, "
                f"{shared[True, True] + shared[False, True]} have a text that occurs in training")  # fmt: skip
    found = [_member(pair, by_path[pair.image]) for pair in pairs]
    return judge(datamodule, found, datamodule.noun, deep, paths)


def _member(pair: "Pair", image: Member) -> Member:
    """Return what is wrong with a pair; images are shared, so they are nobody's copies."""
    faults = [fault._replace(sample=pair.case_id) for fault in image.faults]
    if not pair.text:
        faults.append(Fault(pair.case_id, "empty", "no text", pair.case_id))
    return Member(pair.case_id, pair.case_id, faults, usable=image.usable and bool(pair.text))
