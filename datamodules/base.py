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
from common.runtime.reporting import is_dry_run, say
from common.types import InputSpec
from datamodules.account import Account
from datamodules.checking import BackgroundCheck, CacheCheck
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
        first = faults[0].kind if names_are_hidden() else f"{faults[0].path}: {faults[0].detail}"
        raise DataError(f"No sample of this set can be used. First fault: {first}")


def collate_samples(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack tensors and numbers, list the rest, join the faults."""
    batch: dict[str, Any] = {"faults": [fault for sample in samples for fault in sample.pop("faults")]}
    for name in samples[0]:
        values = [sample[name] for sample in samples]
        stackable = isinstance(values[0], torch.Tensor | int | float)
        batch[name] = default_collate(values) if stackable else values
    return batch


def check_position(position: Mapping[str, Any], batch_size: int, ranks: int) -> None:
    """Refuse to go on in the middle of an epoch with batches of another size, or on another number of ranks.

    Which samples were consumed would then be another question; at the boundary of an epoch nothing is.

    Raises:
        DataError: with both values.
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
        anonymise: Whether persons, studies and files have pseudonyms in all that is printed, logged, drawn or written
            outside the cache; see :mod:`common.pseudonyms`.
        seed: Seed of order, crops and masks; None takes ``seed_everything``'s.
        loader: How samples are drawn, and how many may be broken.
        seen_patients: What becomes of validation and test patients that the pre-training of the encoder has certainly
            seen: they are counted (``report``), left out (``drop``), or a reason to ``refuse``.
        changed_archive: Whether a run whose archive has lost or changed members since it began is ``refuse``d when it
            is resumed, or goes on with what is there (``use``).
        split_from: Run or checkpoint whose patients keep the split they have there; only others are placed.
    """

    #: The archive.
    root: str
    #: Settings, by dotted name, that say something about one person; where names are hidden, no file of a run keeps
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
        self._sanity_samples = loader.sanity_samples
        hide_names(anonymise)
        self.ledger = FaultLedger(loader.max_fault_fraction, anonymise)
        self.splits: dict[str, list[Any]] = {}
        self.store: Any = None
        self.cache_check: CacheCheck = "sampled"
        #: Threads that build the cache; 0 = as many as there are cores.
        self.cache_threads = 0
        self._checking: BackgroundCheck | None = None
        self.archive: Archive | None = None
        self._train_loader: ResumableLoader | None = None
        self._loaders: list[ResumableLoader] = []
        self._position: dict[str, Any] | None = None
        self._seen_patients, self._changed_archive, self._split_from = seen_patients, changed_archive, split_from
        self._resumed: Membership | None = None
        self._earlier: Membership | None = None
        self._members: Membership | None = None
        self._starts_from, self._where = False, "pre-training"
        self._placed: tuple[Sequence[Any], dict[str, str], str] | None = None
        #: How many validation and test patients earlier training has seen, by split.
        self.seen: dict[str, dict[str, int]] = {}

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

    def recall(self, resumed: Any = None, started_from: Any = None, weights: Any = None) -> None:
        """Take the memberships of earlier runs, as their checkpoints hold them, before anything is indexed.

        Args:
            resumed: Of the run that goes on.
            started_from: Of the run whose encoder this one starts from.
            weights: Of the run whose network is evaluated.
        """
        self._resumed = Membership.read(resumed)
        self._starts_from = resumed is None and started_from is not None
        self._where = "training" if weights is not None else "pre-training"
        self._earlier = Membership.read(started_from) or Membership.read(weights)
        if self._resumed is not None:
            self._earlier = self._resumed.before

    def place(self, cases: Sequence[Any], parts: Mapping[str, str], seeded: bool, setting: object) -> dict[str, str]:
        """Return the split of every case: as a resumed run, or the one that it is to agree with, had it.

        Args:
            cases: All cases.
            parts: Where they would be placed.
            seeded: Whether neither a file nor the archive says so.
            setting: What places them.

        Raises:
            DataError: the archive is not the one that a resumed run began with.
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
        """Return the check sums of the files of each case, as far as they are known."""
        return {}

    def settle_membership(self) -> Membership | None:
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
        self._members = make_membership(rows, self.root, setting, self.ledger.anonymise, self._earlier)
        return self._members

    def _compare(self, rows: Sequence[Row]) -> None:
        """Count, leave out or refuse patients that earlier training has seen."""
        if self._earlier is None:
            return
        if not self._earlier.comparable():
            say("note: whether pre-training has seen these patients can be told by equal files alone: its names are "
                "hidden with another key")  # fmt: skip
        for split in ("val", "test"):
            seen = seen_patients(self._earlier, [row for row in rows if row.split == split], self.root)
            if not seen.patients:
                continue
            self.seen[split] = seen.facts()
            words = seen.words(split, self._where)
            say(words)
            if seen.certain and self._seen_patients == "refuse":
                raise DataError(f"{words}: set data.seen_patients to drop to leave them out, or to report.")
            if seen.certain and self._seen_patients == "drop":
                kept = [case for case in self.splits[split] if case.patient_id not in seen.certain]
                say(f"{len(self.splits[split]) - len(kept)} {split} cases are left out (data.seen_patients)")
                self.splits[split] = kept

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

    #: The settings of model and data, as the command line resolved them; None where it made neither.
    described: str | None = None

    def floor_file(self, asked: str) -> Path | None:
        """Return where constants that are measured on training samples are kept; None where nothing can be.

        The name is a function of the cache's key, the settings of model and data, what batches hold, and the members.

        Args:
            asked: What else they depend on.
        """
        if self.described is None or self._members is None or not hasattr(self.store, "folder"):
            return None
        key = stable_hash(self.store.folder.name, self.described, str(self.input_spec), self._members.digest, asked)
        return self.store.folder / "floors" / f"{key:016x}.npz"

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
            check_position(self._position, self.batch_size, world_size)
            loader.load_state_dict(self._position)
        self._train_loader = loader
        self._check_cache()
        return loader

    def rebuild(self, owner: Any) -> None:
        """Make an entry of the cache again; ``owner`` is what its files were made of."""
        raise NotImplementedError(f"{type(self).__name__} has no cache.")

    def drawn_from(self, owner: Any) -> list[int]:
        """Return the training subjects whose samples come from an entry of the cache."""
        dataset = self._train_loader.dataset  # type: ignore[union-attr]
        return [index for index in range(len(dataset)) if dataset.subject(index) == owner]

    def _check_cache(self) -> None:
        """Begin to read what the start has left unread of the cache, in the process that has looked it through."""
        checked = getattr(self.store, "checked", None)
        if checked is None or not checked.rest or self._checking is not None:
            return
        self._checking = BackgroundCheck(checked, self.rebuild)
        self.store.checked = checked._replace(rest=[])  # loader workers need no copy of the list
        self._checking.start()

    def cache_share_checked(self) -> float | None:
        """Return the share of the cache's files whose content was read by this run; None without a cache."""
        checked = getattr(self.store, "checked", None)
        if self._checking is not None:
            return self._checking.share
        return None if checked is None or not checked.total else checked.read / checked.total

    def _take_checks(self) -> None:
        """Put the files of the cache that were found broken into the ledger."""
        while self._checking is not None and not self._checking.found.empty():
            file, loader = self._checking.found.get(), self._train_loader
            assert loader is not None
            uses = sum(loader.sampler.uses(index, loader.consumed) for index in self.drawn_from(file.owner))
            detail = f"the cached copy had changed and was built again; {uses} draws of this epoch had used it"
            self.ledger.add([Fault(str(file.path), "checksum", detail, f"cache of {file.owner}")])

    def evaluation_loader(
        self, dataset: FaultTolerantDataset, draws: int = 1, batch_size: int | None = None, all_ranks: bool = True
    ) -> ResumableLoader:
        """Make a loader that reads everything once, shared out over the ranks."""
        global_rank, world_size = self._ranks() if all_ranks else (0, 1)
        batches = EvaluationBatches(len(dataset), draws, batch_size or self.batch_size, global_rank, world_size)
        return self._make_loader(dataset, batches)

    def validation_loader(
        self, dataset: FaultTolerantDataset, draws: int = 1, batch_size: int | None = None
    ) -> ResumableLoader:
        """Make a loader as :meth:`evaluation_loader`; before the first step a pass of it reads few samples.

        These are of the subjects whose hashes are lowest, and they come first in every pass, so that what looks at
        the first samples alone sees the same ones from the start.
        """
        global_rank, world_size = self._ranks()
        wanted = self._sanity_samples // draws if len(dataset) * draws > self._sanity_samples else 0
        ranked = sorted(range(len(dataset)), key=lambda index: stable_hash(dataset.subject(index))) if wanted else []
        first = sorted(ranked[:wanted])
        sizes = len(dataset), draws, batch_size or self.batch_size, global_rank, world_size
        return self._make_loader(dataset, EvaluationBatches(*sizes, first, self._before_training))

    def _before_training(self) -> bool:
        """Whether the validation before the first step is going on."""
        return self.trainer is not None and self.trainer.sanity_checking

    def collate_function(self) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Return what makes a batch from samples."""
        return collate_samples

    def _make_loader(self, dataset: FaultTolerantDataset, batches: TrainBatches | EvaluationBatches) -> ResumableLoader:
        loader = ResumableLoader(dataset, batches, self.collate_function(), self.num_workers, self._pin_memory())
        self._loaders.append(loader)
        return loader

    def teardown(self, stage: str) -> None:
        """Stop the loaders' workers (Lightning hook)."""
        if self._checking is not None:
            self._checking.stop()
        for loader in self._loaders:
            loader.close()
        self._loaders = []

    def on_exception(self, exception: BaseException) -> None:
        """Stop the loaders' workers (Lightning hook)."""
        self.teardown("exception")

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Take the faults out of a batch and into the ledger, and let the module add what it needs (Lightning hook)."""
        self._take_checks()
        if isinstance(batch, dict):
            self.ledger.add(batch.pop("faults", []))
            if self.trainer is not None and self.trainer.training:
                batch |= getattr(self.trainer.lightning_module, "on_host", lambda _: {})(batch)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the training loader (Lightning hook)."""
        if self._train_loader is None:
            return {}
        sizes = {"batch_size": self.batch_size, "ranks": self._ranks()[1], "batches": len(self._train_loader)}
        return {**self._train_loader.state_dict(), **sizes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the position for the training loader, which is made later (Lightning hook)."""
        self._position = state_dict if "consumed" in state_dict else None
