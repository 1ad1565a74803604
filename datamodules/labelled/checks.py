"""What ``medmim doctor`` looks at in an archive of labelled images."""

from collections import Counter
from typing import TYPE_CHECKING

from common.runtime.reporting import say
from datamodules.examination import judge, look_at_all, say_splits
from datamodules.images.checks import check_images

if TYPE_CHECKING:
    from datamodules.labelled.classification import LabelledImageDataModule


def examine(datamodule: "LabelledImageDataModule", deep: bool, workers: int) -> list[str]:
    """Print a report on an archive and return the reasons why training would refuse it."""
    labels = datamodule.index()
    images = [item for part in datamodule.splits.values() for item in part]
    say_splits(labels.name, datamodule, "images")
    for index, name in enumerate(labels.classes):
        counts = {part: Counter(item.targets[index] for item in items) for part, items in datamodule.splits.items()}
        say(f"{name}: positive " + ", ".join(f"{count[1.0]} of {count[0.0] + count[1.0]} in {part}"
                                             for part, count in counts.items()))  # fmt: skip
    found = look_at_all(
        lambda item: check_images([item.image], item.case_id, item.patient_id, deep), images, deep, workers
    )
    return judge(datamodule, found, "images", deep, datamodule.paths_in_use())
