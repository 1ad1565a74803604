"""A person's own classes, of images or of volumes: exclusive, ordered, or several at once.

Letters: B batch, K classes, S cases.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.distributed import all_reduce_sum
from common.downstream.classification import ImageClassifier
from common.downstream.scores import OVERALL, Cases, Kind, intervals, once
from common.errors import UserError
from common.files import whole_file
from common.runtime.reporting import is_dry_run, log_figure
from common.types import InputSpec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_HEADLINE = {"classes": "auroc", "labels": "auroc", "ordinal": "kappa"}


def class_weights(target: Tensor, known: Tensor, kind: Kind) -> Tensor:
    """Return what each class counts in a balanced loss, ``(K,)``.

    Exclusive classes and grades count equally however many cases they have; of findings it is the weight of those that
    are there, as many times as there are more without.

    Args:
        target: ``(S, K)`` of the training cases, 0 or 1.
        known: bool ``(S, K)``.
        kind: What the target is.
    """
    positive = (target * known).sum(0).clamp(min=1)
    if kind == "labels":
        return (known.sum(0) - positive).clamp(min=1) / positive
    return known.all(1).sum() / (target.shape[1] * positive)


def target_loss(logits: Tensor, target: Tensor, known: Tensor, kind: Kind, weight: Tensor | None = None) -> Tensor:
    """Return the loss over the known targets of all ranks, float32: a mean by weight.

    Cross-entropy of exclusive classes; of grades binary cross-entropy of "at least this grade", for every grade;
    binary cross-entropy of findings.

    Args:
        logits: ``(B, K)``.
        target: ``(B, K)``, 0 or 1, of grades 1 at the one grade.
        known: bool ``(B, K)``. Nothing known gives 0 with a graph.
        kind: What the target is.
        weight: ``(K,)`` of :func:`class_weights`; None counts all alike.
    """
    logits = logits.float()
    counts = known.float() if kind == "labels" else known.all(1, keepdim=True).float()
    factors = torch.ones_like(target[0]) if weight is None else weight
    if kind == "classes":
        losses = -(logits.log_softmax(1) * target).sum(1, keepdim=True)
    else:
        wanted = target if kind == "labels" else at_least(target)
        losses = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    if kind == "labels":
        losses, total = losses * torch.where(target == 1, factors, 1.0), counts
    else:
        counts = counts * (factors * target).sum(1, keepdim=True)
        total = counts.expand_as(losses)
    return all_reduce_sum((losses * counts).sum()) / all_reduce_sum(total.sum()).clamp(min=1e-12)


def at_least(target: Tensor) -> Tensor:
    """Return whether each grade is reached ``(S, K)``, of targets that are 1 at the one grade."""
    return target.flip(1).cumsum(1).flip(1)


def probabilities(logits: Tensor, kind: Kind) -> Tensor:
    """Return the probability of each class ``(S, K)``.

    Of grades it is how much less likely the next one is to be reached; a grade is never likelier than the one below.
    """
    if kind == "classes":
        return logits.softmax(1)
    if kind == "labels":
        return logits.sigmoid()
    reached = torch.cat([torch.ones_like(logits[:, :1]), logits[:, 1:].sigmoid()], 1).cummin(1).values
    return reached - torch.cat([reached[:, 1:], torch.zeros_like(reached[:, :1])], 1)


def confusion_figure(table: Sequence[Sequence[int]], names: Sequence[str]) -> "Figure":
    """Draw how often each true class (row) was given each class (column), shaded by the share of its row."""
    from matplotlib.figure import Figure

    side = min(2.5 + 0.5 * len(names), 20)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    shares = [[value / max(sum(row), 1) for value in row] for row in table]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    shown = [name if len(name) < 24 else f"{name[:21]}..." for name in names]
    axes.set_xticks(range(len(names)), shown, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), shown)
    axes.set(xlabel="predicted", ylabel="true")
    if len(names) <= 30:
        for row, values in enumerate(table):
            for column, value in enumerate(values):
                shade = "white" if shares[row][column] > 0.5 else "black"
                axes.text(column, row, str(value), ha="center", va="center", color=shade)
    return figure


class LabelClassifier(ImageClassifier):
    """Classifies images or volumes by targets that a person chose; what kind they are, the data say.

    Validation logs ``val/auroc`` and ``val/auprc`` (means over the classes that occur), ``val/accuracy``,
    ``val/balanced_accuracy``, ``val/ece`` (expected calibration error, 15 bins of equal mass), ``val/loss``
    (unweighted) and, of grades, ``val/kappa``; the first four of each class against the rest, too. Testing adds
    intervals under resampling of patients, and draws ``confusion_matrix.png``.

    Args:
        balanced: Whether rare classes count as much as frequent ones in training.
        aggregate: What is scored: each ``case``, or each ``patient`` by the mean of the logits of their cases.
        **settings: Those of :class:`common.downstream.classification.ImageClassifier`.
    """

    item_name = "cases"

    def __init__(self, balanced: bool = False, aggregate: Literal["case", "patient"] = "case", **settings: Any) -> None:
        super().__init__(**settings)
        self.balanced, self.aggregate = balanced, aggregate
        self._weight: Tensor | None = None

    def build_network(self, spec: InputSpec) -> nn.Module:
        """Make encoder and head.

        Raises:
            UserError: the target is no class.
        """
        if spec.classes and spec.target.get("kind") not in _HEADLINE:
            raise UserError(f"This task is about classes; the target is {spec.target.get('kind', 'of no known kind')}: "
                            f"use TASK=regression, or set data.target.kind.")  # fmt: skip
        return super().build_network(spec)

    @cached_property
    def kind(self) -> Kind:
        """What the target is."""
        return cast(Kind, self.spec.target["kind"])

    def on_fit_start(self) -> None:
        """Weigh the classes by how rare they are in training, where that is wanted (Lightning hook)."""
        if self.balanced:
            values = torch.tensor(self.trainer.datamodule.training_targets())  # type: ignore[attr-defined]
            known = ~values.isnan()
            self._weight = class_weights(values.where(known, 0.0), known, self.kind).to(self.device)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch (Lightning hook)."""
        logits = self(batch["image"])
        loss = target_loss(logits, batch["target"], batch["target_mask"], self.kind, self._weight)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=1)
        return loss

    def _patients(self, rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Return one row for each patient: the mean of the logits."""
        groups: dict[str, list[Mapping[str, Any]]] = {}
        for row in rows:
            groups.setdefault(row["patient_id"], []).append(row)
        merged: list[Mapping[str, Any]] = []
        for patient, own in groups.items():
            if len({str(row["target"]) for row in own}) > 1:
                raise UserError(f"The cases of the patient {patient} have different targets: set model.aggregate to "
                                f"case.")  # fmt: skip
            logits = torch.tensor([row["logits"] for row in own]).mean(0).tolist()
            merged.append({"subject_id": patient, **own[0], "logits": logits})
        return merged

    def _scored(self, rows: Sequence[Mapping[str, Any]]) -> tuple[Cases, list[str]] | None:
        """Return what was said of rows with a known target, and whom each is of; None where none is known."""
        rows = self._patients(rows) if self.aggregate == "patient" else rows
        good: Any = any if self.kind == "labels" else all
        rows = [row for row in rows if good(not math.isnan(value) for value in row["target"])]
        if not rows:
            return None
        logits = torch.tensor([row["logits"] for row in rows], dtype=torch.float64)
        target = torch.tensor([row["target"] for row in rows], dtype=torch.float64)
        known = ~target.isnan()
        shares = probabilities(logits, self.kind).numpy()
        cases = Cases(self.kind, self.classes, shares, target.where(known, 0.0).numpy(), known.numpy())
        return cases, [row["patient_id"] for row in rows]

    def metrics(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Return the scores over collected rows; see :class:`common.downstream.scores.Cases`."""
        scored = self._scored(rows)
        if scored is None:
            return {"loss": math.nan, "auroc": math.nan, "classes_left_out": float(len(self.classes))}
        cases, patients = scored
        left_out = float(len(self.classes) - len(cases.occurring()))
        return once(cases.score, len(patients)) | {"classes_left_out": left_out}

    def test_metrics(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Return the intervals of the scores over all classes, and draw the confusion matrix."""
        scored = self._scored(rows)
        if scored is None:
            return {}
        cases, patients = scored
        if self.kind != "labels" and self.trainer.is_global_zero and not is_dry_run(self.trainer):
            figure = confusion_figure(cases.confusion().tolist(), self.classes)
            log_figure(self.trainer, "confusion_matrix", figure)
            with whole_file(Path(self.trainer.default_root_dir) / "confusion_matrix.png") as temporary:
                figure.savefig(temporary, format="png", dpi=120)
        points = once(cases.score, len(patients))
        return intervals(cases.score, patients, {name: points[name] for name in OVERALL if name in points})

    def verdict(self, metrics: Mapping[str, float]) -> str:
        """Return the headline with its interval, and over how many classes, in words."""
        name = _HEADLINE[self.kind]
        value = metrics.get(name, math.nan)
        low, high = (metrics.get(f"{name}_ci_{end}", math.nan) for end in ("low", "high"))
        words = {"auroc": "mean AUROC", "kappa": "quadratic kappa"}[name]
        over = f" over {len(self.classes) - int(metrics['classes_left_out'])} of {len(self.classes)} classes"
        rest = f", balanced accuracy {metrics.get('balanced_accuracy', math.nan):.3f}"
        return f"{words} {value:.3f} [{low:.3f}, {high:.3f}]{over if name == 'auroc' else ''}{rest}"

    def line(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return one line of the table: names, what is predicted, and what is true (empty: unknown)."""
        line = {"subject_id": row["subject_id"], "patient_id": row["patient_id"]}
        (said,) = self.predicted(torch.tensor([row["logits"]]))
        target = row["target"]
        if self.kind == "labels":
            truth = {f"target_{c}": "" if math.isnan(v) else int(v) for c, v in zip(self.classes, target, strict=True)}
        else:
            truth = {"target": "" if math.isnan(target[0]) else self.classes[target.index(1.0)]}
        return line | said | truth

    def predicted(self, logits: Tensor) -> list[dict[str, Any]]:
        """Return the class that is predicted, of exclusive ones, and the probability of each."""
        shares = probabilities(logits.double().cpu(), self.kind)
        rows = [{f"probability_{c}": v for c, v in zip(self.classes, row, strict=True)} for row in shares.tolist()]
        if self.kind == "labels":
            return rows
        nothing = torch.ones_like(shares)
        decided = Cases(self.kind, self.classes, shares.numpy(), nothing.numpy(), nothing.bool().numpy()).decided()
        return [{"predicted": self.classes[k], **row} for k, row in zip(decided.tolist(), rows, strict=True)]
