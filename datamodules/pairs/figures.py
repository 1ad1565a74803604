"""Figures with captions and a class: MELINDA."""

from collections.abc import Mapping
from typing import Any, Literal

from common.errors import DataError
from common.runtime.reporting import contents
from datamodules.loading import Draw
from datamodules.pairs.datamodule import PairDataModule
from datamodules.reports.melinda import read_melinda
from datamodules.reports.studies import CaptionedImage
from datamodules.splits import SPLITS


class FigureDataModule(PairDataModule):
    """MELINDA's figures with their captions; the classes are those of the training split.

    Args:
        root: The archive.
        task: ``"p_meth_label"`` (7 classes), ``"i_meth_label"``, ``"p_meth"`` or ``"i_meth"``.
        **settings: Those of :class:`datamodules.pairs.datamodule.PairDataModule`.
    """

    item_name = "figures"
    layout_name = "melinda"

    def __init__(
        self,
        root: str,
        task: Literal["p_meth_label", "i_meth_label", "p_meth", "i_meth"] = "p_meth_label",
        **settings: Any,
    ) -> None:
        super().__init__(root, **settings)
        self._task = task

    def find(self, root: str) -> dict[str, list[CaptionedImage]]:
        """List the figures by split.

        Raises:
            DataError: the root is another archive, a table is damaged, or no training figure has a class.
        """
        if strange := [name for name in self.settings.said() if name != "ignore"]:
            raise DataError(f"{root} is of the layout melinda, which has no setting {strange[0]}.")
        tree = self.walk()
        rows = read_melinda(tree, self._task)
        if not rows:
            raise DataError(f"{root} holds no train.csv beside melinda_images/; it holds {contents(tree.root)}.")
        self._classes = tuple(sorted({row.label for row in rows if row.split == "train" and row.label}))
        if len(self._classes) < 2:
            raise DataError(f"The training figures of {root} have {len(self._classes)} classes of {self._task}.")
        splits = {name: [row for row in rows if row.split == name] for name in SPLITS}
        splits["train"] = [row for row in splits["train"] if row.label]
        return splits

    def describe(self) -> str:
        """Return how many classes there are."""
        return f", {len(self._classes)} classes of {self._task}"

    def facts(self, pair: CaptionedImage, draw: Draw) -> Mapping[str, Any]:
        """Return the class, -1 if the training split does not have it."""
        return {"label": self._classes.index(pair.label) if pair.label in self._classes else -1}
