"""What all archives of 2D images share: the store, splits, faults and loaders."""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from common.errors import DataError
from common.faults import Fault
from common.runtime.reporting import print_line
from datamodules.base import ArchiveDataModule, FaultTolerantDataset
from datamodules.configs import CacheConfig, ImageConfig, LoaderConfig
from datamodules.images.cache import ImageCache, SourceImages
from datamodules.images.reading import ImageReader
from datamodules.loading import ResumableLoader
from datamodules.notes import print_notes
from datamodules.splits import SPLITS


class ImageArchiveDataModule(ArchiveDataModule):
    """Cases with images, cached, in three splits. Subclasses list cases in ``index`` and cut them in ``_dataset``.

    A case has ``case_id`` and ``patient_id``; :meth:`images_of` returns its images.

    Args:
        root: The archive.
        image: How crops are cut.
        cache: The cache of images.
        loader: How samples are drawn, and how many may be faulty.
        **settings: Those of :class:`datamodules.base.ArchiveDataModule`.
    """

    #: Opens the images; created when they are listed.
    store: ImageCache | SourceImages
    #: Plural name of the cases in messages.
    item_name = "samples"
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
        self.draws_per_image = loader.draws

    @abstractmethod
    def index(self) -> Any:
        """List and split the cases, once; sets ``splits``, ``store`` and the ledger's count."""

    @abstractmethod
    def images_of(self, case: Any) -> Sequence[Path]:
        """Return the images of a case."""

    @abstractmethod
    def _dataset(self, cases: Sequence[Any], train: bool = False) -> FaultTolerantDataset:
        """Return a data set of cases."""

    def _evaluated(self, cases: Sequence[Any]) -> FaultTolerantDataset:
        """Return the data set for validation or testing."""
        return self._dataset(cases)

    def make_store(self, reader: ImageReader) -> ImageCache | SourceImages:
        """Return the store that opens the archive's images, once they are listed and split.

        Raises:
            DataError: more than a few images are links without content.
        """
        if self._cache == "none":
            return SourceImages(reader)
        return ImageCache(Path(self.root).expanduser(), self._cache_side, reader=reader)

    def member_paths(self, case: Any) -> Sequence[Path]:
        """Return the images of a case as listed in the archive, before cases are joined or paired."""
        return self.images_of(case)

    def sources(self, cases: Sequence[Any]) -> dict[str, tuple[str, ...]]:
        """Return the check sums of each case's images; unknown without a cache."""
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
        self.store.ensure(self.paths_in_use(), max(self.num_workers, 1))
        print_notes()

    def known_faults(self) -> list[Fault]:
        """Return faults of the cases in use that are known before any file is read."""
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

    def register_faults(self, stage: str) -> str:
        """Record broken files in the ledger, and return the number of cases per split.

        Raises:
            DataError: no case can be used.
        """
        self.index()
        self.ledger.add(self.known_faults())
        if not any(self._usable(part) for part in self.splits.values()):
            raise DataError(f"None of the {self.ledger.num_samples} {self.item_name} under {self.root} can be used. "
                            f"{self.ledger.describe()}")  # fmt: skip
        if stage == "fit" and not self.splits["val"]:
            print_line("note: the val split is empty, so nothing will be measured and there will be no best checkpoint")
        self.keep_account(stage)
        return ", ".join(f"{len(part)} {name}" for name, part in self.splits.items() if part)

    def _usable(self, cases: Iterable[Any]) -> list[Any]:
        """Leave out cases known to be broken: evaluation does not replace them."""
        bad = {fault.sample for fault in self.ledger.faults}
        return [case for case in cases if case.case_id not in bad]

    def train_dataloader(self) -> ResumableLoader:
        """Return the training cases, broken ones replaced (Lightning hook)."""
        return self.train_loader(self._dataset(self.splits["train"], train=True), self.draws_per_image)

    def val_dataloader(self) -> ResumableLoader:
        """Return the validation cases, the same in every epoch and run (Lightning hook)."""
        return self.evaluation_loader(self._evaluated(self._usable(self.splits["val"])))

    def test_cases(self) -> list[Any]:
        """Return the test cases.

        Raises:
            DataError: the split is empty.
        """
        cases = self._usable(self.splits[self.test_split])
        if not cases:
            raise DataError(f"There is nothing to test on under {self.root}: the {self.test_split} split is empty.")
        return cases

    def test_dataloader(self) -> ResumableLoader:
        """Return the test cases, cut like those of validation (Lightning hook).

        Raises:
            DataError: the split is empty.
        """
        return self.evaluation_loader(self._evaluated(self.test_cases()))

    def _moved(self, loader: ResumableLoader) -> Iterable[Any]:
        """Yield a loader's batches outside the trainer's loops, without their faults."""
        for batch in loader:
            yield self.on_before_batch_transfer(batch, 0)

    def reference_samples(self, count: int) -> Iterable[Any]:
        """Yield batches with at least ``count`` training cases, cut like validation cases."""
        cases = self._usable(self.splits["train"])
        dataset = self._dataset(cases[:: max(len(cases) // max(count, 1), 1)])
        return self._moved(self.evaluation_loader(dataset, -(-count // max(len(dataset), 1)), all_ranks=False))

    def central_samples(self, splits: Sequence[str] = SPLITS) -> Iterable[Any]:
        """Yield batches with the central cut of each case of some splits, for probes and embeddings."""
        cases = [case for part in splits for case in self._usable(self.splits[part]) if self.images_of(case)]
        return self._moved(self.evaluation_loader(self._dataset(cases), all_ranks=False))
