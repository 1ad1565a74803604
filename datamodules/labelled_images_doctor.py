"""What ``medmim doctor`` looks at in an archive of labelled images."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from tqdm import tqdm

from common.faults import Fault, FaultLedger
from common.reporting import say
from datamodules.cache import say_cache
from datamodules.image_cache import ImageCache
from datamodules.image_checks import check_image, copies

if TYPE_CHECKING:
    from datamodules.labelled_images import LabelledImageDataModule


def examine(datamodule: "LabelledImageDataModule", deep: bool, workers: int) -> list[str]:
    """Print a report on an archive and return the reasons why training would refuse it."""
    labels = datamodule.index()
    images = [item for part in datamodule.splits.values() for item in part]
    say(f"{labels.name}: {len(images)} images of {len({item.patient_id for item in images})} patients, "
        + ", ".join(f"{len(part)} {name}" for name, part in datamodule.splits.items()))  # fmt: skip
    for index, name in enumerate(labels.classes):
        counts = {part: Counter(item.targets[index] for item in items) for part, items in datamodule.splits.items()}
        say(f"{name}: positive " + ", ".join(f"{count[1.0]} of {count[0.0] + count[1.0]} in {part}"
                                             for part, count in counts.items()))  # fmt: skip
    with ThreadPoolExecutor(workers) as pool:
        results = pool.map(lambda item: check_image(item.image, item.case_id, deep), images)
        title = "reading every pixel" if deep else "reading headers"
        found = list(tqdm(results, total=len(images), desc=title, unit="image"))
    ledger = FaultLedger(datamodule.ledger.max_fraction, datamodule.ledger.anonymise)
    ledger.num_samples = len(images)
    ledger.add(entry for entry in found if isinstance(entry, Fault))
    reasons = []
    lost = {entry.sample for entry in found if isinstance(entry, Fault)}
    train = datamodule.splits["train"]
    if all(item.case_id in lost for item in train):
        reasons.append("no image of the training split can be used")
    if len(train) < datamodule.batch_size:
        reasons.append(f"the training split has {len(train)} images, fewer than one batch of {datamodule.batch_size}")
    if ledger.num_faulty:
        say(f"faults: {ledger.num_faulty} of {len(images)} images. {ledger.describe()}")
        if ledger.num_faulty > ledger.limit:
            reasons.append(f"{ledger.num_faulty} faulty images, more than the {ledger.limit:g} that are tolerated")
    else:
        say("faults: none" + ("" if deep else " in the headers; only a deep examination reads the pixels"))
    pairs = zip(images, found, strict=True)
    sums = [(item.patient_id, {entry: str(item.image)}) for item, entry in pairs if isinstance(entry, str) and entry]
    if same := copies(sums):
        reasons.append(f"{len(same)} images occur in several patients, first {' = '.join(same[0])}")
    if not datamodule.splits["val"]:
        say("note: the val split is empty")
    if isinstance(datamodule.store, ImageCache):
        say_cache(datamodule.store.estimated_bytes(datamodule.paths_in_use()), datamodule.store.folder)
    return reasons
