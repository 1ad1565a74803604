"""Multi-modal volumes for pre-training, segmentation and probes: one data module for every layout."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from common.errors import DataError
from common.faults import Fault, SampleFaultError
from common.names import case_twins
from common.pseudonyms import pseudonym, public_name
from common.randomness import numpy_generator, stable_hash
from common.runtime.reporting import say
from common.types import InputSpec
from datamodules.base import ArchiveDataModule, FaultTolerantDataset
from datamodules.checking import CacheCheck
from datamodules.configs import LoaderConfig, SplitConfig
from datamodules.controls import read_control
from datamodules.ids import check_labels, join_ids, rows_by
from datamodules.loading import Draw, ResumableLoader
from datamodules.membership import MASK
from datamodules.notes import say_notes
from datamodules.registry import Archive, Settings
from datamodules.splits import assign_splits, nested_fraction
from datamodules.storage import usable_cores
from datamodules.tables import read_table
from datamodules.volumes.cache import CacheFormat, OpenCase, Record, SourceVolumes, VolumeCache
from datamodules.volumes.cases import Case, Layout, case_of
from datamodules.volumes.checks import examine
from datamodules.volumes.crops import arranged, center_start, cut, flip, random_start, start_around, to_tensor
from datamodules.volumes.modalities import under_canonical_names, with_modalities
from datamodules.volumes.profiles import prepared
from datamodules.volumes.voxels import STRICT, VoxelConfig

Domain = Literal["train", "val", "center", "full"]


class VolumeDataset(FaultTolerantDataset):
    """Crops, or whole volumes, of cases.

    Args:
        cases: The cases.
        store: Opens them.
        crop_size: Voxels along R, A, S.
        domain: ``"train"`` draws anew every epoch under the run's seed; ``"val"`` draws crops and masks that are fixed
            per subject whatever the run; ``"center"`` cuts the central crop; ``"full"`` gives the whole volume.
        seed: Seed of the training draws.
        flip_axes: Axes mirrored with probability one half, in training only.
        overhang: Share of a crop that may reach beyond the volume; see :func:`datamodules.volumes.crops.random_start`.
        regions: Region to label values, for labelled sets; None leaves labels out.
        label_crop_probability: Share of the training crops that must contain a labelled voxel.
        controls: Other patients' cases, for the control of the collapse diagnostics; None leaves it out.
        targets: Class index by case id.
        anonymise: Whether subjects get pseudonyms.
        order: Place of each channel of a sample among the stored ones, negative = absent; None takes them as stored.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        store: VolumeCache | SourceVolumes,
        crop_size: Sequence[int],
        domain: Domain,
        seed: int,
        flip_axes: Sequence[int] = (),
        overhang: float = 0.0,
        regions: Mapping[str, Sequence[int]] | None = None,
        label_crop_probability: float = 0.0,
        controls: Sequence[Case] | None = None,
        targets: Mapping[str, int] | None = None,
        anonymise: bool = False,
        order: Sequence[int] | None = None,
    ) -> None:
        super().__init__(seed)
        self.cases = list(cases)
        self.store = store
        self.crop_size = tuple(crop_size)
        self.domain = domain
        self.flip_axes = tuple(flip_axes)
        self.overhang = overhang
        self.regions = regions
        self.label_crop_probability = label_crop_probability
        self.controls = controls
        self.targets = targets
        self.anonymise = anonymise
        self.order = order

    def __len__(self) -> int:
        return len(self.cases)

    def subject(self, index: int) -> str:
        """Return the case id."""
        return self.cases[index].case_id

    def read(self, draw: Draw) -> dict[str, Any]:
        """Return one sample; see :class:`common.types.VolumeBatch`.

        Raises:
            SampleFaultError: the case, or the label it needs, cannot be used.
        """
        case = self.cases[draw.index]
        opened = self.store.open(case)
        if self.regions is not None and opened.label is None:
            raise SampleFaultError(self._label_faults(case, opened.record))
        generator = numpy_generator("crop", *self.draw_key(draw, self.domain == "train"))
        start, size = self._place(opened, generator)
        axes = [axis for axis in self.flip_axes if self.domain == "train" and generator.random() < 0.5]
        image = flip(cut(opened.image, start, size), axes)
        hide = pseudonym if self.anonymise else str
        sample: dict[str, Any] = {
            "image": arranged(to_tensor(image), self.order),
            "modality_mask": arranged(torch.tensor(opened.record.modality_mask), self.order),
            "key": torch.tensor(stable_hash("mask", *self.draw_key(draw, self.domain == "train"))),
            "subject_id": hide(case.case_id),
            "place": (*start, *opened.image.shape[-3:]),
            "faults": opened.record.image_faults(),
        }
        if self.regions is not None:
            label = flip(cut(opened.label, start, size), axes)
            channels = [np.isin(label, values) for values in self.regions.values()]
            sample["label"] = torch.from_numpy(np.stack(channels).astype(np.float32))
        if self.domain == "full":
            sample["record"] = opened.record
        if self.targets is not None:
            sample |= {"target": self.targets[case.case_id], "patient_id": hide(case.patient_id)}
        if self.controls is not None:
            sample |= self._control(draw)
        return sample

    def _label_faults(self, case: Case, record: Record) -> list[Fault]:
        listed = [Fault(*fault, case.case_id) for fault in record.label_faults]
        return listed or [Fault(case.case_id, "missing", "the case has no label", case.case_id)]

    def _place(self, opened: OpenCase, generator: np.random.Generator) -> tuple[list[int], tuple[int, ...]]:
        """Choose where to cut."""
        shape = opened.image.shape[-3:]
        if self.domain == "full":
            return [0, 0, 0], shape
        if self.domain == "center":
            return center_start(shape, self.crop_size), self.crop_size
        voxels = opened.label_voxels if self.domain == "train" else None
        # The draw comes first, so that the crops of a set do not depend on which cases have a label.
        wanted = generator.random() < self.label_crop_probability
        if wanted and voxels is not None and len(voxels):
            value = generator.choice(np.unique(voxels[:, 0]))
            voxel = generator.choice(voxels[voxels[:, 0] == value])[1:].tolist()
            return start_around(voxel, shape, self.crop_size, generator), self.crop_size
        return random_start(shape, self.crop_size, generator, self.overhang), self.crop_size

    def _control(self, draw: Draw) -> dict[str, Any]:
        """Cut a crop out of another patient."""

        def read(other: Case) -> dict[str, Any]:
            opened = self.store.open(other)
            start, size = self._place(opened, numpy_generator("crop", "val", other.case_id, draw.draw))
            return {"control_image": arranged(to_tensor(cut(opened.image, start, size)), self.order)}

        return read_control(self.cases[draw.index], draw, self.controls or (), read) or {}


class NamesDataset(FaultTolerantDataset):
    """Names and classes of cases whose features are kept elsewhere; reads no volume.

    Args:
        names: Subject of each case, as its features are filed.
        targets: Class of each case.
        seed: Unused; nothing here can break.
    """

    def __init__(self, names: Sequence[str], targets: Sequence[int], seed: int = 0) -> None:
        super().__init__(seed)
        self.names, self.targets = list(names), list(targets)

    def __len__(self) -> int:
        return len(self.names)

    def subject(self, index: int) -> str:
        """Return the subject."""
        return self.names[index]

    def read(self, draw: Draw) -> dict[str, Any]:
        """Return name and class."""
        return {"subject_id": self.names[draw.index], "target": self.targets[draw.index]}


@dataclass(frozen=True)
class CropConfig:
    """What is cut out of a volume.

    Args:
        size: Voxels along R, A, S; None takes the layout's.
        flip_axes: Axes (0 R, 1 A, 2 S) that training crops are mirrored along with probability one half.
        overhang: Share of a crop that may reach beyond the foreground, in each direction. Official volumes are about
            three quarters air; at 0 a crop of half the head's size would hardly ever see the brain's surface.
        label_probability: Share of the labelled training crops that must contain a labelled voxel.
    """

    size: tuple[int, int, int] | None = None
    flip_axes: tuple[int, ...] = (0, 1, 2)
    overhang: float = 0.25
    label_probability: float = 0.5


@dataclass(frozen=True)
class LabelConfig:
    """Whether samples have labels, and what these mean.

    Args:
        needed: Whether samples need labels; validation and test then give whole volumes.
        regions: Region to label values; None takes the layout's.
        fraction: Share of the training patients to use; shares are nested.
    """

    needed: bool = False
    regions: dict[str, list[int]] | None = None
    fraction: float = 1.0


@dataclass(frozen=True)
class TargetConfig:
    """A class of every case, for probes.

    Args:
        name: A case attribute to classify, 0 or 1; cases without it are left out. Training and validation then give
            names and classes only, for features kept by a probe; test gives central crops.
        file: Table with ``case_id`` and the target; None takes the archive's own attributes.
    """

    name: str | None = None
    file: str | None = None


@dataclass(frozen=True)
class VolumeCacheConfig:
    """Copies of volumes that are kept to be read quickly.

    Args:
        format: ``"npy"``, ``"b2nd"``, or ``"none"`` to read the sources at every access.
        check: How much of the copies is read before training; see :mod:`datamodules.checking`.
    """

    format: CacheFormat | Literal["none"] = "npy"
    check: CacheCheck = "sampled"


@dataclass(frozen=True)
class VolumeLoaderConfig(LoaderConfig):
    """How crops are drawn, and how many cases may be broken.

    Args:
        val_draws: Fixed validation crops per case.
    """

    val_draws: int = 4


class VolumeDataModule(ArchiveDataModule):
    """Multi-modal MRI in any known layout, cached, split by patient.

    Args:
        root: The archive.
        layout: Name of its layout; ``"auto"`` recognises it from the tree.
        profile: How volumes are prepared (:mod:`datamodules.volumes.profiles`); None takes what suits the layout.
        modalities: Channels in order, in any usual spelling; None takes the layout's.
        crops: What is cut out of a volume.
        labels: Whether samples have labels, and what these mean.
        target: A class of every case, for probes.
        voxels: What is done about volumes that are a fault as they are.
        cache: Copies of the volumes that are kept.
        split: Who is trained, validated and tested on.
        loader: How samples are drawn, and how many may be broken.
        batch_size: Crops per device.
        num_workers: Loader processes per rank.
        anonymise: Whether subject ids are replaced by pseudonyms in logs, pictures and fault files.
        seed: Seed of order, crops and masks; None takes ``seed_everything``'s.
        **membership: ``seen_patients``, ``changed_archive`` and ``split_from`` of :class:`ArchiveDataModule`.
    """

    def __init__(
        self,
        root: str,
        layout: str = "auto",
        profile: str | None = None,
        modalities: list[str] | None = None,
        crops: CropConfig = CropConfig(),
        labels: LabelConfig = LabelConfig(),
        target: TargetConfig = TargetConfig(),
        voxels: VoxelConfig = STRICT,
        cache: VolumeCacheConfig = VolumeCacheConfig(),
        split: SplitConfig = SplitConfig(),
        loader: VolumeLoaderConfig = VolumeLoaderConfig(),
        batch_size: int = 4,
        num_workers: int = 0,
        anonymise: bool = False,
        seed: int | None = None,
        **membership: Any,
    ) -> None:
        super().__init__(batch_size, num_workers, anonymise, seed, loader, **membership)
        self.root = root
        self.crops_per_case, self.val_crops_per_case = loader.draws, loader.val_draws
        self.flip_axes, self.overhang = crops.flip_axes, crops.overhang
        self.labels, self.label_fraction = labels.needed, labels.fraction
        self.label_crop_probability = crops.label_probability
        self.target, self.target_file = target.name, target.file
        self._layout_name, self._modalities, self._crop_size = layout, modalities, crops.size
        self._profile = profile or self.default_profile
        self._regions, self._voxels, self._cache = labels.regions, voxels, cache.format
        self.cache_check = cache.check
        self._split = (split.fractions, split.seed, split.file)
        self._layout: Layout | None = None
        self.cases: list[Case] = []
        self.targets: dict[str, int] | None = None
        self.twins: frozenset[str] = frozenset()
        self._delivered: tuple[str, ...] | None = None

    #: Profile where none is named; None takes the one that suits the layout.
    default_profile: str | None = None

    @property
    def needs(self) -> frozenset[str]:
        """Volumes, with masks or targets where the task is about them."""
        wanted = {"volumes"} | ({"masks"} if self.labels else set())
        return frozenset(wanted | ({"targets"} if self.target and not self.target_file else set()))

    def used_files(self) -> Iterable[tuple[str, Path]]:
        """Yield the volumes of the channels, and the labels where they are needed."""
        layout = self.index()
        for case in self.cases_in_use():
            yield from (("volume", path) for name, path in case.images.items() if name in layout.modalities)
            yield from (("mask", path) for path in case.labels.values() if self.labels)

    def prepare_layout(self, archive: Archive) -> Layout:
        """Return what the archive's files are, and how they are prepared."""
        return prepared(archive, self._profile)

    def settle(self, layout: Layout) -> Layout:
        """Settle channels and preparation of a recognised layout, once the cases are listed."""
        return with_modalities(layout, self.cases, self._modalities)

    def index(self) -> Layout:
        """Recognise the layout, list and split the cases. Reads names and tables, no volume.

        Raises:
            DataError: unknown layout, missing split file, a patient in two splits, no labelled case, and the like.
        """
        if self._layout is None:
            named = {name: name for name in self._modalities or ()}
            archive = self.open(self.root, self._layout_name, Settings(modalities=named))
            self.archive = archive
            cases = [case_of(record) for record in archive.records]
            layout, self.cases = under_canonical_names(self.prepare_layout(archive), cases)
            layout = self.settle(layout).with_voxels(self._voxels)
            fractions, split_seed, split_file = self._split
            cut = archive.facts.cut_validation
            parts = assign_splits(self.cases, fractions, split_seed, split_file, cut_validation=cut)
            seeded = split_file is None and not any(case.split for case in self.cases)
            parts = self.place(self.cases, parts, seeded, self._split)
            self.targets = self._read_targets()
            usable = [case for case in self.cases if self._is_wanted(case)]
            self.splits = {
                name: [c for c in usable if parts.get(c.case_id) == name] for name in ("train", "val", "test")
            }
            self.splits["train"] = nested_fraction(self.splits["train"], self.label_fraction, split_seed)
            self._check_regions(layout)
            self.ledger.num_samples = len(parts)
            self._layout = layout
            self.twins = case_twins(case.case_id for case in self.cases)
            self.store = (
                SourceVolumes(layout)
                if self._cache == "none"
                else VolumeCache(self.root, layout, self._cache, twins=self.twins, tree=archive.tree)
            )
        return self._layout

    def _is_wanted(self, case: Case) -> bool:
        """Whether a case has the class or the label that is asked for; to have none is no fault."""
        if self.targets is not None:
            return case.case_id in self.targets
        return bool(case.labels) or not self.labels

    def _check_regions(self, layout: Layout) -> None:
        if self.labels and not (self._regions or layout.regions):
            raise DataError(f"The layout {layout.name} does not say what its labels mean: give data.labels.regions, "
                            f"such as {{lesion: [1]}}.")  # fmt: skip
        if self.labels and not any(case.labels for case in self.cases):
            raise DataError(f"No case under {self.root} has a label file; looked for {layout.tree}. "
                            f"To predict without labels, set data.labels.needed to false.")  # fmt: skip

    def _read_targets(self) -> dict[str, int] | None:
        """Return the class of each case that has one."""
        if self.target is None:
            return None
        facts: Mapping[str, Mapping[str, str]] = {case.case_id: case.attributes for case in self.cases}
        if self.target_file is not None:
            path = Path(self.target_file)
            if not path.is_file():
                raise DataError(f"The target file {path} does not exist.")
            table = read_table(path)
            if not {"case_id", self.target} <= set(table.columns):
                raise DataError(f"{path} needs the columns case_id and {self.target}.")
            facts = rows_by(path, table, "case_id")
            check_labels(path, join_ids([case.case_id for case in self.cases], facts), "cases")
        texts = {name: facts.get(name, {}).get(self.target, "").strip() for name in (c.case_id for c in self.cases)}
        wrong = {name: text for name, text in texts.items() if text not in ("", "0", "1")}
        if wrong:
            name, text = next(iter(wrong.items()))
            raise DataError(
                f"The target {self.target} of {public_name(name)} is {text!r}; it must be 0, 1 or empty (unknown)."
            )
        targets = {name: int(text) for name, text in texts.items() if text}
        if len(set(targets.values())) < 2:
            raise DataError(
                f"The target {self.target} is known for {len(targets)} of {len(texts)} cases and has "
                f"{'one class' if targets else 'no value'}; it needs both 0 and 1."
            )
        return targets

    @property
    def regions(self) -> dict[str, tuple[int, ...]]:
        """Region to label values; empty without labels."""
        if not self.labels:
            return {}
        return {name: tuple(values) for name, values in (self._regions or self.index().regions).items()}

    @property
    def crop_size(self) -> tuple[int, int, int]:
        """Voxels of a crop along R, A, S."""
        return tuple(self._crop_size or self.index().crop_size)  # type: ignore[return-value]

    @property
    def input_spec(self) -> InputSpec:
        """Channels, crop size, regions and preprocessing of the batches."""
        layout = self.index()
        preprocessing = {"layout": layout.name, **layout.preprocessing.as_dict()}
        channels = self._delivered or layout.modalities
        present = {name for case in self.cases for name in case.images}
        return InputSpec(
            channels,
            self.crop_size,
            self.regions,
            preprocessing,
            names=tuple(layout.shown(name) for name in channels),
            absent=tuple(name for name in channels if name not in present),
            chosen=bool(self._modalities),
        )

    def deliver(self, channels: Sequence[str]) -> None:
        """Give batches these channels in this order; those that the archive lacks are fed as absent.

        Raises:
            DataError: a channel of the data is not among them.
        """
        layout = self.index()
        if left_out := [layout.shown(name) for name in layout.modalities if name not in channels]:
            raise DataError(f"{', '.join(left_out)} of {self.root} would be left out: set data.modalities.")
        self._delivered = tuple(channels)

    def _order(self) -> list[int] | None:
        """Return where each channel of the batches is among the stored ones, -1 = nowhere; None = they are the same."""
        stored = self.index().modalities
        if self._delivered in (None, stored):
            return None
        return [stored.index(name) if name in stored else -1 for name in self._delivered or ()]

    def prepare_data(self) -> None:
        """Build and verify the cache, once per machine (Lightning hook)."""
        self.index()
        self.store.ensure(self.cases_in_use(), self.cache_threads or usable_cores(), check=self.cache_check)
        say_notes()

    def rebuild(self, owner: Any) -> None:
        """Make the entry of a case again."""
        self.store.build(next(case for case in self.cases if case.case_id == owner))

    def all_cases(self) -> list[Case]:
        """Return every case of the archive, whether or not it is used."""
        self.index()
        return self.cases

    def sources(self, cases: Sequence[Case]) -> dict[str, tuple[str, ...]]:
        """Return the check sums of the files of each case; without a cache none is known."""
        found: dict[str, tuple[str, ...]] = {}
        if not isinstance(self.store, VolumeCache):
            return found
        for case in cases:
            if (record := self.store.known_record(case.case_id)) is not None:
                sums = {path: source["xxh3"] for path, source in record.sources.items() if "xxh3" in source}
                images = [sums[path] for path in map(str, case.images.values()) if path in sums]
                masks = [MASK + sums[path] for path in map(str, case.labels.values()) if path in sums]
                found[case.case_id] = (*sorted(images), *sorted(masks))
        return found

    def cases_in_use(self) -> list[Case]:
        """Return the cases of all splits."""
        return [case for part in self.splits.values() for case in part]

    def setup(self, stage: str) -> None:
        """Put what is broken into the ledger and say what there is (Lightning hook).

        Raises:
            DataError: no case can be used.
        """
        layout = self.index()
        if isinstance(self.store, VolumeCache):
            for case in self.cases_in_use():
                record = self.store.known_record(case.case_id)
                if record is not None:
                    self.ledger.add(record.all_faults() if self.labels else record.image_faults())
        if not self._usable(self.cases_in_use()):
            raise DataError(f"None of the {len(self.cases_in_use())} cases under {self.root} can be used. "
                            f"{self.ledger.describe()}")  # fmt: skip
        counts = ", ".join(f"{len(part)} {name}" for name, part in self.splits.items() if part)
        modalities = ", ".join(layout.shown(name) for name in layout.modalities)
        say(f"data: {layout.name} at {self.root}, cases {counts}, modalities {modalities}, "
            f"crops {'x'.join(map(str, self.crop_size))}")  # fmt: skip
        self.keep_account(stage)
        if stage == "fit" and not self.splits["val"]:
            say("note: the val split is empty, so nothing will be measured and there will be no best checkpoint")

    def _dataset(self, cases: Sequence[Case], domain: Domain, **options: Any) -> VolumeDataset:
        return VolumeDataset(
            cases,
            self.store,
            self.crop_size,
            domain,
            self.seed,
            regions=self.regions or None,
            targets=self.targets,
            overhang=self.overhang,
            anonymise=self.ledger.anonymise,
            order=self._order(),
            **options,
        )

    def _usable(self, cases: Iterable[Case]) -> list[Case]:
        """Leave out cases known to be broken: evaluation replaces nothing."""
        bad = {fault.sample for fault in self.ledger.faults}
        return [case for case in cases if case.case_id not in bad or self._still_usable(case)]

    def _still_usable(self, case: Case) -> bool:
        record = self.store.known_record(case.case_id) if isinstance(self.store, VolumeCache) else None
        return record is None or (record.usable and not (self.labels and record.label_faults))

    def train_dataloader(self) -> ResumableLoader:
        """Return the training crops (Lightning hook)."""
        if self.targets is not None:
            return self.train_loader(self._names(), self.crops_per_case)
        dataset = self._dataset(
            self.splits["train"],
            "train",
            flip_axes=self.flip_axes,
            label_crop_probability=self.label_crop_probability if self.labels else 0.0,
        )
        return self.train_loader(dataset, self.crops_per_case)

    def val_dataloader(self) -> ResumableLoader:
        """Return fixed validation crops, or whole volumes for a labelled set (Lightning hook)."""
        if self.labels:
            return self.validation_loader(self._dataset(self._usable(self.splits["val"]), "full"), batch_size=1)
        if self.targets is not None:
            return self.evaluation_loader(self._names())
        dataset = self._dataset(self._usable(self.splits["val"]), "val", controls=self.splits["train"])
        return self.validation_loader(dataset, self.val_crops_per_case)

    def test_dataloader(self) -> ResumableLoader:
        """Return whole test volumes, or central crops where a class is wanted (Lightning hook).

        Raises:
            DataError: the test split is empty.
        """
        if not self._usable(self.splits["test"]):
            raise DataError(f"There is no case to test on under {self.root}: none is in the test split"
                            + (", with a label." if self.labels else "."))  # fmt: skip
        if self.targets is not None:
            return self.evaluation_loader(self._dataset(self._usable(self.splits["test"]), "center"))
        return self.evaluation_loader(self._dataset(self._usable(self.splits["test"]), "full"), batch_size=1)

    def _names(self) -> NamesDataset:
        cases = [case for part in ("train", "val") for case in self._usable(self.splits[part])]
        targets = self.targets or {}
        names = [pseudonym(case.case_id) if self.ledger.anonymise else case.case_id for case in cases]
        return NamesDataset(names, [targets[case.case_id] for case in cases], self.seed)

    def predict_dataloader(self) -> ResumableLoader:
        """Return whole test volumes, or all where nothing is set aside (Lightning hook)."""
        cases = self.splits["test"] or self.cases_in_use()
        return self.evaluation_loader(self._unlabelled(cases), batch_size=1)

    def _unlabelled(self, cases: Sequence[Case]) -> VolumeDataset:
        anonymise, order = self.ledger.anonymise, self._order()
        return VolumeDataset(cases, self.store, self.crop_size, "full", self.seed, anonymise=anonymise, order=order)

    def reference_samples(self, count: int) -> Iterable[Any]:
        """Yield batches with at least ``count`` training crops, cut as validation crops are and never mirrored."""
        dataset = self._dataset(self._usable(self.splits["train"]), "val")
        draws = -(-count // max(len(dataset), 1))
        for batch in self.evaluation_loader(dataset, draws, all_ranks=False):
            yield self.on_before_batch_transfer(batch, 0)

    def examine(self, deep: bool, workers: int) -> list[str]:
        """Print a report on the archive and return the reasons why training would refuse it."""
        layout = self.index()
        terms = self.terms(self.cases_in_use(), self.crops_per_case)
        return examine(layout, terms, self.labels, deep, workers)

    def central_samples(self, splits: Sequence[str] = ("train", "val", "test")) -> Iterable[Any]:
        """Yield batches with the central crop of every case of some splits, for probes and embeddings."""
        cases = [case for part in splits for case in self._usable(self.splits[part])]
        dataset = VolumeDataset(
            cases,
            self.store,
            self.crop_size,
            "center",
            self.seed,
            targets=self.targets,
            anonymise=self.ledger.anonymise,
            order=self._order(),
        )
        for batch in self.evaluation_loader(dataset, all_ranks=False):
            yield self.on_before_batch_transfer(batch, 0)
