"""What every archive shares: loaders, faults, replacement of broken samples, and the position for resuming."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import Dataset, default_collate, get_worker_info

from common.distributed import rank
from common.errors import DataError
from common.faults import Fault, FaultLedger, SampleFaultError
from common.randomness import run_seed, stable_hash
from common.runtime.reporting import is_dry_run, say
from common.types import InputSpec
from datamodules.account import Account
from datamodules.examination import Terms
from datamodules.loading import Draw, EvaluationBatches, ResumableLoader, TrainBatches
from datamodules.registry import NO_SETTINGS, Archive, Settings, open_archive
from datamodules.tree import Tree


class FaultTolerantDataset(Dataset):
    """Replaces a broken sample by another one, the same one every time.

    Subclasses implement :meth:`read`; each item carries the faults met on the way under ``"faults"``.

    Args:
        seed: Seed of the replacement.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def subject(self, index: int) -> str:
        """Return the subject's name."""

    @abstractmethod
    def read(self, draw: Draw) -> dict[str, Any]:
        """Return one item; may list member faults under ``"faults"``.

        Raises:
            SampleFaultError: nothing of it can be used.
        """

    def draw_key(self, draw: Draw, train: bool) -> tuple[object, ...]:
        """Return the key that seeds a draw: in training of the run's seed and the epoch, else of the subject alone."""
        subject = self.subject(draw.index)
        return ("train", self.seed, draw.epoch, subject, draw.draw) if train else ("val", subject, draw.draw)

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        faults: list[Fault] = []
        index = draw.index
        for attempt in range(1, 2 * len(self) + 8):
            try:
                item = self.read(replace(draw, index=index))
            except SampleFaultError as error:
                faults += error.faults
                parts = ("substitute", self.seed, draw.epoch, self.subject(draw.index), draw.draw, attempt)
                index = stable_hash(*parts) % len(self)
                continue
            worker = get_worker_info()
            place = {"rank": rank(), "worker": -1 if worker is None else worker.id}
            item["faults"] = [fault._replace(**place) for fault in [*faults, *item.get("faults", [])]]
            return item
        raise DataError(f"No sample of this set can be used. First fault: {faults[0].path}: {faults[0].detail}")


def collate_samples(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack tensors and numbers, list the rest, join the faults."""
    batch: dict[str, Any] = {"faults": [fault for sample in samples for fault in sample.pop("faults")]}
    for name in samples[0]:
        values = [sample[name] for sample in samples]
        stackable = isinstance(values[0], torch.Tensor | int | float)
        batch[name] = default_collate(values) if stackable else values
    return batch


class ArchiveDataModule(pl.LightningDataModule):
    """A data module that survives broken members, counts them, and resumes inside an epoch.

    Subclasses build their data sets in ``setup`` and return loaders from :meth:`train_loader` and
    :meth:`evaluation_loader`.

    Args:
        batch_size: Samples per device.
        num_workers: Loader processes per rank.
        max_fault_fraction: Share of faulty samples at which training stops (never fewer than 5 samples).
        anonymise: Whether subject ids are replaced by pseudonyms in logs, pictures and fault files.
        seed: Seed of order, crops and masks; None takes ``seed_everything``'s.
    """

    def __init__(
        self,
        batch_size: int = 4,
        num_workers: int = 0,
        max_fault_fraction: float = 0.01,
        anonymise: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 1 or num_workers < 0:
            raise ValueError(f"`batch_size` must be at least 1 and `num_workers` at least 0, "
                             f"got {batch_size} and {num_workers}.")  # fmt: skip
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = run_seed() if seed is None else seed
        self.ledger = FaultLedger(max_fault_fraction, anonymise)
        self.splits: dict[str, list[Any]] = {}
        self.store: Any = None
        self.archive: Archive | None = None
        self._train_loader: ResumableLoader | None = None
        self._loaders: list[ResumableLoader] = []
        self._position: dict[str, int] | None = None

    @property
    @abstractmethod
    def input_spec(self) -> InputSpec:
        """What the batches will hold; known once the root has been indexed."""

    def deliver(self, channels: Sequence[str]) -> None:
        """Give batches these channels in this order; those that the archive lacks are fed as absent.

        Raises:
            DataError: the channels of this archive are fixed.
        """
        given = self.input_spec.channels
        if tuple(channels) != given:
            raise DataError(f"The data give the channels {', '.join(given)}, not {', '.join(channels)}.")

    @abstractmethod
    def examine(self, deep: bool, workers: int) -> list[str]:
        """Print a report on the archive and return the reasons why training would refuse it.

        Args:
            deep: Whether to read every byte, not only headers.
            workers: Threads.
        """

    #: Who uses the archive, for refusals; the commands put the experiment's name here.
    purpose = "this experiment"

    @property
    def needs(self) -> frozenset[str]:
        """What an archive must give, of :data:`datamodules.registry.VOCABULARY`."""
        return frozenset()

    @abstractmethod
    def used_files(self) -> Iterable[tuple[str, Path]]:
        """Yield the archive's files that are used, each with what it is; known once the root has been indexed."""

    def open(self, root: str | Path | Tree, layout: str = "auto", settings: Settings = NO_SETTINGS) -> Archive:
        """Recognise the archive and list what it holds.

        Raises:
            DataError: it is of no known layout, lacks what is needed, or too many of its files have no place.
        """
        archive = open_archive(root, layout, self.needs, self.purpose, settings)
        Account(archive).check()
        for note in archive.notes:
            say(f"note: {note}")
        return archive

    def keep_account(self, stage: str) -> None:
        """When training: print what became of the archive's files, and keep it with the run."""
        if stage != "fit" or self.archive is None:
            return
        account = Account(self.archive, self.used_files())
        for line in account.lines():
            say(line)
        trainer = self.trainer
        if trainer is not None and trainer.is_global_zero and not is_dry_run(trainer):
            account.write(Path(trainer.default_root_dir) / "account.csv", examples=not self.ledger.anonymise)

    def terms(self, cached: Sequence[Any], draws: int = 1) -> Terms:
        """Return what training asks of the archive, for its doctor.

        Args:
            cached: What the cache would be made of.
            draws: Training samples that a member gives per epoch.
        """
        cache = None
        if hasattr(self.store, "estimated_bytes"):
            cache = (self.store.estimated_bytes(cached), self.store.folder)
        settings = (self.batch_size, draws, self.ledger.max_fraction, self.ledger.anonymise)
        account = Account(self.archive, self.used_files()).lines() if self.archive is not None else []
        return Terms(self.splits, *settings, cache, account)

    @abstractmethod
    def reference_samples(self, count: int) -> Iterable[Any]:
        """Yield batches with at least ``count`` training samples, drawn and cut as validation samples are."""

    def _ranks(self) -> tuple[int, int]:
        trainer = self.trainer
        return (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)

    def _pin_memory(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

    def train_loader(self, dataset: FaultTolerantDataset, draws: int) -> ResumableLoader:
        """Make the training loader, at the position a checkpoint gave."""
        self.ledger.check()
        global_rank, world_size = self._ranks()
        batches = TrainBatches(len(dataset), draws, self.batch_size, global_rank, world_size, self.seed)
        loader = self._make_loader(dataset, batches)
        if self._position is not None:
            loader.load_state_dict(self._position)
        self._train_loader = loader
        return loader

    def evaluation_loader(
        self, dataset: FaultTolerantDataset, draws: int = 1, batch_size: int | None = None, all_ranks: bool = True
    ) -> ResumableLoader:
        """Make a loader that reads everything once, shared out over the ranks."""
        global_rank, world_size = self._ranks() if all_ranks else (0, 1)
        batches = EvaluationBatches(len(dataset), draws, batch_size or self.batch_size, global_rank, world_size)
        return self._make_loader(dataset, batches)

    def collate_function(self) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Return what makes a batch from samples."""
        return collate_samples

    def _make_loader(self, dataset: FaultTolerantDataset, batches: TrainBatches | EvaluationBatches) -> ResumableLoader:
        loader = ResumableLoader(dataset, batches, self.collate_function(), self.num_workers, self._pin_memory())
        self._loaders.append(loader)
        return loader

    def teardown(self, stage: str) -> None:
        """Stop the loaders' workers (Lightning hook)."""
        for loader in self._loaders:
            loader.close()
        self._loaders = []

    def on_exception(self, exception: BaseException) -> None:
        """Stop the loaders' workers (Lightning hook)."""
        self.teardown("exception")

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Take the faults out of a batch and into the ledger (Lightning hook)."""
        if isinstance(batch, dict):
            self.ledger.add(batch.pop("faults", []))
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the training loader (Lightning hook)."""
        return {} if self._train_loader is None else dict(self._train_loader.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the position for the training loader, which is made later (Lightning hook)."""
        self._position = state_dict if "consumed" in state_dict else None
