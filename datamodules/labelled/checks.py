"""What ``medmim doctor`` looks at in an archive of labelled images."""

from collections import Counter
from collections.abc import Sequence

from common.runtime.reporting import say
from datamodules.examination import Terms, judge, look_at_all, say_splits
from datamodules.images.checks import check_images


def examine(name: str, classes: Sequence[str], terms: Terms, deep: bool, workers: int) -> list[str]:
    """Print a report on an archive and return the reasons why training would refuse it.

    Args:
        name: Its layout's.
        classes: Names of the targets.
        terms: What training asks of it.
        deep: Whether to read every byte, not only headers.
        workers: Threads.
    """
    say_splits(name, terms, "images")
    for index, target in enumerate(classes):
        counts = {part: Counter(item.targets[index] for item in items) for part, items in terms.splits.items()}
        say(f"{target}: positive " + ", ".join(f"{count[1.0]} of {count[0.0] + count[1.0]} in {part}"
                                             for part, count in counts.items()))  # fmt: skip
    found = look_at_all(
        lambda item, whole: check_images([item.image], item.case_id, item.patient_id, whole),
        terms.members,
        deep,
        workers,
    )
    return judge(terms, found, "images")
