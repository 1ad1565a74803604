"""Images with a text each for downstream tasks: what question answering, retrieval and classification share."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from common.errors import DataError
from common.faults import Fault, SampleFaultError
from common.pseudonyms import pseudonym
from common.randomness import numpy_generator, stable_hash
from common.runtime.reporting import print_line
from common.types import InputSpec
from datamodules.base import FaultTolerantDataset, collate_samples
from datamodules.configs import CacheConfig, Channelwise, ImageConfig, LoaderConfig, check_crop_scale, three_values
from datamodules.images.cache import BoxChoice, ImageCache, SourceImages
from datamodules.images.crops import center_box, random_box
from datamodules.images.reading import CHANNELS, FIGURE, per_channel
from datamodules.loading import Draw, ResumableLoader
from datamodules.pairs.checks import examine
from datamodules.pairs.vqa import Question
from datamodules.reports.archive import TextArchiveDataModule, TextConfig
from datamodules.reports.studies import CaptionedImage

#: Mean and standard deviation of CLIP's preprocessing: red, green, blue.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
#: Which image a text is paired with: its own, that of another pair (when evaluating), or none.
Shown = Literal["own", "permuted", "blank"]


#: An image with a text, which may be empty.
Pair = CaptionedImage | Question
#: Computes a task's additions to a sample from the pair and its draw.
Facts = Callable[[Any, Draw], Mapping[str, Any]]


def other_images(paths: Iterable[Path], seed: int = 0) -> dict[Path, Path]:
    """Map every image to another one: a rotation in a seeded order."""
    distinct = sorted(set(paths))
    order = [distinct[i] for i in numpy_generator("permuted images", seed).permutation(len(distinct))]
    return dict(zip(order, order[1:] + order[:1], strict=True))


class PairDataset(FaultTolerantDataset):
    """Crops of images, tokens of texts, and a task's additions, ``facts``.

    Crops are drawn at random in training. ``substitutes`` are images that are shown in place of others; None shows the
    mean gray.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        store: ImageCache | SourceImages,
        encode: Callable[[str], Tensor],
        image: "PairImageConfig",
        facts: Facts,
        train: bool,
        seed: int,
        substitutes: Mapping[Path, Path] | None = {},
        anonymise: bool = False,
    ) -> None:
        super().__init__(seed)
        self.pairs, self.store, self.encode = list(pairs), store, encode
        self.image_size, self.crop_scale = tuple(image.size), image.crop_scale if train else None
        self.mean, self.std = (per_channel(three_values(value)) for value in (image.mean, image.std))
        self.facts, self.substitutes, self.anonymise = facts, substitutes, anonymise

    def __len__(self) -> int:
        return len(self.pairs)

    def subject(self, index: int) -> str:
        """Return the pair's name."""
        return self.pairs[index].case_id

    def _image(self, pair: Pair, draw: Draw) -> Tensor:
        if self.substitutes is None:
            return torch.zeros(3, *self.image_size)
        choose: BoxChoice = partial(center_box, size=self.image_size)
        if self.crop_scale is not None:
            generator = numpy_generator("crop", self.seed, draw.epoch, pair.case_id, draw.draw)
            choose = partial(random_box, scale=self.crop_scale, generator=generator)
        try:
            image = self.store.crop(self.substitutes.get(pair.image, pair.image), choose, self.image_size)
        except SampleFaultError as error:
            raise SampleFaultError(fault._replace(sample=pair.case_id) for fault in error.faults) from error
        return (image - self.mean) / self.std

    def read(self, draw: Draw) -> dict[str, Any]:
        """Return one sample; see :class:`common.types.ImageTextTaskBatch`.

        Raises:
            SampleFaultError: the image cannot be used, or the text is empty.
        """
        pair = self.pairs[draw.index]
        if not pair.text:
            raise SampleFaultError([Fault(pair.case_id, "empty", "no text", pair.case_id)])
        hide = pseudonym if self.anonymise else str
        return {
            "image": self._image(pair, draw),
            "image_key": stable_hash("image", pair.image),
            "input_ids": self.encode(pair.text),
            "subject_id": hide(pair.case_id),
            "patient_id": hide(pair.patient_id),
            "text": "" if self.anonymise else pair.text,
            **self.facts(pair, draw),
        }


def collate_pairs(samples: list[dict[str, Any]], pad_id: int) -> dict[str, Any]:
    """Join samples; texts are padded to the longest of the batch. Several candidate texts make ``(B, C, T)``."""
    batch: dict[str, Any] = {}
    for name, mask in (("input_ids", "attention_mask"), ("candidate_ids", "candidate_mask")):
        if name not in samples[0]:
            continue
        rows = [sample.pop(name) for sample in samples]
        texts = [text for row in rows for text in (row if isinstance(row, list) else [row])]
        padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=pad_id)
        real = torch.nn.utils.rnn.pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
        shape = (len(rows), -1, padded.shape[1]) if isinstance(rows[0], list) else padded.shape
        batch |= {name: padded.reshape(shape), mask: real.reshape(shape)}
    return batch | collate_samples(samples)


@dataclass(frozen=True)
class PairImageConfig(ImageConfig):
    """Images that a text of a task is about.

    Args:
        crop_scale: Share of an image's area that a training crop has; None cuts the central crop.
        shown: Which image a text is shown: ``"own"``; ``"permuted"`` when evaluating; ``"blank"``, always.
    """

    size: tuple[int, int] = (384, 384)
    mean: Channelwise = CLIP_MEAN
    std: Channelwise = CLIP_STD
    crop_scale: tuple[float, float] | None = (0.9, 1.0)
    shown: Shown = "own"

    def __post_init__(self) -> None:
        check_crop_scale(self.crop_scale)


class PairDataModule(TextArchiveDataModule):
    """Images with texts for a downstream task: cache, tokenizer, loaders. Subclasses list pairs and add targets.

    Args:
        root: The archive.
        image: The crops, and which image a text is shown.
        text: The texts.
        cache: Copies of the images that are kept.
        loader: How samples are drawn, and how many may be broken.
        test_split: Split that ``lightning test`` reads.
        batch_size: Pairs per device.
        **settings: Those of :class:`datamodules.base.ArchiveDataModule`.
    """

    item_name = "pairs"
    #: What the archive is called.
    layout_name = ""

    def __init__(
        self,
        root: str,
        image: PairImageConfig = PairImageConfig(),
        text: TextConfig = TextConfig(32, tokenizer_kind="bpe", end_token=True),
        cache: CacheConfig = CacheConfig(side=448),
        loader: LoaderConfig = LoaderConfig(),
        test_split: Literal["train", "val", "test"] = "test",
        batch_size: int = 32,
        **settings: Any,
    ) -> None:
        super().__init__(text, root=root, image=image, cache=cache, loader=loader, batch_size=batch_size, **settings)
        self._image, self.shown, self.test_split = image, image.shown, test_split
        self._classes: tuple[str, ...] = ()

    @abstractmethod
    def find(self, root: str) -> dict[str, list[Any]]:
        """List the pairs of train, val and test. Reads names and tables, no image.

        Raises:
            DataError: not the layout, a damaged table, and the like.
        """

    @abstractmethod
    def facts(self, pair: Any, draw: Draw) -> Mapping[str, Any]:
        """Return what the task adds to a sample."""

    def describe(self) -> str:
        """Return further facts about the data."""
        return ""

    def task_classes(self) -> tuple[str, ...]:
        """Return the classes that the task chooses from; none for a single question, which the checkpoint knows."""
        self.index()
        return self._classes

    def index(self) -> str:
        """List the pairs; return the layout's name.

        Raises:
            DataError: the root does not exist, nothing to train on, and as :meth:`find`.
        """
        if not self.splits:
            splits = self._place_splits(self.find(self.root))
            if not splits["train"]:
                raise DataError(f"The training split of {self.root} is empty.")
            self.ledger.num_samples = sum(map(len, splits.values()))
            self.splits = splits
            self.store = self.make_store(FIGURE)
        return self.layout_name

    def _place_splits(self, splits: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """Return the splits as a resumed run had them; those in which a pair comes twice are left alone."""
        pairs = [pair for part in splits.values() for pair in part]
        parts = {pair.case_id: name for name, part in splits.items() for pair in part}
        if len(parts) == len(pairs):
            parts = self.place(pairs, parts, False, self.layout_name)
            return {name: [pair for pair in pairs if parts.get(pair.case_id) == name] for name in splits}
        return {name: list(part) for name, part in splits.items()}

    def training_texts(self) -> list[str]:
        """Return the distinct texts of the training split, in their order."""
        self.index()
        return list(dict.fromkeys(pair.text for pair in self.splits["train"] if pair.text))

    def encode(self, text: str) -> Tensor:
        """Return the tokens of a text, long ``(T,)``."""
        return self.tokenizer.encode(text, self.text_length, self.end_token).ids

    @property
    def input_spec(self) -> InputSpec:
        """Channels, crop size, vocabulary, classes and preprocessing of the batches."""
        preprocessing = {
            "layout": self.layout_name,
            "intensity": "RGB in [0, 1], minus mean, over std",
            "mean": list(three_values(self.mean)),
            "std": list(three_values(self.std)),
            "resize": "bicubic, antialiased",
        }
        return InputSpec(CHANNELS, self.image_size, {}, preprocessing, self.vocabulary, self.task_classes())

    def images_of(self, case: Pair) -> Sequence[Path]:
        """Return the one image."""
        return (case.image,)

    def known_faults(self) -> list[Fault]:
        """Return the known faults: images that cannot be read, and pairs without a text."""
        silent = [case.case_id for case in self.cases_in_use() if not case.text]
        return super().known_faults() + [Fault(name, "empty", "no text", name) for name in silent]

    def setup(self, stage: str) -> None:
        """Record broken files in the ledger, save the tokenizer with the run, and log a summary (Lightning hook).

        Raises:
            DataError: no pair can be used.
        """
        counts = self.register_faults(stage)
        print_line(f"data: {self.layout_name} at {self.root}, {self.item_name} {counts}, {len(self.paths_in_use())} "
            f"images, vocabulary of {self.tokenizer.vocab_size}{self.describe()}")  # fmt: skip
        self.keep_tokenizer(stage)

    def _dataset(self, cases: Sequence[Any], train: bool = False) -> PairDataset:
        substitutes: Mapping[Path, Path] | None = {}
        if self.shown == "blank":
            substitutes = None
        elif self.shown == "permuted" and not train:
            substitutes = other_images(case.image for case in cases)
        hidden = self.ledger.anonymise
        return PairDataset(
            cases, self.store, self.encode, self._image, self.facts, train, self.seed, substitutes, hidden
        )

    def collate_function(self) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Return the collate function, which pads texts."""
        return partial(collate_pairs, pad_id=self.tokenizer.pad_id)

    def predict_dataloader(self) -> ResumableLoader:
        """Return the pairs that ``test`` reads (Lightning hook)."""
        return self.test_dataloader()

    def examine(self, deep: bool, workers: int) -> list[str]:
        """Print a report on the archive and return the reasons why training would refuse it."""
        name, paths = self.index(), self.paths_in_use()
        return examine(name, self.item_name, paths, self.terms(paths), deep, workers, self.describe())
