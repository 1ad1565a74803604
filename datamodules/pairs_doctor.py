"""What ``medmim doctor`` looks at in an archive of images with a text each."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from tqdm import tqdm

from common.faults import Fault, FaultLedger
from common.reporting import say
from datamodules.cache import say_cache
from datamodules.image_cache import ImageCache
from datamodules.image_checks import check_image

if TYPE_CHECKING:
    from datamodules.pairs import PairDataModule


def examine(datamodule: "PairDataModule", deep: bool, workers: int) -> list[str]:
    """Print a report on an archive and return the reasons why training would refuse it."""
    name = datamodule.index()
    pairs = datamodule.all_cases()
    sizes = ", ".join(f"{len(part)} {split}" for split, part in datamodule.splits.items())
    say(f"{name}: {len(pairs)} {datamodule.noun} of {len(datamodule.paths_in_use())} images, {sizes}"
        f"{datamodule.describe()}")  # fmt: skip
    paths = datamodule.paths_in_use()
    with ThreadPoolExecutor(workers) as pool:
        results = pool.map(lambda path: check_image(path, str(path), deep), paths)
        title = "reading every pixel" if deep else "reading headers"
        found = dict(zip(paths, tqdm(results, total=len(paths), desc=title, unit="image"), strict=True))
    ledger = FaultLedger(datamodule.ledger.max_fraction, datamodule.ledger.anonymise)
    ledger.num_samples = len(pairs)
    faults = {path: entry for path, entry in found.items() if isinstance(entry, Fault)}
    ledger.add(faults[pair.image]._replace(sample=pair.case_id) for pair in pairs if pair.image in faults)
    ledger.add(Fault(pair.case_id, "empty", "no text", pair.case_id) for pair in pairs if not pair.text)
    reasons = []
    train = datamodule.splits["train"]
    if all(pair.image in faults or not pair.text for pair in train):
        reasons.append("no sample of the training split can be used")
    if len(train) < datamodule.batch_size:
        reasons.append(f"the training split has {len(train)} {datamodule.noun}, fewer than one batch of "
                       f"{datamodule.batch_size}")  # fmt: skip
    if ledger.num_faulty:
        say(f"faults: {ledger.num_faulty} of {len(pairs)} {datamodule.noun}. {ledger.describe()}")
        if ledger.num_faulty > ledger.limit:
            reasons.append(f"{ledger.num_faulty} faulty {datamodule.noun}, more than the {ledger.limit:g} tolerated")
    else:
        say("faults: none" + ("" if deep else " in the headers; only a deep examination reads the pixels"))
    in_training = {pair.image for pair in train}
    texts = {pair.text for pair in train}
    for split in ("val", "test"):
        part = datamodule.splits[split]
        shared = Counter((pair.image in in_training, pair.text in texts) for pair in part)
        if part:
            say(f"{split}: {shared[True, True] + shared[True, False]} of {len(part)} show a training image, "
                f"{shared[True, True] + shared[False, True]} have a text that occurs in training")  # fmt: skip
    if isinstance(datamodule.store, ImageCache):
        say_cache(datamodule.store.estimated_bytes(paths), datamodule.store.folder)
    return reasons
