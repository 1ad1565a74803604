"""What every archive shares: loaders, faults, replacement of broken samples, and the position for resuming."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import Dataset, default_collate, get_worker_info

from common.checkpoint import read_checkpoint
from common.distributed import rank
from common.errors import DataError
from common.faults import Fault, FaultLedger, SampleFaultError
from common.pseudonyms import hide_names, names_are_hidden
from common.randomness import run_seed, stable_hash
from common.runtime.reporting import is_dry_run, print_line
from common.types import InputSpec
from datamodules.account import Account
from datamodules.configs import LoaderConfig
from datamodules.examination import Terms
from datamodules.loading import Draw, EvaluationBatches, ResumableLoader, TrainBatches
from datamodules.membership import (
    ChangedArchive,
    Membership,
    Row,
    SeenPatients,
    check_contents,
    inherited_parts,
    make_membership,
    resumed_parts,
    seen_patients,
    used_rows,
)
from datamodules.registry import NO_SETTINGS, Archive, Settings, open_archive
from datamodules.tree import Tree


class FaultTolerantDataset(Dataset):
    """Replaces a broken sample by another one, always the same.

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
            SampleFaultError: none of it can be used.
        """

    def draw_key(self, draw: Draw, train: bool) -> tuple[object, ...]:
        """Return the key that seeds a draw: from seed and epoch in training, otherwise from the subject."""
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
        first = faults[0].kind if names_are_hidden() else f"{faults[0].path}: {faults[0].detail}"
        raise DataError(f"No sample of this set can be used. First fault: {first}")


def collate_samples(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack tensors and numbers, list everything else, and join the faults."""
    batch: dict[str, Any] = {"faults": [fault for sample in samples for fault in sample.pop("faults")]}
    for name in samples[0]:
        values = [sample[name] for sample in samples]
        stackable = isinstance(values[0], torch.Tensor | int | float)
        batch[name] = default_collate(values) if stackable else values
    return batch


def check_position(position: Mapping[str, Any], batch_size: int, ranks: int) -> None:
    """Refuse to resume inside an epoch with another batch size or number of ranks.

    The consumed samples would then be different ones; at the boundary of an epoch there are none.

    Raises:
        DataError: one of them differs; names both values.
    """
    if not 0 < position["consumed"] < position.get("batches", 0):
        return
    for name, now in (("batch_size", batch_size), ("ranks", ranks)):
        if (then := position[name]) != now:
            what = "a batch size" if name == "batch_size" else "a number of ranks"
            raise DataError(f"This checkpoint lies inside an epoch, {position['consumed']} of {position['batches']} "
                            f"batches in, with {what} of {then}, not {now}: resume with {then}, or from a checkpoint "
                            f"of the end of an epoch.")  # fmt: skip


class ArchiveDataModule(pl.LightningDataModule):
    """A data module that survives broken members, counts them, and resumes inside an epoch.

    Subclasses build their data sets in ``setup`` and return loaders from :meth:`train_loader` and
    :meth:`evaluation_loader`.

    Args:
        batch_size: Samples per device.
        num_workers: Loader processes per rank.
        anonymise: Whether people, studies and files get pseudonyms in all that is printed, logged, drawn or written
            outside the cache; see :mod:`common.pseudonyms`.
        seed: Seed of order, crops and masks; None takes ``seed_everything``'s.
        loader: How samples are drawn, and how many may be faulty.
        seen_patients: How to treat validation and test patients that the encoder's pre-training has certainly seen:
            count them (``report``), leave them out (``drop``), or ``refuse`` to run.
        changed_archive: Whether to ``refuse`` to resume a run whose archive has lost or changed members since it began,
            or to continue with the present members (``use``).
        split_from: Run or checkpoint whose patients keep their split; only others are assigned anew.
    """

    #: The archive.
    root: str
    #: Settings, by dotted name, that reveal something about a person; if names are hidden, no file of a run keeps
    #: their values.
    personal: tuple[str, ...] = ()

    def __init__(
        self,
        batch_size: int = 4,
        num_workers: int = 0,
        anonymise: bool = False,
        seed: int | None = None,
        loader: LoaderConfig = LoaderConfig(),
        seen_patients: SeenPatients = "report",
        changed_archive: ChangedArchive = "refuse",
        split_from: str | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 1 or num_workers < 0:
            raise ValueError(f"`batch_size` must be at least 1 and `num_workers` at least 0, "
                             f"got {batch_size} and {num_workers}.")  # fmt: skip
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = run_seed() if seed is None else seed
        hide_names(anonymise)
        self.ledger = FaultLedger(loader.max_fault_fraction, anonymise)
        self.splits: dict[str, list[Any]] = {}
        self.store: Any = None
        self.archive: Archive | None = None
        self._train_loader: ResumableLoader | None = None
        self._loaders: list[ResumableLoader] = []
        self._position: dict[str, Any] | None = None
        self._seen_patients, self._changed_archive, self._split_from = seen_patients, changed_archive, split_from
        self._resumed: Membership | None = None
        self._earlier: Membership | None = None
        self._starts_from, self._where = False, "pre-training"
        self._placed: tuple[Sequence[Any], dict[str, str], str] | None = None
        #: Number of validation and test patients seen by earlier training, by split.
        self.seen: dict[str, dict[str, int]] = {}

    @property
    @abstractmethod
    def input_spec(self) -> InputSpec:
        """What the batches will hold; known once the root has been indexed."""

    def deliver(self, channels: Sequence[str]) -> None:
        """Deliver these channels in this order; those missing from the archive are marked absent.

        Raises:
            DataError: the channels of this archive are fixed.
        """
        given = self.input_spec.channels
        if tuple(channels) != given:
            raise DataError(f"The dataset has the channels {', '.join(given)}, not {', '.join(channels)}.")

    def recall(self, resumed: Any = None, started_from: Any = None, weights: Any = None) -> None:
        """Set the memberships of earlier runs, as stored in their checkpoints, before anything is indexed.

        Args:
            resumed: Membership of the run that is resumed.
            started_from: Membership of the run whose encoder is used.
            weights: Membership of the run whose network is evaluated.
        """
        self._resumed = Membership.read(resumed)
        self._starts_from = resumed is None and started_from is not None
        self._where = "training" if weights is not None else "pre-training"
        self._earlier = Membership.read(started_from) or Membership.read(weights)
        if self._resumed is not None:
            self._earlier = self._resumed.before

    def place(self, cases: Sequence[Any], parts: Mapping[str, str], seeded: bool, setting: object) -> dict[str, str]:
        """Return the split of every case, kept from a resumed run or from ``split_from``.

        Args:
            cases: All cases.
            parts: Their splits otherwise.
            seeded: Whether the split is seeded, not given by a file or the archive.
            setting: Description of how splits are made.

        Raises:
            DataError: the archive has changed since a resumed run began.
        """
        described = str(setting)
        if isinstance(setting, tuple):
            fractions, seed, file, *fold = setting
            described = f"shares {list(fractions)}, seed {seed}, file {file}" + (f", fold {fold}" if fold else "")
        placed = dict(parts)
        if self._resumed is not None:
            placed = resumed_parts(self._resumed, cases, described, self._changed_archive)
        elif self._split_from is not None:
            other = Membership.read(read_checkpoint(self._split_from).get("membership"))
            if other is None:
                raise DataError(f"{self._split_from} keeps no membership, so data.split_from cannot follow it.")
            placed = inherited_parts(other, cases, parts)
        elif seeded and self._starts_from and self._earlier is not None and self._earlier.same_root(self.root):
            placed = inherited_parts(self._earlier, cases, parts)
        self._placed = (cases, placed, described)
        return placed

    def sources(self, cases: Sequence[Any]) -> dict[str, tuple[str, ...]]:
        """Return the known check sums of each case's files."""
        return {}

    def resolve_membership(self) -> Membership | None:
        """Compare the members with those of earlier runs, and return them; None where nothing was placed.

        Raises:
            DataError: members have changed since a resumed run began, or patients were seen and must not be.
        """
        if self._placed is None:
            return None
        cases, parts, setting = self._placed
        rows = used_rows(cases, parts, self.splits, self.sources(cases))
        if self._resumed is not None:
            check_contents(self._resumed, rows, self._changed_archive)
        self._compare(rows)
        return make_membership(rows, self.root, setting, self.ledger.anonymise, self._earlier)

    def _compare(self, rows: Sequence[Row]) -> None:
        """Count, leave out or refuse patients that earlier training has seen."""
        if self._earlier is None:
            return
        if not self._earlier.comparable():
            print_line("note: pre-training hid its names with another key, so patients seen there are recognised by "
                "equal files alone")  # fmt: skip
        for split in ("val", "test"):
            seen = seen_patients(self._earlier, [row for row in rows if row.split == split], self.root)
            if not seen.patients:
                continue
            self.seen[split] = seen.facts()
            words = seen.words(split, self._where)
            print_line(words)
            if seen.certain and self._seen_patients == "refuse":
                raise DataError(f"{words}: set data.seen_patients to drop to leave them out, or to report.")
            if seen.certain and self._seen_patients == "drop":
                kept = [case for case in self.splits[split] if case.patient_id not in seen.certain]
                print_line(f"{len(self.splits[split]) - len(kept)} {split} cases are left out (data.seen_patients)")
                self.splits[split] = kept

    @abstractmethod
    def examine(self, deep: bool, workers: int) -> list[str]:
        """Print a report on the archive and return the reasons why training would refuse it.

        Args:
            deep: Whether to read every byte, not only headers.
            workers: Threads.
        """

    #: User of the archive in error messages; the commands set the experiment's name.
    purpose = "this experiment"

    @property
    def needs(self) -> frozenset[str]:
        """What an archive must provide, from :data:`datamodules.registry.VOCABULARY`."""
        return frozenset()

    @property
    def optional(self) -> tuple[str, ...]:
        """What is needed of a layout, but may be missing from an archive of it."""
        return ("genetics", "masks", "targets")

    @abstractmethod
    def used_files(self) -> Iterable[tuple[str, Path]]:
        """Yield the kind and path of the used files; known once the root has been indexed."""

    def open(self, root: str | Path | Tree, layout: str = "auto", settings: Settings = NO_SETTINGS) -> Archive:
        """Recognise the archive and list its samples.

        Raises:
            DataError: unknown layout, missing kinds of data, or too many files without a place.
        """
        archive = open_archive(root, layout, self.needs, self.purpose, settings, self.optional)
        Account(archive).check()
        for note in archive.notes:
            print_line(f"note: {note}")
        return archive

    def keep_account(self, stage: str) -> None:
        """In training, print the account of the archive's files and save it with the run."""
        if stage != "fit" or self.archive is None:
            return
        account = Account(self.archive, self.used_files())
        for line in account.lines():
            print_line(line)
        trainer = self.trainer
        if trainer is not None and trainer.is_global_zero and not is_dry_run(trainer):
            account.write(Path(trainer.default_root_dir) / "account.csv", examples=not self.ledger.anonymise)

    def terms(self, cached: Sequence[Any], draws: int = 1) -> Terms:
        """Return what training requires of the archive, for the doctor.

        Args:
            cached: Files that the cache would be built from.
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
        """Yield batches with at least ``count`` training samples, drawn and cut like validation samples."""

    def _ranks(self) -> tuple[int, int]:
        trainer = self.trainer
        return (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)

    def _pin_memory(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

    def train_loader(self, dataset: FaultTolerantDataset, draws: int) -> ResumableLoader:
        """Make the training loader, at the position from a checkpoint."""
        self.ledger.check()
        global_rank, world_size = self._ranks()
        batches = TrainBatches(len(dataset), draws, self.batch_size, global_rank, world_size, self.seed)
        loader = self._make_loader(dataset, batches)
        if self._position is not None:
            check_position(self._position, self.batch_size, world_size)
            loader.load_state_dict(self._position)
        self._train_loader = loader
        return loader

    def evaluation_loader(
        self, dataset: FaultTolerantDataset, draws: int = 1, batch_size: int | None = None, all_ranks: bool = True
    ) -> ResumableLoader:
        """Make a loader that reads everything once, divided among the ranks."""
        global_rank, world_size = self._ranks() if all_ranks else (0, 1)
        batches = EvaluationBatches(len(dataset), draws, batch_size or self.batch_size, global_rank, world_size)
        return self._make_loader(dataset, batches)

    def collate_function(self) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Return the collate function."""
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
        """Move the faults of a batch into the ledger (Lightning hook)."""
        if isinstance(batch, dict):
            self.ledger.add(batch.pop("faults", []))
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the training loader (Lightning hook)."""
        if self._train_loader is None:
            return {}
        sizes = {"batch_size": self.batch_size, "ranks": self._ranks()[1], "batches": len(self._train_loader)}
        return {**self._train_loader.state_dict(), **sizes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the position for the training loader, which is created later (Lightning hook)."""
        self._position = state_dict if "consumed" in state_dict else None
