"""The checks of ``medmim doctor`` for images with genetics."""

from common.runtime.reporting import print_line
from datamodules.examination import Terms, look_at_all, print_splits, report_faults
from datamodules.genetics.genome import Genome
from datamodules.images.checks import check_images


def examine(name: str, genome: Genome | None, terms: Terms, deep: bool, workers: int) -> list[str]:
    """Print a report on an archive and return the reasons why training would refuse it.

    Args:
        name: Name of its layout.
        genome: Genetics of its people; None without any.
        terms: What training requires of it.
        deep: Whether to read every byte, not only headers.
        workers: Threads.
    """
    samples = terms.members
    print_splits(f"layout {name}", terms, "samples")
    if genome is not None:
        print_line(f"genetics: {genome.describe()}")
        for index, kind in enumerate(genome.kinds):
            having = sum(genome.has(sample.person)[index] for sample in samples)
            print_line(f"{kind.name}: {having} of {len(samples)} samples have it")
    else:
        print_line("genetics: none")
    found = look_at_all(
        lambda sample, whole: check_images(sample.images, sample.case_id, sample.patient_id, whole, terms.frame),
        samples,
        deep,
        workers,
    )
    return report_faults(terms, found, "samples")
