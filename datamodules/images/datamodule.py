"""What every archive of 2D images shares: one store, splits, what is broken, and the loaders."""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from common.errors import DataError
from common.faults import Fault
from common.runtime.reporting import say
from datamodules.base import ArchiveDataModule, FaultTolerantDataset
from datamodules.configs import CacheConfig, ImageConfig, LoaderConfig
from datamodules.images.cache import ImageCache, SourceImages
from datamodules.images.reading import ImageReader
from datamodules.loading import ResumableLoader
from datamodules.notes import say_notes
from datamodules.splits import SPLITS
from datamodules.storage import usable_cores


class ImageArchiveDataModule(ArchiveDataModule):
    """Cases with images, cached, in three splits. Subclasses list cases in ``index`` and cut them in ``_dataset``.

    A case has ``case_id`` and ``patient_id``; where its images lie is for :meth:`images_of` to say.

    Args:
        root: The archive.
        image: What is cut.
        cache: Copies that are kept.
        loader: How samples are drawn, and how many may be broken.
        **settings: Those of :class:`datamodules.base.ArchiveDataModule`.
    """

    #: Opens the images; made when they are listed.
    store: ImageCache | SourceImages
    #: What the cases are called.
    noun = "samples"
    #: Split that ``lightning test`` reads.
    test_split = "test"

    def __init__(
        self,
        root: str,
        image: ImageConfig,
        cache: CacheConfig,
        loader: LoaderConfig,
        **settings: Any,
    ) -> None:
        super().__init__(loader=loader, **settings)
        self.root, self.image_size = root, tuple(image.size)
        self.mean, self.std = image.mean, image.std
        self._cache, self._cache_side = cache.format, cache.side
        self.cache_check = cache.check
        self.draws_per_image = loader.draws

    @abstractmethod
    def index(self) -> Any:
        """List and split the cases, once; sets ``splits``, ``store`` and the ledger's count."""

    @abstractmethod
    def images_of(self, case: Any) -> Sequence[Path]:
        """Return the images of a case."""

    @abstractmethod
    def _dataset(self, cases: Sequence[Any], train: bool = False) -> FaultTolerantDataset:
        """Make a data set of cases."""

    def _evaluated(self, cases: Sequence[Any]) -> FaultTolerantDataset:
        """Make the data set that is validated or tested on."""
        return self._dataset(cases)

    def make_store(self, reader: ImageReader) -> ImageCache | SourceImages:
        """Return what opens the archive's images, once they are listed and split.

        Raises:
            DataError: more than a few of them are links without content.
        """
        if self._cache == "none":
            return SourceImages(reader)
        return ImageCache(Path(self.root).expanduser(), self._cache_side, reader=reader)

    def member_paths(self, case: Any) -> Sequence[Path]:
        """Return the images of a case as the archive lists it, before cases are joined or paired."""
        return self.images_of(case)

    def sources(self, cases: Sequence[Any]) -> dict[str, tuple[str, ...]]:
        """Return the check sums of the images of each case; without a cache none is known."""
        if not isinstance(self.store, ImageCache):
            return {}
        known = self.store.check_sums()
        return {
            case.case_id: tuple(sorted(known[path] for path in self.member_paths(case) if path in known))
            for case in cases
        }

    def cases_in_use(self) -> list[Any]:
        """Return the cases of all splits."""
        return [case for part in self.splits.values() for case in part]

    def all_cases(self) -> list[Any]:
        """Return every case of the archive, whether or not it is used."""
        self.index()
        return self.cases_in_use()

    def paths_in_use(self) -> list[Path]:
        """Return the images of all splits, each once."""
        return list(dict.fromkeys(path for case in self.cases_in_use() for path in self.images_of(case)))

    def prepare_data(self) -> None:
        """Build and verify the cache, once per machine (Lightning hook)."""
        self.index()
        self.store.ensure(self.paths_in_use(), self.cache_threads or usable_cores(), check=self.cache_check)
        say_notes()

    def drawn_from(self, owner: Any) -> list[int]:
        """Return the training subjects whose samples come from an image."""
        return [index for index, case in enumerate(self.splits["train"]) if owner in self.images_of(case)]

    def rebuild(self, owner: Any) -> None:
        """Make the copy of an image again."""
        self.store.build(owner)  # type: ignore[union-attr]

    def known_faults(self) -> list[Fault]:
        """Return what is known to be wrong with the cases in use, before any is read."""
        known = self.store.faults() if isinstance(self.store, ImageCache) else {}
        return [
            known[path]._replace(sample=case.case_id)
            for case in self.cases_in_use()
            for path in self.images_of(case)
            if path in known
        ]

    def used_files(self) -> Iterable[tuple[str, Path]]:
        """Yield the images of all splits."""
        return (("image", path) for path in self.paths_in_use())

    def admit(self, stage: str) -> str:
        """Put what is broken into the ledger, and return how many cases each split has.

        Raises:
            DataError: no case can be used.
        """
        self.index()
        self.ledger.add(self.known_faults())
        if not any(self._usable(part) for part in self.splits.values()):
            raise DataError(f"None of the {self.ledger.num_samples} {self.noun} under {self.root} can be used. "
                            f"{self.ledger.describe()}")  # fmt: skip
        if stage == "fit" and not self.splits["val"]:
            say("note: the val split is empty, so nothing will be measured and there will be no best checkpoint")
        self.keep_account(stage)
        return ", ".join(f"{len(part)} {name}" for name, part in self.splits.items() if part)

    def _usable(self, cases: Iterable[Any]) -> list[Any]:
        """Leave out cases known to be broken: evaluation replaces nothing."""
        bad = {fault.sample for fault in self.ledger.faults}
        return [case for case in cases if case.case_id not in bad]

    def train_dataloader(self) -> ResumableLoader:
        """Return the training cases, broken ones replaced (Lightning hook)."""
        return self.train_loader(self._dataset(self.splits["train"], train=True), self.draws_per_image)

    def val_dataloader(self) -> ResumableLoader:
        """Return the validation cases, the same in every epoch and run (Lightning hook)."""
        return self.validation_loader(self._evaluated(self._usable(self.splits["val"])))

    def test_cases(self) -> list[Any]:
        """Return the cases to test on.

        Raises:
            DataError: there is none.
        """
        cases = self._usable(self.splits[self.test_split])
        if not cases:
            raise DataError(f"There is nothing to test on under {self.root}: the {self.test_split} split is empty.")
        return cases

    def test_dataloader(self) -> ResumableLoader:
        """Return the test cases, cut as those of validation (Lightning hook).

        Raises:
            DataError: there is none.
        """
        return self.evaluation_loader(self._evaluated(self.test_cases()))

    def _moved(self, loader: ResumableLoader) -> Iterable[Any]:
        """Yield a loader's batches outside of any loop of the trainer's, their faults taken out."""
        for batch in loader:
            yield self.on_before_batch_transfer(batch, 0)

    def reference_samples(self, count: int) -> Iterable[Any]:
        """Yield batches with at least ``count`` training cases, cut as validation cases are."""
        cases = self._usable(self.splits["train"])
        dataset = self._dataset(cases[:: max(len(cases) // max(count, 1), 1)])
        return self._moved(self.evaluation_loader(dataset, -(-count // max(len(dataset), 1)), all_ranks=False))

    def central_samples(self, splits: Sequence[str] = SPLITS) -> Iterable[Any]:
        """Yield batches with the central cut of every case of some splits, for probes and embeddings."""
        cases = [case for part in splits for case in self._usable(self.splits[part]) if self.images_of(case)]
        return self._moved(self.evaluation_loader(self._dataset(cases), all_ranks=False))
