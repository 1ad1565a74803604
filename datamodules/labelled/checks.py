"""What ``medmim doctor`` checks in an archive of labelled images."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from common.runtime.reporting import print_line
from datamodules.examination import Member, Terms, look_at_all, print_splits, report_faults
from datamodules.images.checks import check_images


def examine(name: str, classes: Sequence[str], terms: Terms, deep: bool, workers: int) -> list[str]:
    """Print a report on an archive and return the reasons why training would refuse it; ``deep`` reads every byte."""
    print_splits(name, terms, "images")
    for index, target in enumerate(classes):
        counts = {part: Counter(item.targets[index] for item in items) for part, items in terms.splits.items()}
        print_line(f"{target}: positive " + ", ".join(f"{count[1.0]} of {count[0.0] + count[1.0]} in {part}"
                                             for part, count in counts.items()))  # fmt: skip

    def look_at(item: Any, whole: bool) -> Member:
        return check_images([item.image], item.case_id, item.patient_id, whole)

    return report_faults(terms, look_at_all(look_at, terms.members, deep, workers), "images")
