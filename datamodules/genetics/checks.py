"""What ``medmim doctor`` looks at in images with genetics."""

from typing import TYPE_CHECKING

from common.runtime.reporting import say
from datamodules.examination import judge, look_at_all, say_splits
from datamodules.images.checks import check_images

if TYPE_CHECKING:
    from datamodules.genetics.datamodule import ImageGenomeDataModule


def examine(datamodule: "ImageGenomeDataModule", deep: bool, workers: int) -> list[str]:
    """Print a report on an archive and return the reasons why training would refuse it."""
    layout = datamodule.index()
    samples = [sample for part in datamodule.splits.values() for sample in part]
    say_splits(f"layout {layout.name}", datamodule, "samples")
    if datamodule.genome is not None:
        say(f"genetics: {datamodule.genome.describe()}")
        for index, kind in enumerate(datamodule.genome.kinds):
            having = sum(datamodule.genome.has(sample.person)[index] for sample in samples)
            say(f"{kind.name}: {having} of {len(samples)} samples have it")
    else:
        say("genetics: none")
    found = look_at_all(
        lambda sample: check_images(sample.images, sample.case_id, sample.patient_id, deep), samples, deep, workers
    )
    return judge(datamodule, found, "samples", deep, datamodule.paths_in_use(), datamodule.draws_per_image)
