"""What ``medmim doctor`` looks at in images with genetics."""

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from tqdm import tqdm

from common.faults import Fault, FaultLedger
from common.reporting import say
from datamodules.cache import say_cache
from datamodules.image_cache import ImageCache
from datamodules.image_checks import check_image, copies

if TYPE_CHECKING:
    from datamodules.image_genome import ImageGenomeDataModule


def examine(datamodule: "ImageGenomeDataModule", deep: bool, workers: int) -> list[str]:
    """Print a report on an archive and return the reasons why training would refuse it."""
    layout = datamodule.index()
    samples = [sample for part in datamodule.splits.values() for sample in part]
    images = [(sample, path) for sample in samples for path in sample.images]
    say(f"layout {layout.name}: {len(images)} images of {len({s.patient_id for s in samples})} persons, "
        + ", ".join(f"{len(part)} {name}" for name, part in datamodule.splits.items()))  # fmt: skip
    if datamodule.genome is not None:
        say(f"genetics: {datamodule.genome.describe()}")
        for index, kind in enumerate(datamodule.genome.kinds):
            having = sum(datamodule.genome.has(sample.person)[index] for sample in samples)
            say(f"{kind.name}: {having} of {len(samples)} samples have it")
    else:
        say("genetics: none")
    with ThreadPoolExecutor(workers) as pool:
        results = pool.map(lambda entry: check_image(entry[1], entry[0].case_id, deep), images)
        title = "reading every pixel" if deep else "reading headers"
        found = list(tqdm(results, total=len(images), desc=title, unit="image"))
    ledger = FaultLedger(datamodule.ledger.max_fraction, datamodule.ledger.anonymise)
    ledger.num_samples = len(samples)
    ledger.add(entry for entry in found if isinstance(entry, Fault))
    reasons = []
    readable = {
        sample.case_id for (sample, _), entry in zip(images, found, strict=True) if not isinstance(entry, Fault)
    }
    train = datamodule.splits["train"]
    if not any(sample.case_id in readable for sample in train):
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
    pairs = zip(images, found, strict=True)
    sums = [(sample.patient_id, {entry: str(path)}) for (sample, path), entry in pairs
            if isinstance(entry, str) and entry]  # fmt: skip
    if same := copies(sums):
        reasons.append(f"{len(same)} images occur in several persons, first {' = '.join(same[0])}")
    if not datamodule.splits["val"]:
        say("note: the val split is empty")
    if isinstance(datamodule.store, ImageCache):
        say_cache(datamodule.store.estimated_bytes(datamodule.paths_in_use()), datamodule.store.folder)
    return reasons
