"""What ``medmim doctor`` checks in an archive of labelled images."""

from collections import Counter
from collections.abc import Sequence

from common.runtime.reporting import print_line
from datamodules.examination import Terms, look_at_all, print_splits, report_faults
from datamodules.images.checks import check_images


def examine(name: str, classes: Sequence[str], terms: Terms, deep: bool, workers: int) -> list[str]:
    """Print a report on an archive and return the reasons why training would refuse it.

    Args:
        name: Name of its layout.
        classes: Names of the targets.
        terms: What training requires.
        deep: Whether to read every byte, not only headers.
        workers: Threads.
    """
    print_splits(name, terms, "images")
    for index, target in enumerate(classes):
        counts = {part: Counter(item.targets[index] for item in items) for part, items in terms.splits.items()}
        print_line(f"{target}: positive " + ", ".join(f"{count[1.0]} of {count[0.0] + count[1.0]} in {part}"
                                             for part, count in counts.items()))  # fmt: skip
    found = look_at_all(
        lambda item: check_images([item.image], item.case_id, item.patient_id, deep), terms.members, deep, workers
    )
    return report_faults(terms, found, "images", deep)
