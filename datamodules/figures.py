"""Figures with captions and a class: MELINDA."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from common.errors import DataError
from common.reporting import contents
from datamodules.loading import Draw
from datamodules.melinda import CaptionedFigure, read_melinda
from datamodules.pairs import CLIP_MEAN, CLIP_STD, PairDataModule, Shown
from datamodules.splits import SPLITS
from datamodules.tokens import Kind


class FigureDataModule(PairDataModule):
    """MELINDA's figures with their captions; the classes are those of the training split.

    Args:
        root: The archive.
        task: ``"p_meth_label"`` (7 classes), ``"i_meth_label"``, ``"p_meth"`` or ``"i_meth"``.
        image_size: See :class:`datamodules.pairs.PairDataModule`, as all that follow.
        cache_side: Shorter side of the cached copies, in pixels.
        cache: ``"npy"`` or ``"none"``.
        crop_scale: Share of an image's area that a training crop has; None cuts the central crop.
        mean: Subtracted from pixels in [0, 1].
        std: What they are divided by then.
        tokenizer: JSON file, folder, or name of the hub.
        tokenizer_kind: ``"wordpiece"`` or ``"bpe"``.
        vocab_size: Tokens at most.
        text_length: Tokens of a caption at most.
        end_token: Whether texts end with the tokenizer's token for that.
        shown: ``"own"``, ``"permuted"`` or ``"blank"``.
        test_split: Split that ``lightning test`` reads.
        batch_size: Figures per device.
        num_workers: Loader processes per rank.
        max_fault_fraction: Share of faulty figures at which training stops.
        anonymise: Whether subjects and texts stay out of logs.
        seed: Seed of order and crops.
    """

    noun = "figures"

    def __init__(
        self,
        root: str,
        task: Literal["p_meth_label", "i_meth_label", "p_meth", "i_meth"] = "p_meth_label",
        image_size: tuple[int, int] = (384, 384),
        cache_side: int = 448,
        cache: Literal["npy", "none"] = "npy",
        crop_scale: tuple[float, float] | None = (0.9, 1.0),
        mean: tuple[float, float, float] = CLIP_MEAN,
        std: tuple[float, float, float] = CLIP_STD,
        tokenizer: str | None = None,
        tokenizer_kind: Kind = "bpe",
        vocab_size: int = 30000,
        text_length: int = 128,
        end_token: bool = True,
        shown: Shown = "own",
        test_split: Literal["train", "val", "test"] = "test",
        batch_size: int = 16,
        num_workers: int = 0,
        max_fault_fraction: float = 0.01,
        anonymise: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            root, image_size, cache_side, cache, crop_scale, mean, std, tokenizer, tokenizer_kind, vocab_size,
            text_length, end_token, shown, test_split, batch_size, num_workers, max_fault_fraction, anonymise, seed,
        )  # fmt: skip
        self._task = task
        self._classes: tuple[str, ...] = ()

    @property
    def layout_name(self) -> str:
        """What the archive is called."""
        return "melinda"

    def find(self, root: Path) -> dict[str, list[CaptionedFigure]]:
        """List the figures by split.

        Raises:
            DataError: the root is another archive, a table is damaged, or no training figure has a class.
        """
        rows = read_melinda(root, self._task)
        if not rows:
            raise DataError(f"{root} holds no train.csv beside melinda_images/; it holds {contents(root)}.")
        self._classes = tuple(sorted({row.label for row in rows if row.split == "train" and row.label}))
        if len(self._classes) < 2:
            raise DataError(f"The training figures of {root} have {len(self._classes)} classes of {self._task}.")
        splits = {name: [row for row in rows if row.split == name] for name in SPLITS}
        splits["train"] = [row for row in splits["train"] if row.label]
        return splits

    def task_classes(self) -> tuple[str, ...]:
        """Return the classes of the training split."""
        self.index()
        return self._classes

    def describe(self) -> str:
        """Return how many classes there are."""
        return f", {len(self._classes)} classes of {self._task}"

    def facts(self, pair: CaptionedFigure, draw: Draw) -> Mapping[str, Any]:
        """Return the class, -1 where it is none of the training split's."""
        return {"label": self._classes.index(pair.label) if pair.label in self._classes else -1}
