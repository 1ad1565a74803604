"""Images with reports for pre-training: one data module for every layout."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import DataError
from common.faults import Fault, SampleFaultError
from common.maskers.bert import BertMasker
from common.maskers.words import WordMasker
from common.pseudonyms import pseudonym
from common.randomness import KeyedGenerator, numpy_generator, stable_hash
from common.runtime.reporting import print_line
from common.types import InputSpec
from datamodules.base import FaultTolerantDataset, collate_samples
from datamodules.configs import CacheConfig, ImageConfig, LoaderConfig, SplitConfig, check_crop_scale
from datamodules.controls import read_control
from datamodules.images.cache import BoxChoice, ImageCache, SourceImages
from datamodules.images.crops import center_box, random_box
from datamodules.images.reading import CHANNELS, FIGURE, GRAY, per_channel, plain_numbers
from datamodules.loading import Draw
from datamodules.registry import Archive, Settings
from datamodules.reports.archive import TextArchiveDataModule, TextConfig
from datamodules.reports.checks import examine
from datamodules.reports.studies import Study, studies_of
from datamodules.reports.text import Extract, ReportError, extract_of, study_text
from datamodules.reports.tokens import ReportTokenizer
from datamodules.splits import SPLITS, assign_splits

Flip = Literal["off", "swap_words", "naive"]
_OTHER_SIDE = {"left": "right", "right": "left"}
_SIDES = re.compile(r"\b(left|right)", re.IGNORECASE)


def swap_sides(text: str) -> str:
    """Exchange left and right, also inside longer words such as ``right-sided``; capitals are kept."""

    def other(match: re.Match[str]) -> str:
        word = _OTHER_SIDE[match[0].lower()]
        return (
            word.upper()
            if match[0].isupper() and len(match[0]) > 1
            else word.title()
            if match[0][0].isupper()
            else word
        )

    return _SIDES.sub(other, text)


@dataclass(frozen=True)
class ReportImageConfig(ImageConfig):
    """Images that come with a text.

    Args:
        crop_scale: Area of a training crop as a share of the image; None: the central crop.
        flip: ``"off"``; ``"swap_words"`` mirrors half of the training crops and exchanges left and right in the report;
            ``"naive"`` only mirrors, so that the words for the sides become wrong.
        colour: Whether images are read in colour, otherwise grey.
    """

    size: tuple[int, int] = (448, 448)
    crop_scale: tuple[float, float] | None = (0.2, 1.0)
    flip: Flip = "off"
    colour: bool = False

    def __post_init__(self) -> None:
        check_crop_scale(self.crop_scale)


@dataclass(frozen=True)
class ReportTextConfig(TextConfig):
    """Texts with hidden words.

    Args:
        part: ``"findings_impression"`` or ``"full"``.
        keep_redactions: Whether ``___``, which marks removed parts of a report, is kept.
        unique: Whether to keep only one sample per distinct text, ignoring capitals, and none without text, before
            splitting: for archives that repeat reports between patients.
        pad_to_length: Whether texts are padded to ``length``, otherwise to the longest of their batch.
        mask_ratio: Probability of hiding a word.
        mask_unit: ``"word"`` or ``"token"``.
        mask_last: Whether the last of the ``length`` positions may be hidden.
        mask_scheme: ``"independent"`` draws for each word and always writes the mask token
            (:class:`common.maskers.words.WordMasker`); ``"bert"`` hides a fixed share of each text, 80 % of it by
            the mask token (:class:`common.maskers.bert.BertMasker`).
    """

    part: Literal["findings_impression", "full"] = "findings_impression"
    keep_redactions: bool = False
    unique: bool = False
    pad_to_length: bool = False
    mask_ratio: float = 0.5
    mask_unit: Literal["word", "token"] = "word"
    mask_last: bool = True
    mask_scheme: Literal["independent", "bert"] = "independent"

    def masker(self) -> WordMasker | BertMasker:
        """Return the word masker."""
        if self.mask_scheme == "bert":
            return BertMasker(self.mask_ratio, self.mask_unit)
        return WordMasker(self.mask_ratio, self.mask_unit, self.mask_last)


@dataclass(frozen=True)
class SampleConfig:
    """What makes a sample.

    Args:
        pair: ``"image"`` makes every image a sample with its study's report; ``"study"`` makes one sample per
            study, with a view drawn anew every epoch.
        views: Views to keep, such as ``[AP, PA]``; None: all.
        complete: Whether only samples with image and text are used.
        negative_images: Whether each sample comes with the image of another one.
    """

    pair: Literal["image", "study"] = "image"
    views: list[str] | None = None
    complete: bool = False
    negative_images: bool = False


class TextSettings(NamedTuple):
    """How reports become tokens.

    Attributes:
        part: ``"findings_impression"`` or ``"full"``; see :mod:`datamodules.reports.text`.
        length: T, most tokens, including the class token.
        masker: Chooses the hidden words and replaces them.
        end: Whether the tokenizer's end token, if it has one, comes last.
        redactions: Whether ``___``, which marks removed parts of a report, is kept.
    """

    part: str
    length: int
    masker: WordMasker | BertMasker
    end: bool = False
    redactions: bool = False


class Sample(NamedTuple):
    """An image with its report, or a study with views to draw from.

    Attributes:
        case_id: Unique name.
        patient_id: Splits are made by patient.
        images: The views to choose from; empty: only text.
        study: The study with the text.
        split: The archive's own split.
    """

    case_id: str
    patient_id: str
    images: tuple[Path, ...]
    study: Study
    split: str | None


def samples_of(studies: Sequence[Study], pair: str, views: Sequence[str] | None) -> list[Sample]:
    """Make the samples of studies, one per image or one per study, using only some views.

    Raises:
        DataError: no image shows one of the views.
    """
    samples = []
    wanted = None if views is None else {view.upper() for view in views}
    for study in studies:
        shown = study.views or ("",) * len(study.images)
        images = [
            path for path, view in zip(study.images, shown, strict=True) if wanted is None or view.upper() in wanted
        ]
        if study.images and not images:
            continue
        if pair == "study" or len(study.images) <= 1:
            samples.append(Sample(study.case_id, study.patient_id, tuple(images), study, study.split))
        else:
            samples += [
                Sample(f"{study.case_id}/{path.stem}", study.patient_id, (path,), study, study.split) for path in images
            ]
    if not samples:
        found = sorted({view for study in studies for view in study.views})
        raise DataError(f"No image shows any of the views {', '.join(views or ())}; there are {', '.join(found)}.")
    return samples


def distinct(samples: Sequence[Sample], extract: Extract, text: TextSettings) -> list[Sample]:
    """Keep the first sample of each distinct text, ignoring capitals; drop samples without readable text."""
    kept: dict[str, Sample] = {}
    for sample in samples:
        try:
            kept.setdefault(study_text(sample.study, extract, text.part, text.redactions).lower(), sample)
        except ReportError:
            continue
    kept.pop("", None)
    return list(kept.values())


class ImageTextDataset(FaultTolerantDataset):
    """Crops of images and tokens of their reports, with hidden words.

    Args:
        samples: The samples.
        extract: Extracts the text to use from a report.
        store: Opens images.
        tokenizer: The tokenizer.
        text: How reports become tokens.
        image: How images are cut.
        train: Whether crops, views and hidden words are drawn anew every epoch from the run's seed; otherwise they are
            fixed per subject in every run.
        seed: Seed of the training draws.
        controls: Samples of other patients, the control of the collapse diagnostics; None: no control.
        anonymise: Whether subjects get pseudonyms.
        complete: Whether a sample needs both image and text; otherwise one is enough.
        negatives: Whether each sample comes with the image of another one.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        extract: Extract,
        store: ImageCache | SourceImages,
        tokenizer: ReportTokenizer,
        text: TextSettings,
        image: ReportImageConfig,
        train: bool,
        seed: int,
        controls: Sequence[Sample] | None = None,
        anonymise: bool = False,
        complete: bool = False,
        negatives: bool = False,
    ) -> None:
        super().__init__(seed)
        self.samples = list(samples)
        self.extract, self.store, self.tokenizer, self.text = extract, store, tokenizer, text
        self.image_size = tuple(image.size)
        self.train = train
        self.crop_scale, self.flip = image.crop_scale, image.flip
        self.mean, self.std = per_channel(image.mean), per_channel(image.std)
        self.complete, self.negatives = complete, negatives
        self.controls = [sample for sample in controls or () if sample.images]
        self.anonymise = anonymise

    def __len__(self) -> int:
        return len(self.samples)

    def subject(self, index: int) -> str:
        """Return the sample's name."""
        return self.samples[index].case_id

    def read(self, draw: Draw) -> dict[str, Any]:
        """Return one sample; see :class:`common.types.ImageTextBatch`.

        Raises:
            SampleFaultError: neither image nor text can be used.
        """
        sample = self.samples[draw.index]
        generator = numpy_generator("crop", *self.draw_key(draw, self.train))
        mirror = self.train and self.flip != "off" and generator.random() < 0.5
        faults: list[Fault] = []
        image = self._image(sample, generator, mirror, faults)
        text = self._text(sample, faults)
        if (image is None and not text) or (self.complete and (image is None or not text)):
            detail = "neither image nor text" if image is None else "no text"
            raise SampleFaultError(faults or [Fault(sample.case_id, "empty", detail, sample.case_id)])
        if mirror and self.flip == "swap_words":
            text = swap_sides(text)
        key = torch.tensor(stable_hash("mask", *self.draw_key(draw, self.train)))
        result: dict[str, Any] = {
            "image": self._standardised(image),
            "modality_mask": torch.tensor([image is not None, bool(text)]),
            "key": key,
            "image_key": stable_hash("image", *sample.images[:1] or [sample.case_id]),
            "subject_id": pseudonym(sample.case_id) if self.anonymise else sample.case_id,
            "patient_id": pseudonym(sample.patient_id) if self.anonymise else sample.patient_id,
            "faults": faults,
        }
        result |= self._tokens(text, key)
        if self.controls:
            result["control_image"] = self._standardised(self._control(sample, draw))
        if self.negatives:
            result["negative_image"] = self._standardised(self._negative(sample, draw))
        return result

    def _image(
        self, sample: Sample, generator: np.random.Generator, mirror: bool, faults: list[Fault]
    ) -> Tensor | None:
        """Return a crop of one view; None and a fault if it cannot be read."""
        if not sample.images:
            return None
        path = sample.images[int(generator.integers(len(sample.images))) if self.train else 0]
        choose: BoxChoice = partial(center_box, size=self.image_size)
        if self.train and self.crop_scale is not None:
            choose = partial(random_box, scale=self.crop_scale, generator=generator)
        try:
            return self.store.crop(path, choose, self.image_size, mirror)
        except SampleFaultError as error:
            faults += [fault._replace(sample=sample.case_id) for fault in error.faults]
            return None

    def _text(self, sample: Sample, faults: list[Fault]) -> str:
        """Return the text; empty if there is none, with a fault if one is listed but damaged."""
        try:
            return study_text(sample.study, self.extract, self.text.part, self.text.redactions)
        except ReportError as error:
            if error.kind != "empty":
                faults.append(Fault(str(sample.study.text), error.kind, error.detail, sample.case_id))
            return ""

    def _tokens(self, text: str, key: Tensor) -> dict[str, Tensor]:
        encoded = self.tokenizer.encode(text, self.text.length, self.text.end)
        generator = KeyedGenerator(key[None], "words")
        hidden = self.text.masker(encoded.starts[None], encoded.maskable[None], generator)[0]
        seen = self.text.masker.corrupt(
            encoded.ids[None], hidden[None], self.tokenizer.mask_id, self.tokenizer.vocab_size, generator
        )
        return {"input_ids": seen[0], "labels": encoded.ids.masked_fill(~hidden, -100)}

    def _standardised(self, image: Tensor | None) -> Tensor:
        """Return the image in the encoder's units; the mean, which is 0, if there is none."""
        if image is None:
            return torch.zeros(max(self.store.reader.channels, len(self.mean)), *self.image_size)
        return (image - self.mean) / self.std

    def _negative(self, sample: Sample, draw: Draw) -> Tensor | None:
        """Cut the image of another sample, drawn anew every epoch; None if none can be read."""
        first = stable_hash("negative", *self.draw_key(draw, self.train))
        for attempt in range(len(self.samples)):
            other = self.samples[(first + attempt) % len(self.samples)]
            if other.images and other.images[0] != sample.images[0]:
                image = self._image(other, numpy_generator("negative", *self.draw_key(draw, self.train)), False, [])
                if image is not None:
                    return image
        return None

    def _control(self, sample: Sample, draw: Draw) -> Tensor | None:
        """Cut the image of another patient; None if none can be read."""

        def read(other: Sample) -> Tensor:
            faults: list[Fault] = []
            image = self._image(other, numpy_generator("control"), False, faults)
            if image is None:
                raise SampleFaultError(faults)
            return image

        return read_control(sample, draw, self.controls, read)


def collate_image_text(samples: list[dict[str, Any]], pad_id: int, length: int = 0) -> dict[str, Any]:
    """Collate samples; texts are padded to the longest of the batch, or to ``length`` if that is more.

    Hidden positions are listed here, on the CPU, so that no step waits for their number: ``hidden_index`` indexes the
    flattened ``(B, T)``, ``hidden_ids`` are the true tokens there.
    """
    ids = [sample.pop("input_ids") for sample in samples]
    labels = [sample.pop("labels") for sample in samples]

    def pad(rows: list[Tensor], value: int) -> Tensor:
        joined = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
        return F.pad(joined, (0, max(length - joined.shape[1], 0)), value=value)

    batch = collate_samples(samples)
    batch["input_ids"] = pad(ids, pad_id)
    batch["attention_mask"] = pad([torch.ones_like(row) for row in ids], 0)
    batch["labels"] = pad(labels, -100)
    batch["hidden_index"] = (batch["labels"] != -100).flatten().nonzero()[:, 0]
    batch["hidden_ids"] = batch["labels"].flatten()[batch["hidden_index"]]
    return batch


class ImageTextDataModule(TextArchiveDataModule):
    """Radiographs, or other images, with their reports, in any known layout, split by patient.

    Args:
        root: The archive.
        layout: Name of its layout; ``"auto"`` recognises it from the tree.
        table: Name of a manifest's table under the root, such as ``metadata.csv``; None: ``manifest.csv``,
            ``.jsonl`` or ``.parquet``. This and ``columns`` imply the layout ``manifest``.
        columns: Columns of a manifest by role (image, text, subject, split, view, folder); None: named by their roles.
        samples: What makes a sample.
        image: The crops, which are the target; the encoder may see fewer pixels.
        text: The texts, and which of their words are hidden.
        cache: The cache of images.
        split: Which patients train, validate and test.
        loader: How samples are drawn, and how many may be faulty.
        batch_size: Samples per device.
        num_workers: Loader processes per rank; also threads that build the cache.
        anonymise: Whether subjects and texts are kept out of logs, figures and fault files.
        seed: Seed of order, crops and masks; None takes ``seed_everything``'s.
        **membership: ``seen_patients``, ``changed_archive`` and ``split_from`` of
            :class:`datamodules.base.ArchiveDataModule`.
    """

    def __init__(
        self,
        root: str,
        layout: str = "auto",
        table: str | None = None,
        columns: dict[str, str] | None = None,
        samples: SampleConfig = SampleConfig(),
        image: ReportImageConfig = ReportImageConfig(),
        text: ReportTextConfig = ReportTextConfig(),
        cache: CacheConfig = CacheConfig(side=512),
        split: SplitConfig = SplitConfig(),
        loader: LoaderConfig = LoaderConfig(),
        batch_size: int = 256,
        num_workers: int = 0,
        anonymise: bool = False,
        seed: int | None = None,
        **membership: Any,
    ) -> None:
        super().__init__(
            text,
            root=root,
            image=image,
            cache=cache,
            loader=loader,
            batch_size=batch_size,
            num_workers=num_workers,
            anonymise=anonymise,
            seed=seed,
            **membership,
        )
        manifest = table is not None or columns is not None
        if manifest and layout not in ("auto", "manifest", "table"):
            raise ValueError(f"`table` and `columns` describe a manifest, not the layout {layout}: leave one out.")
        self._image = image
        self.text = TextSettings(text.part, text.length, text.masker(), text.end_token, text.keep_redactions)
        self.pad_to_length = text.pad_to_length
        self.colour, self.complete, self.negative_images = image.colour, samples.complete, samples.negative_images
        self._layout_name = "manifest" if manifest else layout
        self._settings = Settings(table=table, columns=columns or {})
        self._pair, self._views = samples.pair, samples.views
        self._unique_texts = text.unique
        self._split = (split.fractions, split.seed, split.file)
        self.samples: list[Sample] = []
        self._counts: Tensor | None = None

    @property
    def needs(self) -> frozenset[str]:
        """Images and texts; a sample may lack one of them unless ``complete`` is set."""
        return frozenset({"images", "text"})

    @property
    def optional(self) -> tuple[str, ...]:
        """Images, unless each sample must have both: reports alone can be read as text."""
        return () if self.complete else ("images",)

    def index(self) -> Archive:
        """Recognise the layout, list and split the samples. Reads names and tables only, no images.

        Raises:
            DataError: unknown layout, missing columns, a patient in two splits, and the like.
        """
        if self.archive is None:
            archive = self.open(self.root, self._layout_name, self._settings)
            samples = samples_of(studies_of(archive), self._pair, self._views)
            if self.complete:
                samples = self._complete(samples)
            if self._unique_texts:
                samples = distinct(samples, extract_of(archive), self.text)
            parts = assign_splits(samples, *self._split)
            seeded = self._split[2] is None and not any(sample.split for sample in samples)
            parts = self.place(samples, parts, seeded, self._split)
            self.samples = samples
            self.splits = {name: [sample for sample in samples if parts.get(sample.case_id) == name] for name in SPLITS}
            self.ledger.num_samples = len(parts)
            self.store = self.make_store(FIGURE if self.colour else GRAY)
            self.archive = archive
        return self.archive

    def images_of(self, case: Sample) -> Sequence[Path]:
        """Return the views of a sample."""
        return case.images

    def _complete(self, samples: Sequence[Sample]) -> list[Sample]:
        """Keep the samples that have both an image and a text.

        Raises:
            DataError: there is none.
        """
        kept = [sample for sample in samples if sample.images and sample.study.text]
        if not kept:
            raise DataError(f"None of the {len(samples)} samples under {self.root} has both an image and a text.")
        if len(kept) < len(samples):
            print_line(f"note: {len(samples) - len(kept)} of {len(samples)} samples lack an image or a text; left out")
        return kept

    def text_of(self, sample: Sample) -> str:
        """Return a sample's text as it is used; empty if it has none.

        Raises:
            ReportError: a listed report cannot be read.
        """
        return study_text(sample.study, extract_of(self.index()), self.text.part, self.text.redactions)

    def training_texts(self) -> list[str]:
        """Return the texts of the training studies, each once, in a fixed order; unreadable ones are left out."""
        self.index()
        texts = {}
        for sample in self.splits["train"]:
            if sample.study.case_id not in texts:
                try:
                    texts[sample.study.case_id] = self.text_of(sample)
                except ReportError:
                    texts[sample.study.case_id] = ""
        return [text for text in texts.values() if text]

    @property
    def input_spec(self) -> InputSpec:
        """Channels, crop size, vocabulary and preprocessing of the batches."""
        preprocessing = {
            "layout": self.index().layout.name,
            "intensity": "RGB in [0, 1], minus mean, over std"
            if self.colour
            else "grayscale in [0, 1], minus mean, over std, repeated three times",
            "mean": plain_numbers(self.mean),
            "std": plain_numbers(self.std),
            "resize": "bicubic, antialiased",
            "text": self.text.part,
        }
        return InputSpec(CHANNELS, self.image_size, {}, preprocessing, self.vocabulary)

    def all_cases(self) -> list[Sample]:
        """Return every sample of the archive, whether or not it is used."""
        self.index()
        return self.samples

    def setup(self, stage: str) -> None:
        """Record broken files in the ledger, save the tokenizer with the run, and log a summary (Lightning hook).

        Raises:
            DataError: no sample can be used.
        """
        layout, counts = self.index().layout, self.register_faults(stage)
        with_text = sum(sample.study.text is not None for sample in self.cases_in_use())
        size = "x".join(map(str, self.image_size))
        print_line(f"data: {layout.name} at {self.root}, samples {counts}, {with_text} with a report, crops {size}, "
            f"vocabulary of {self.tokenizer.vocab_size}")  # fmt: skip
        self.keep_tokenizer(stage)

    def _dataset(self, cases: Sequence[Sample], train: bool = False, controls: bool = False) -> ImageTextDataset:
        return ImageTextDataset(
            cases,
            extract_of(self.index()),
            self.store,
            self.tokenizer,
            self.text,
            self._image,
            train,
            self.seed,
            controls=self.splits["train"] if controls else None,
            anonymise=self.ledger.anonymise,
            complete=self.complete,
            negatives=self.negative_images,
        )

    def _evaluated(self, cases: Sequence[Sample]) -> ImageTextDataset:
        return self._dataset(cases, controls=True)

    def _usable(self, cases: Iterable[Sample]) -> list[Sample]:
        """Leave out samples known to be broken, unless their text is enough."""
        good = {case.case_id for case in super()._usable(cases)}
        alone = not self.complete
        return [case for case in cases if case.case_id in good or (alone and case.study.text is not None)]

    def collate_function(self) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Return the collate function."""
        length = self.text.length if self.pad_to_length else 0
        return partial(collate_image_text, pad_id=self.tokenizer.pad_id, length=length)

    def token_counts(self) -> Tensor:
        """Count the tokens of the training texts that could be hidden, ``(V,)`` long."""
        if self._counts is None:
            counts = torch.zeros(self.tokenizer.vocab_size, dtype=torch.long)
            for text in self.training_texts():
                encoded = self.tokenizer.encode(text, self.text.length)
                counts += torch.bincount(encoded.ids[encoded.maskable], minlength=len(counts))
            self._counts = counts
        return self._counts

    def examine(self, deep: bool, workers: int) -> list[str]:
        """Print a report on the archive and return the reasons why training would refuse it."""
        layout = self.index().layout
        terms = self.terms(self.paths_in_use(), self.draws_per_image)
        return examine(layout.name, terms, self.text_of, lambda: self.tokenizer, self.text.length, deep, workers)
