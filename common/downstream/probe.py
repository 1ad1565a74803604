"""A linear classifier on frozen features (E-MIM section IV-B), cross-validated by patient.

Letters: S cases, E feature width, H heads, one per seed and fold.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.model_selection import StratifiedGroupKFold
from torch import Tensor, nn
from torchmetrics.functional.classification import binary_accuracy, binary_auroc

from common.blocks.vit import VisionTransformer
from common.distributed import all_reduce_sum
from common.downstream.base import FineTuning
from common.downstream.encoder import EncoderFactory, mean_features
from common.errors import DataError
from common.optim import OptimizerConfig
from common.runtime.reporting import is_dry_run, log_scalars, print_line, write_rows
from common.types import InputSpec


class ProbeNetwork(nn.Module):
    """A frozen encoder and many linear heads.

    Args:
        encoder: With ``num_features`` and ``forward_features``.
        num_heads: H.
    """

    def __init__(self, encoder: nn.Module, num_heads: int) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False).eval()
        width = int(encoder.num_features)  # type: ignore[arg-type]
        self.weight = nn.Parameter(torch.zeros(num_heads, width))
        self.bias = nn.Parameter(torch.zeros(num_heads))
        # Parameters, not buffers: equal on every rank, and DDP would broadcast buffers at every step.
        self.mean = nn.Parameter(torch.zeros(num_heads, width), requires_grad=False)
        self.std = nn.Parameter(torch.ones(num_heads, width), requires_grad=False)

    def train(self, mode: bool = True) -> "ProbeNetwork":
        """Switch the heads; the encoder stays in evaluation mode."""
        super().train(mode)
        self.encoder.eval()
        return self

    @torch.no_grad()
    def features(self, image: Tensor) -> Tensor:
        """Return the mean over all tokens of the normalised output, ``(B, E)``."""
        return mean_features(self.encoder, image)

    def fit_scale(self, features: Tensor, members: Tensor) -> None:
        """Compute mean and std of each head's own training cases; ``members`` bool ``(H, S)``."""
        weight = members.float() / members.sum(1, keepdim=True)
        self.mean.copy_(weight @ features)
        variance = weight @ features.square() - self.mean.square()
        self.std.copy_(variance.clamp(min=1e-8).sqrt())

    def forward(self, features: Tensor) -> Tensor:
        """Return logits ``(B, H)`` of features ``(B, E)``."""
        scaled = (features[:, None] - self.mean) / self.std
        return (scaled * self.weight).sum(2) + self.bias


def folds_by_patient(targets: Tensor, patients: list[str], num_folds: int, seed: int) -> Tensor:
    """Return the fold of each case, long ``(S,)``: stratified, no patient in two folds.

    Raises:
        DataError: a class has fewer patients than there are folds.
    """
    labels = targets.numpy()
    per_class = [len({p for p, t in zip(patients, labels, strict=True) if t == value}) for value in (0, 1)]
    if min(per_class) < num_folds:
        raise DataError(f"{num_folds} folds need as many patients of each class; there are {per_class[0]} with 0 and "
                        f"{per_class[1]} with 1.")  # fmt: skip
    splitter = StratifiedGroupKFold(num_folds, shuffle=True, random_state=seed)
    folds = np.zeros(len(labels), dtype=np.int64)
    for index, (_, held_out) in enumerate(splitter.split(labels, labels, groups=patients)):
        folds[held_out] = index
    return torch.from_numpy(folds)


class LinearProbe(FineTuning):
    """Trains one linear layer per seed and fold on features computed once, and scores the held-out cases.

    Features are the mean over all tokens of the encoder's normalised output for the central crop, standardised per head
    on its own training cases. Validation logs ``val/auroc`` and ``val/accuracy``: out of fold, mean over seeds, with
    their standard deviation. Testing averages all heads on the test split.

    Args:
        pretrained: Run folder, checkpoint or export whose encoder to probe; None: random weights.
        encoder: Makes the encoder from (channels, image size) without pre-training.
        num_folds: Folds of the cross-validation.
        num_seeds: Shuffles of the folds.
        optimization: How the weights are updated.
    """

    monitor = ("val/auroc", "max")

    def __init__(
        self,
        pretrained: str | None = None,
        encoder: EncoderFactory = VisionTransformer,
        num_folds: int = 5,
        num_seeds: int = 5,
        optimization: OptimizerConfig = OptimizerConfig(),
    ) -> None:
        super().__init__(pretrained, encoder, optimization=optimization, new_channels="refuse")
        self.save_hyperparameters()
        self.num_folds, self.num_seeds = num_folds, num_seeds
        self._features = self._targets = torch.zeros(0)
        self._names: list[str] = []
        self._folds = self._members = torch.zeros(0)

    def build_network(self, spec: InputSpec) -> ProbeNetwork:
        """Make encoder and heads."""
        encoder = self.build_encoder(spec)
        return ProbeNetwork(encoder, self.num_folds * self.num_seeds)

    def _extract(self, batches: Iterable[Any]) -> tuple[Tensor, Tensor, list[str], list[str]]:
        """Return features, targets, subjects and patients of all cases."""
        features, targets = [], []
        names: list[str] = []
        patients: list[str] = []
        for batch in batches:
            with torch.autocast(self.device.type, torch.bfloat16, enabled="bf16" in str(self.trainer.precision)):
                features.append(self.network.features(batch["image"].to(self.device)))
            targets.append(batch["target"])
            names += batch["subject_id"]
            patients += batch["patient_id"]
        return torch.cat(features), torch.cat(targets).to(self.device), names, patients

    def on_fit_start(self) -> None:
        """Compute the features once and assign the folds (Lightning hook)."""
        samples = self.trainer.datamodule.central_samples(("train", "val"))  # type: ignore[attr-defined]
        self._features, self._targets, self._names, patients = self._extract(samples)
        folds = [
            folds_by_patient(self._targets.cpu(), patients, self.num_folds, seed) for seed in range(self.num_seeds)
        ]
        self._folds = torch.stack(folds).to(self.device)
        held_out = self._folds[:, None, :] == torch.arange(self.num_folds, device=self.device)[:, None]
        self._members = ~held_out.flatten(0, 1)
        self.network.fit_scale(self._features, self._members)
        print_line(f"probe: {len(self._names)} cases of {len(set(patients))} patients, {int(self._targets.sum())} "
            f"positive, {self.num_seeds} seeds x {self.num_folds} folds")  # fmt: skip

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of all heads on a batch of cases, each head on its own training folds (Lightning hook)."""
        index = torch.tensor([self._names.index(name) for name in batch["subject_id"]], device=self.device)
        logits, members = self.network(self._features[index]), self._members[:, index].T.float()
        target = self._targets[index].float()[:, None].expand_as(logits)
        positive = self._targets.float()
        share = (self._members * positive).sum(1) / self._members.sum(1)
        loss = nn.functional.binary_cross_entropy_with_logits(
            logits, target, weight=members, pos_weight=(1 - share) / share.clamp(min=1e-6), reduction="sum"
        )
        loss = all_reduce_sum(loss) / all_reduce_sum(members.sum()).clamp(min=1)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=1)
        # Each head's gradient must not shrink with the number of heads.
        return loss * logits.shape[1]

    def out_of_fold(self) -> Tensor:
        """Return the logit of each case from the head that has not seen it, ``(seeds, S)``."""
        logits = self.network(self._features).unflatten(1, (self.num_seeds, self.num_folds))
        return logits.permute(1, 0, 2).gather(2, self._folds[:, :, None])[:, :, 0].detach()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Do nothing: cases are scored at the end of the epoch (Lightning hook)."""

    def on_validation_epoch_end(self) -> None:
        """Log out-of-fold loss, AUROC and accuracy (Lightning hook)."""
        if not len(self._names):
            return
        logits = self.out_of_fold()
        target = self._targets.long()
        auroc = torch.stack([binary_auroc(row, target) for row in logits])
        accuracy = torch.stack([binary_accuracy(row.sigmoid(), target) for row in logits])
        loss = nn.functional.binary_cross_entropy_with_logits(logits, target.float().expand_as(logits))
        scalars = {"loss": loss, "auroc": auroc.mean(), "auroc_std": auroc.std(unbiased=len(auroc) > 1),
                   "accuracy": accuracy.mean(), "accuracy_std": accuracy.std(unbiased=len(accuracy) > 1)}  # fmt: skip
        log_scalars(self, {f"val/{name}": float(value) for name, value in scalars.items()}, prog_bar=("val/auroc",))

    def on_train_end(self) -> None:
        """Write the out-of-fold scores (Lightning hook)."""
        if self.trainer.is_global_zero and not is_dry_run(self.trainer):
            scores = self.out_of_fold().sigmoid().mean(0)
            rows = zip(self._names, self._targets.tolist(), scores.tolist(), strict=True)
            write_rows(Path(self.trainer.default_root_dir) / "out_of_fold.csv",
                       [{"subject_id": n, "target": t, "score": s} for n, t, s in rows])  # fmt: skip

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Score one batch of cases by the mean of all heads (Lightning hook)."""
        logits = self.network(self.network.features(batch["image"]))
        rows = zip(batch["subject_id"], batch["target"].tolist(), logits.sigmoid().mean(1).tolist(), strict=True)
        self.rows += [{"subject_id": name, "target": target, "score": score} for name, target, score in rows]

    def on_test_epoch_end(self) -> None:
        """Write ``metrics.json`` and ``per_case.csv`` (Lightning hook)."""
        rows = self.take_rows()
        scores = torch.tensor([row["score"] for row in rows])
        target = torch.tensor([row["target"] for row in rows]).long()
        auroc = float(binary_auroc(scores, target)) if len(target.unique()) == 2 else None
        metrics = {"n": len(target), "auroc": auroc, "accuracy": float(binary_accuracy(scores, target))}
        if self.trainer.is_global_zero:
            self.write_scores(rows, metrics)
            print_line(
                f"test: {metrics['n']} cases, accuracy {metrics['accuracy']:.3f}, "
                + (f"AUROC {auroc:.3f}" if auroc is not None else "AUROC undefined: the test cases are of one class")
            )
        log_scalars(self, {f"test/{name}": float(value) for name, value in metrics.items() if value is not None})

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the heads' parameters, all with the same weight decay."""
        return [{"params": [parameter for parameter in self.network.parameters() if parameter.requires_grad]}]

    def default_schedule(self) -> None:
        """Keep the learning rate constant."""
