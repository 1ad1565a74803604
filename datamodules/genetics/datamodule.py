"""Colour images of people, alone or with their genetics, for pre-training: one data module for every layout."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.errors import DataError
from common.faults import Fault, SampleFaultError
from common.pseudonyms import pseudonym, public_name
from common.randomness import numpy_generator, stable_hash
from common.runtime.reporting import print_line
from common.types import InputSpec
from datamodules.base import FaultTolerantDataset, collate_samples
from datamodules.configs import (
    CacheConfig,
    Channelwise,
    ImageConfig,
    LoaderConfig,
    SplitConfig,
    check_crop_scale,
    three_values,
)
from datamodules.controls import read_control
from datamodules.genetics.checks import examine
from datamodules.genetics.genome import Genome, GenomeFiles, pair_persons, read_genome
from datamodules.genetics.kinship import read_kinship
from datamodules.ids import join_ids, mending
from datamodules.images.cache import BoxChoice, ImageCache, SourceImages
from datamodules.images.crops import center_box, cut_box, random_box
from datamodules.images.datamodule import ImageArchiveDataModule
from datamodules.images.pictures import Picture, pictures_of
from datamodules.images.reading import CHANNELS, ImageReader, colour_at, per_channel
from datamodules.images.values import ImageError
from datamodules.loading import Draw
from datamodules.registry import Archive
from datamodules.splits import SPLITS, assign_splits, relatives_together

#: Mean and standard deviation of ImageNet's channels.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class PictureConfig(ImageConfig):
    """Colour images, and how those of training vary.

    Args:
        crop_scale: Share of an image's area that a training crop has.
        degrees: Largest angle by which a training image is turned.
        flip: Whether half of the training images are mirrored.
        upside_down: Whether half of them are turned upside down.
        jitter: Largest change of brightness, contrast, saturation and hue.
    """

    mean: Channelwise = IMAGENET_MEAN
    std: Channelwise = IMAGENET_STD
    crop_scale: tuple[float, float] = (1.0, 1.0)
    degrees: float = 20.0
    flip: bool = True
    upside_down: bool = False
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)

    def __post_init__(self) -> None:
        check_crop_scale(self.crop_scale)


def jittered(image: Tensor, amounts: Sequence[float], generator: np.random.Generator) -> Tensor:
    """Change brightness, contrast, saturation and hue of an image ``(3, H, W)`` in [0, 1], in this order."""
    from torchvision.transforms.v2 import functional

    changes = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)
    for change, amount in zip(changes, amounts[:3], strict=True):
        if amount:
            image = change(image, 1 + generator.uniform(-amount, amount))
    return functional.adjust_hue(image, generator.uniform(-amounts[3], amounts[3])) if amounts[3] else image


def cut_picture(
    store: ImageCache | SourceImages,
    path: Path,
    size: Sequence[int],
    augmentation: PictureConfig | None = None,
    generator: np.random.Generator | None = None,
) -> Tensor:
    """Cut one image to a size, ``(3, *size)`` in [0, 1].

    Args:
        store: Opens images.
        path: The file.
        size: Height and width.
        augmentation: How it is augmented; None takes the central part unchanged.
        generator: Source of the random draws.

    Raises:
        SampleFaultError: the image cannot be used.
    """
    choose: BoxChoice = partial(center_box, size=size)
    if augmentation is None or generator is None:
        return store.crop(path, choose, size)
    mirror, turn = augmentation.flip and generator.random() < 0.5, generator.uniform(-1, 1) * augmentation.degrees
    if tuple(augmentation.crop_scale) != (1.0, 1.0):
        choose = partial(random_box, scale=augmentation.crop_scale, generator=generator)
    image = store.crop(path, choose, size, mirror, turn)
    if augmentation.upside_down and generator.random() < 0.5:
        image = image.flip(1)
    return jittered(image, augmentation.jitter, generator) if any(augmentation.jitter) else image


class Lesions(NamedTuple):
    """Masks of lesions, for display only: nothing is trained on them.

    Attributes:
        files: The mask of an image, by the image's file.
        reader: See :class:`datamodules.registry.Facts`.
        shorter_side: Shorter side in pixels at which it reads.
    """

    files: Mapping[Path, Path]
    reader: Callable[[Path, Path, int], NDArray[np.uint8]]
    shorter_side: int

    def read(self, image: Path, size: Sequence[int]) -> Tensor:
        """Return where the lesion is in the central part of an image, bool ``size``; nowhere without a mask.

        Raises:
            ImageError: the mask cannot be read.
        """
        if image not in self.files:
            return torch.zeros(tuple(size), dtype=torch.bool)
        mask = self.reader(self.files[image], image, self.shorter_side)
        return cut_box(255 * mask, center_box(mask.shape, size), size)[0] > 0.5


class Sample(NamedTuple):
    """An image, or a person whose images alternate.

    Attributes:
        case_id: Unique name.
        patient_id: Splits are by this.
        images: The images to choose from.
        person: Whose genetics belong to it; None: there are none.
        split: Unused: the archive's own split has already been applied.
    """

    case_id: str
    patient_id: str
    images: tuple[Path, ...]
    person: str | None = None
    split: str | None = None


class ImageGenomeDataset(FaultTolerantDataset):
    """Images and the genetics of their people.

    Args:
        samples: The samples.
        store: Opens images.
        genome: Their genetics; None without any.
        image: Their size and scale, and how those of training are augmented.
        train: Whether images are augmented and alternate under the run's seed; else they are fixed per subject.
        seed: Seed of the training draws.
        controls: Other people's samples, for the control of the collapse diagnostics; None leaves it out.
        lesions: Masks to be drawn; None where the archive has none.
        anonymise: Whether subjects get pseudonyms.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        store: ImageCache | SourceImages,
        genome: Genome | None,
        image: PictureConfig,
        train: bool,
        seed: int,
        controls: Sequence[Sample] | None = None,
        lesions: Lesions | None = None,
        anonymise: bool = False,
    ) -> None:
        super().__init__(seed)
        self.samples, self.store, self.genome = list(samples), store, genome
        self.image_size, self.train, self.augmentation = tuple(image.size), train, image if train else None
        self.mean, self.std = per_channel(three_values(image.mean)), per_channel(three_values(image.std))
        self.controls = list(controls or ())
        self.lesions = lesions
        self.anonymise = anonymise

    def __len__(self) -> int:
        return len(self.samples)

    def subject(self, index: int) -> str:
        """Return the sample's name."""
        return self.samples[index].case_id

    def read(self, draw: Draw) -> dict[str, Any]:
        """Return one sample; see :class:`common.types.ImageGenomeBatch`.

        Raises:
            SampleFaultError: none of its images can be used.
        """
        sample = self.samples[draw.index]
        faults: list[Fault] = []
        image = self._image(sample, numpy_generator("crop", *self.draw_key(draw, self.train)), faults)
        if image is None:
            raise SampleFaultError(faults)
        result: dict[str, Any] = {
            "image": image,
            "key": torch.tensor(stable_hash("mask", *self.draw_key(draw, self.train))),
            "subject_id": pseudonym(sample.case_id) if self.anonymise else sample.case_id,
            "patient_id": pseudonym(sample.patient_id) if self.anonymise else sample.patient_id,
            "faults": faults,
        }
        present = [True]
        if self.genome is not None:
            values, observed = self.genome.read(sample.person)
            result |= {"genome": torch.from_numpy(values), "genome_observed": torch.from_numpy(observed)}
            present += self.genome.has(sample.person)
        result["modality_mask"] = torch.tensor(present)
        if self.controls:
            control = self._control(sample, draw)
            result["control_image"] = torch.zeros_like(image) if control is None else control
        if self.lesions is not None:
            result["lesion"] = self._lesion(sample, faults)
        return result

    def _lesion(self, sample: Sample, faults: list[Fault]) -> Tensor:
        """Return where the sample's lesion is; a damaged mask is a fault and shows nothing."""
        assert self.lesions is not None
        path = sample.images[0]
        try:
            return self.lesions.read(path, self.image_size)
        except ImageError as error:
            faults.append(Fault(str(self.lesions.files[path]), error.kind, error.detail, sample.case_id))
            return torch.zeros(self.image_size, dtype=torch.bool)

    def _image(self, sample: Sample, generator: np.random.Generator, faults: list[Fault]) -> Tensor | None:
        """Return one of the images, another where that one cannot be read; None, and faults, where none can."""
        first = int(generator.integers(len(sample.images))) if self.train else 0
        for step in range(len(sample.images)):
            path = sample.images[(first + step) % len(sample.images)]
            try:
                pixels = cut_picture(self.store, path, self.image_size, self.augmentation, generator)
            except SampleFaultError as error:
                faults += [fault._replace(sample=sample.case_id) for fault in error.faults]
                continue
            return (pixels - self.mean) / self.std
        return None

    def _control(self, sample: Sample, draw: Draw) -> Tensor | None:
        """Return the image of another person; None where none can be read."""

        def read(other: Sample) -> Tensor:
            return (cut_picture(self.store, other.images[0], self.image_size) - self.mean) / self.std

        return read_control(sample, draw, self.controls, read)


def _reader_of(archive: Archive) -> ImageReader:
    """Return how an archive's files become pixels."""
    reader: ImageReader = archive.facts.reader or colour_at(archive.facts.frame)
    return reader


def collate_images(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Join samples, and note whether all of them have every kind of genetics, so that no step has to check."""
    complete = all(bool(sample["modality_mask"].all()) for sample in samples)
    return collate_samples(samples) | {"complete": complete}


@dataclass(frozen=True)
class GenomeConfig(GenomeFiles):
    """Where genetics are, and how they join the images.

    Args:
        pairing: ``"auto"`` joins genetics by the person where the layout names persons, and else gives every image the
            genetics of a stranger, which means nothing but exercises the method; ``"id"`` and ``"synthetic"`` insist.
        complete_only: Whether persons who lack a kind of genetics are left out.
        clip: Standardised genetics are cut to this on both sides.
    """

    pairing: Literal["auto", "id", "synthetic"] = "auto"
    complete_only: bool = False
    clip: float = 5.0


class ImageGenomeDataModule(ImageArchiveDataModule):
    """Colour images of people with or without their genetics, in any known layout; split by person.

    Args:
        root: The archive.
        layout: Name of its layout; ``"auto"`` recognises it from the tree.
        genetics: Whether genetics are used; false trains on images alone.
        genome: Where they are, and how they join the images.
        one_per_subject: Whether a person's images alternate; else each is a sample.
        image: The images, and how those of training vary.
        cache: Copies of the images that are kept.
        split: Who is trained, validated and tested on; its seed is that of the pairing too.
        kinship: Table of pairs of people (ID1 or IID1, ID2 or IID2, KINSHIP): relatives of the third degree and closer
            are then kept in one split, regardless of other rules, test before val before train.
        loader: How samples are drawn, and how many may be broken.
        batch_size: Samples per device.
        num_workers: Loader processes per rank; also threads that build the cache.
        anonymise: Whether subjects get pseudonyms in logs, pictures and fault files.
        seed: Seed of order and crops; None takes ``seed_everything``'s.
        **membership: ``archive``, ``seen_patients``, ``changed_archive`` and ``split_from`` of
            :class:`datamodules.base.ArchiveDataModule`.
    """

    def __init__(
        self,
        root: str,
        layout: str = "auto",
        genetics: bool = True,
        genome: GenomeConfig = GenomeConfig(),
        one_per_subject: bool = True,
        image: PictureConfig = PictureConfig(),
        cache: CacheConfig = CacheConfig(),
        split: SplitConfig = SplitConfig(),
        kinship: str | None = None,
        loader: LoaderConfig = LoaderConfig(),
        batch_size: int = 64,
        num_workers: int = 0,
        anonymise: bool = False,
        seed: int | None = None,
        **membership: Any,
    ) -> None:
        super().__init__(
            root,
            image,
            cache,
            loader,
            batch_size=batch_size,
            num_workers=num_workers,
            anonymise=anonymise,
            seed=seed,
            **membership,
        )
        self._image, self._config, self.genetics = image, genome, genetics
        self._layout_name, self._one_per_subject = layout, one_per_subject
        self._split = (split.fractions, split.seed, split.file)
        self._kinship = kinship
        self._lesions: Lesions | None = None
        self.genome: Genome | None = None

    @property
    def needs(self) -> frozenset[str]:
        """Images; genetics if the archive has them."""
        return frozenset({"images"})

    def index(self) -> Archive:
        """Recognise the layout, list and split the images, read the genetics and fit their statistics.

        Reads names and tables, and the genotypes; no image.

        Raises:
            DataError: unknown layout, a person in two splits, people that do not join, and the like.
        """
        if self.archive is None:
            archive = self.open(self.root, self._layout_name)
            facts, pictures = archive.facts, pictures_of(archive)
            parts = assign_splits(pictures, *self._split)
            if self._kinship is not None:
                parts = self._without_relatives(pictures, parts)
            seeded = self._split[2] is None and not any(picture.split for picture in pictures)
            parts = self.place(pictures, parts, seeded, self._split)
            pictures = [picture for picture in pictures if picture.case_id in parts]
            split_of = {picture.patient_id: parts[picture.case_id] for picture in pictures}
            persons = self._join(archive, split_of) if self.genetics else {}
            samples = self._samples(pictures, persons)
            if facts.read_lesion is not None:
                masks = {picture.image: picture.lesion for picture in pictures if picture.lesion is not None}
                self._lesions = Lesions(masks, facts.read_lesion, self._cache_side)
            self.splits = {
                name: [sample for sample in samples if split_of[sample.patient_id] == name] for name in SPLITS
            }
            if self.genome is not None:
                self.genome.fit({sample.person for sample in self.splits["train"] if sample.person is not None})
            self.ledger.num_samples = len(samples)
            self.store = self.make_store(_reader_of(archive))
            self.archive = archive
        return self.archive

    def _without_relatives(self, pictures: Sequence[Picture], parts: dict[str, str]) -> dict[str, str]:
        """Move people until nobody has a relative in another split."""
        assert self._kinship is not None
        together = relatives_together(pictures, parts, read_kinship(Path(self._kinship).expanduser()))
        moved = {
            picture.patient_id for picture in pictures if parts.get(picture.case_id) != together.get(picture.case_id)
        }
        print_line(f"kinship: {len(moved)} people are in another split, with their relatives")
        if "train" not in together.values():
            raise DataError("Everyone is related to someone who is held out, so nobody is left to train on.")
        return together

    def _join(self, archive: Archive, split_of: dict[str, str]) -> dict[str, str]:
        """Read the genetics, and return whose belong to each patient."""
        root, facts, named, pairing = archive.tree.root, archive.facts, self._config, self._config.pairing
        files: GenomeFiles = named
        if not named.any and facts.genome_files is not None:
            files = facts.genome_files(archive.tree)
        if named.step is not None:
            files = replace(files, step=named.step)
        kinds = facts.genome_kinds(archive.tree) if facts.genome_kinds is not None and not named.any else []
        if not files.any and not kinds:
            if pairing == "id":
                raise DataError(f"data.genome.pairing is 'id', but no genotypes, scores or burden table lie in {root}: "
                                "looked for genetics/*_chr{1..22}* or *_c{1..22}_b0_v*, pgs/*.sscore and "
                                "burden/combined_burdens.h5.")  # fmt: skip
            print_line("genetics: none")
            return {}
        training = [patient for patient, split in split_of.items() if split == "train"]
        self.genome = read_genome(files, root, named.clip, training)
        self.genome.kinds += kinds
        known = self.genome.persons
        if pairing == "synthetic" or (pairing == "auto" and not facts.named):
            name = archive.layout.name
            print_line(f"note: {name} and these genetics are of different people, so their pairing is synthetic")
            return pair_persons(split_of, known, self._split[1])
        joined = join_ids(split_of, known)
        if not joined.found:
            one, other = public_name(next(iter(split_of))), public_name(known[0])
            raise DataError(
                f"None of the {len(split_of)} people with images (such as {one}) is among the {len(known)} with "
                f"genetics (such as {other}): check the identifiers, or set data.genome.pairing to "
                f"synthetic to pair strangers{mending(joined)}."
            )
        print_line(joined.counts("genetics", "people with images") + mending(joined))
        return joined.found

    def _samples(self, pictures: Sequence[Picture], persons: dict[str, str]) -> list[Sample]:
        if not self._one_per_subject:
            whose = [(p.case_id, p.patient_id, (p.image,), persons.get(p.patient_id)) for p in pictures]
            return self._kept([Sample(*each) for each in whose])
        images: dict[str, list[Path]] = {}
        for picture in pictures:
            images.setdefault(picture.patient_id, []).append(picture.image)
        return self._kept([Sample(name, name, tuple(files), persons.get(name)) for name, files in images.items()])

    def _kept(self, samples: list[Sample]) -> list[Sample]:
        """Leave out people who lack a kind of genetics, where that was asked for."""
        if not self._config.complete_only:
            return samples
        if self.genome is None:
            raise DataError("data.genome.complete_only asks for genetics, and there are none: name them with "
                            "data.genome.genotypes.")  # fmt: skip
        kept = [sample for sample in samples if all(self.genome.has(sample.person))]
        if not kept:
            raise DataError(f"None of the {len(samples)} people has every kind of genetics.")
        return kept

    @property
    def input_spec(self) -> InputSpec:
        """Channels, image size, genetics and preprocessing of the batches."""
        preprocessing: dict[str, Any] = {
            "layout": self.index().layout.name,
            "intensity": "colour in [0, 1], minus mean, over std",
            "mean": list(three_values(self.mean)),
            "std": list(three_values(self.std)),
            "resize": "bicubic, antialiased",
            "field": _reader_of(self.index()).name,
        }
        if self.genome is not None:
            preprocessing["genome"] = self.genome.fingerprint()
        return InputSpec(CHANNELS, self.image_size, {}, preprocessing, genome=self.genome.sizes if self.genome else {})

    def state_dict(self) -> dict[str, Any]:
        """Return the loader's position and the statistics of the training people (Lightning hook)."""
        state = super().state_dict()
        if self.genome is not None:
            state |= {"genome": self.genome.statistics(), "genome_fingerprint": self.genome.fingerprint()}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the position, and refuse statistics that differ from those the run began with (Lightning hook).

        Raises:
            DataError: the training people or their genetics have changed.
        """
        stored = state_dict.get("genome_fingerprint")
        if stored is not None and self.genome is not None and stored != self.genome.fingerprint():
            raise DataError("The genetics of the training people are not those that the checkpoint was trained with.")
        super().load_state_dict({name: value for name, value in state_dict.items() if not name.startswith("genome")})

    def member_paths(self, case: Picture) -> Sequence[Path]:
        """Return the one image of a picture."""
        return (case.image,)

    def images_of(self, case: Sample) -> Sequence[Path]:
        """Return the images of a person."""
        return case.images

    def setup(self, stage: str) -> None:
        """Record broken files in the ledger and log a summary of the data (Lightning hook).

        Raises:
            DataError: no image can be used.
        """
        layout, counts = self.index().layout, self.register_faults(stage)
        size = "x".join(map(str, self.image_size))
        print_line(f"data: {layout.name} at {self.root}, samples {counts}, images {size}, "
            + (f"genetics: {self.genome.describe()}" if self.genome else "no genetics"))  # fmt: skip

    def _dataset(self, cases: Sequence[Sample], train: bool = False, controls: bool = False) -> ImageGenomeDataset:
        return ImageGenomeDataset(
            cases,
            self.store,
            self.genome,
            self._image,
            train,
            self.seed,
            controls=self.splits["train"] if controls else None,
            lesions=self._lesions if controls else None,
            anonymise=self.ledger.anonymise,
        )

    def _evaluated(self, cases: Sequence[Sample]) -> ImageGenomeDataset:
        return self._dataset(cases, controls=True)

    def _usable(self, cases: Iterable[Sample]) -> list[Sample]:
        """Leave out people none of whose images can be used."""
        bad = {fault.path for fault in self.ledger.faults}
        return [case for case in cases if any(str(path) not in bad for path in case.images)]

    def collate_function(self) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Return the collate function."""
        return collate_images

    def training_genomes(self, max_persons: int | None = None) -> np.ndarray:
        """Return the standardised genetics of the training people ``(P, F)``, each person once, for baselines.

        Args:
            max_persons: How many to return at most, drawn by a hash of their names; None returns all.

        Raises:
            DataError: there are none.
        """
        if self.genome is None:
            raise DataError("These images have no genetics.")
        persons = sorted({sample.person for sample in self.splits["train"] if sample.person is not None})
        if max_persons is not None and len(persons) > max_persons:
            persons = sorted(sorted(persons, key=lambda name: stable_hash("genome floor", name))[:max_persons])
        return np.stack([self.genome.read(person)[0] for person in persons])

    def examine(self, deep: bool, workers: int) -> list[str]:
        """Print a report on the archive and return the reasons why training would refuse it."""
        layout = self.index().layout
        terms = self.terms(self.paths_in_use(), self.draws_per_image)
        return examine(layout.name, self.genome, terms, deep, workers)
