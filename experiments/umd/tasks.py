"""Fine-tuning with labels (paper section III-D and IV): answers, retrieval, classification.

Letters: B batch, T tokens, C candidate texts of an image, K classes, E width of the fusion.
"""

import json
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_recall, multiclass_specificity

from common.checkpoint import read_checkpoint
from common.distributed import all_reduce_sum, gather_objects, rank, world_size
from common.downstream.base import ScoredTask
from common.downstream.classification import macro_auroc
from common.downstream.encoder import encoder_architecture
from common.errors import UserError
from common.files import write_text
from common.metrics import bootstrap_mean
from common.optim import OptimizerConfig, Schedule, WarmupCosine
from common.runtime.precision import at_least_float32
from common.runtime.reporting import is_dry_run, print_line
from common.types import InputSpec
from experiments.umd.checkpoint_transfer import EncoderFactory, make_umd_encoder, tower_scale
from experiments.umd.coordination import ContributionSums, true_class_probability
from experiments.umd.encoder import UMDEncoder, init_normal_weights

SplitHead = Literal["zero_other", "linear_split", "upstream"]
#: Number of pairs fused at once when a whole pool is scored.
_PAIRS_AT_ONCE = 256


def answer_head(dim: int, classes: int) -> nn.Sequential:
    """Make the head of answers and classes on both pooled vectors (M3AE): Linear, LayerNorm, GELU, Linear."""
    head = nn.Sequential(nn.Linear(2 * dim, 2 * dim), nn.LayerNorm(2 * dim), nn.GELU(), nn.Linear(2 * dim, classes))
    head.apply(init_normal_weights)
    return head


@torch.no_grad()
def split_logits(head: nn.Module, text: Tensor, image: Tensor, kind: SplitHead) -> tuple[Tensor, Tensor]:
    """Return the head's logits for the text alone and for the image alone (Eq. 10's H^T and H^I), without a gradient.

    Args:
        head: On ``(..., 2 E)``, text before image.
        text: c^T ``(..., E)``.
        image: c^I ``(..., E)``.
        kind: ``"zero_other"`` puts zeros in the other's place; ``"linear_split"`` shares a linear head's bias out by
            halves; ``"upstream"`` does that with the last layer, whatever its input, as the published code does.
    """
    if kind == "zero_other":
        zeros = torch.zeros_like(text)
        return head(torch.cat([text, zeros], dim=-1)), head(torch.cat([zeros, image], dim=-1))
    linear = [module for module in head.modules() if isinstance(module, nn.Linear)][-1]
    weight_text, weight_image = linear.weight.split(text.shape[-1], dim=1)
    half = linear.bias / 2
    return F.linear(text, weight_text, half), F.linear(image, weight_image, half)


class PairNetwork(nn.Module):
    """The encoder and a head on both pooled vectors.

    Args:
        encoder: E.
        head: On ``(..., 2 E)``.
    """

    def __init__(self, encoder: UMDEncoder, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, image: Tensor, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits ``(B, K)`` and the pooled vectors of text and image, each ``(B, E)``."""
        fused = self.encoder(image, input_ids, attention_mask)
        text, picture = self.encoder.pool(fused, attention_mask)
        return self.head(torch.cat([text, picture], dim=1)), text, picture


class PairTask(ScoredTask):
    """What the tasks share: encoder from a checkpoint, learning rates, contributions, tables.

    Args:
        pretrained: Run folder or checkpoint whose encoder to start from; None starts from scratch.
        encoder: Makes the encoder from (image size, vocabulary size, padding token) where nothing is pre-trained.
        split_head: How a modality's contribution is measured; see :func:`split_logits`.
        fusion_lr_scale: Learning rate of all but towers and head over the towers'.
        head_lr_scale: Learning rate of the head over the towers'.
        optimization: How the weights are updated; the learning rate is the towers'.

    Raises:
        ValueError: ``split_head`` is unknown.
    """

    #: The metric that selects ``best.ckpt``.
    monitor = ("val/accuracy", "max")
    remembered = ("channels", "image_size", "vocabulary", "classes")

    def __init__(
        self,
        pretrained: str | None = None,
        encoder: EncoderFactory = UMDEncoder,
        split_head: SplitHead = "zero_other",
        fusion_lr_scale: float = 5.0,
        head_lr_scale: float = 50.0,
        optimization: OptimizerConfig = OptimizerConfig(),
    ) -> None:
        if split_head not in get_args(SplitHead):
            raise ValueError(f"`split_head` must be 'zero_other', 'linear_split' or 'upstream', got {split_head!r}.")
        super().__init__(pretrained, optimization=optimization)
        self.save_hyperparameters()
        self.split_head = split_head
        #: Contributions of each modality since the last optimiser step, for gradient coordination.
        self.contributions = ContributionSums()
        self._make_pair_encoder, self._scales = encoder, (fusion_lr_scale, head_lr_scale)

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in the order of the logits."""
        return list(self.spec.classes)

    @abstractmethod
    def make_head(self, encoder: UMDEncoder, classes: Sequence[str]) -> nn.Module:
        """Make the task's head."""

    @abstractmethod
    def loss(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return the summed losses of a batch and its number of samples, and record the contributions."""

    def build_network(self, spec: InputSpec) -> PairNetwork:
        """Make encoder and head."""
        encoder = make_umd_encoder(spec, self._pretrained, self._make_pair_encoder, self.state.encoder)
        self.state = self.state._replace(encoder=encoder_architecture(encoder))
        return PairNetwork(encoder, self.make_head(encoder, spec.classes))

    def modality_parameters(self) -> dict[str, list[nn.Parameter]]:
        """Return the parameters of each modality, for gradient coordination."""
        return self.network.encoder.modality_parameters()

    def note_contributions(self, text: Tensor, image: Tensor, target: Tensor) -> None:
        """Add each modality's own score for the true classes ``(B, K)`` (Eq. 10)."""
        if self.training:
            of_text, of_image = split_logits(self.network.head, text.detach(), image.detach(), self.split_head)
            parts = (logits.reshape(target.shape) for logits in (of_image, of_text))
            self.contributions.add(*(true_class_probability(logits, target) for logits in parts))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch, reduced over ranks (Lightning hook)."""
        total, count = self.loss(batch)
        loss = all_reduce_sum(total) / all_reduce_sum(count).clamp(min=1)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=1)
        return loss

    def lr_scale(self, name: str) -> float:
        """Return the factor of the learning rate of a parameter."""
        return tower_scale(name, *self._scales)

    def default_schedule(self) -> Schedule:
        """Return the schedule where the configuration has none."""
        return WarmupCosine(0.1)


class ChoiceTask(PairTask):
    """One right class per sample; the label -1 is of a class that training does not know."""

    #: What is said where there is no class.
    no_classes = "The dataset defines no classes."

    def make_head(self, encoder: UMDEncoder, classes: Sequence[str]) -> nn.Sequential:
        """Make the head.

        Raises:
            UserError: the data have no classes.
        """
        if not classes:
            raise UserError(self.no_classes)
        return answer_head(encoder.dim, len(classes))

    def logits(self, batch: Any) -> Tensor:
        """Return the logits ``(B, K)`` of a batch in float32."""
        return self.network(batch["image"], batch["input_ids"], batch["attention_mask"])[0].float()

    @abstractmethod
    def losses(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss ``(B,)`` of logits and one-hot classes, both ``(B, K)``."""

    def target(self, batch: Any, dtype: torch.dtype) -> Tensor:
        """Return the one-hot classes ``(B, K)``; zeros where the class is unknown."""
        label = batch["label"]
        return F.one_hot(label.clamp(min=0), len(self.classes)).to(dtype) * (label >= 0)[:, None]

    def loss(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return the losses summed over the samples with a class, and how many these are."""
        logits, text, image = self.network(batch["image"], batch["input_ids"], batch["attention_mask"])
        logits = at_least_float32(logits)
        target = self.target(batch, logits.dtype)
        self.note_contributions(text, image, target)
        known = (batch["label"] >= 0).to(logits.dtype)
        return (self.losses(logits, target) * known).sum(), known.sum()


class AnswerTask(ChoiceTask):
    """Visual question answering: one class an answer; accuracy over all, open and closed questions.

    A question whose true answer is no class counts as wrong. ``lightning predict`` writes the five likeliest answers of
    each question to ``predictions.json``.
    """

    no_classes = "The dataset defines no answers to choose from; give an archive with a training split."

    def make_head(self, encoder: UMDEncoder, classes: Sequence[str]) -> nn.Sequential:
        """Make the head; see :class:`ChoiceTask`."""
        head = super().make_head(encoder, classes)
        # Equal probabilities that sum to one: from one half each, sigmoids need a thousand steps to get there.
        last = head[-1]
        assert isinstance(last, nn.Linear)
        nn.init.constant_(last.bias, -math.log(max(len(classes) - 1, 1)))
        return head

    def losses(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return binary cross-entropies summed over classes."""
        return F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(1)

    def score(self, batch: Any) -> list[dict[str, Any]]:
        """Return what was answered to each question."""
        logits = self.logits(batch)
        losses = self.losses(logits, self.target(batch, logits.dtype))
        scores, chosen = logits.sigmoid().max(1)
        columns = (batch["subject_id"], batch["patient_id"], batch["text"], batch["kind"], batch["answers"])
        numbers = (chosen.tolist(), scores.tolist(), losses.tolist(), batch["label"].tolist())
        frequent: dict[str, str] = self.trainer.datamodule.most_frequent()  # type: ignore[attr-defined]
        rows = []
        for subject, patient, text, kind, answers, best, score, loss, label in zip(*columns, *numbers, strict=True):
            given = self.classes[best]
            rows.append(
                {"subject_id": subject, "patient_id": patient, "question": text, "kind": kind,
                 "answer": answers[0] if answers else "", "prediction": given, "score": score,
                 "right": float(given in answers), "known": float(label >= 0), "loss": loss,
                 "frequent_right": float(frequent.get(kind, frequent[""]) in answers)}
            )  # fmt: skip
        return rows

    def metrics(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Return accuracies (all questions weigh the same), the share of unseen answers, and the loss.

        ``accuracy_frequent`` is what the most frequent training answer to each kind of question would get.
        """

        def mean(name: str, kind: str = "") -> float:
            values = [row[name] for row in rows if not kind or row["kind"] == kind]
            return sum(values) / len(values) if values else math.nan

        known = [row["loss"] for row in rows if row["known"]]
        scores = {"accuracy": mean("right"), "loss": sum(known) / max(len(known), 1), "unseen": 1 - mean("known")}
        scores["accuracy_frequent"] = mean("frequent_right")
        by_kind = {f"accuracy_{kind}": mean("right", kind) for kind in ("open", "closed")}
        by_kind |= {f"accuracy_frequent_{kind}": mean("frequent_right", kind) for kind in ("open", "closed")}
        return scores | {name: value for name, value in by_kind.items() if math.isfinite(value)}

    def test_metrics(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Return how far closed questions are above the most frequent answer, with a 95 % interval over images."""
        closed = [row for row in rows if row["kind"] == "closed"]
        if not closed:
            return {}
        gains = [row["right"] - row["frequent_right"] for row in closed]
        low, high = bootstrap_mean(gains, [row["patient_id"] for row in closed])
        return {"gain_closed": sum(gains) / len(gains), "gain_closed_low": low, "gain_closed_high": high}

    def attention_map(self, batch: Any) -> Tensor:
        """Return how much each question's tokens look at each patch, ``(B, rows, columns)``, summing to 1."""
        encoder: UMDEncoder = self.network.encoder
        text = encoder.encode_text(batch["input_ids"], batch["attention_mask"])
        real = batch["attention_mask"].bool()
        weights = encoder.fusion.text_to_image(text, encoder.encode_image(batch["image"]), real)
        patches = ((weights * real[..., None]).sum(1) / real.sum(1)[:, None])[:, 1:]
        return (patches / patches.sum(1, keepdim=True)).unflatten(1, encoder.grid_size)

    def predict_step(self, batch: Any, batch_idx: int) -> list[dict[str, Any]]:
        """Return the five likeliest answers to each question (Lightning hook)."""
        scores, order = self.logits(batch).sigmoid().topk(min(5, len(self.classes)), dim=1)
        columns = zip(batch["subject_id"], batch["text"], scores.tolist(), order.tolist(), strict=True)
        rows = [
            {"subject_id": subject, "question": text,
             "answers": [{"answer": self.classes[i], "score": score} for i, score in zip(best, values, strict=True)]}
            for subject, text, values, best in columns
        ]  # fmt: skip
        self.rows += rows
        return rows

    def on_predict_epoch_end(self) -> None:
        """Write ``predictions.json``; of a single question, print it too (Lightning hook)."""
        rows = self.take_rows()
        if not self.trainer.is_global_zero:
            return
        if len(rows) == 1:
            for entry in rows[0]["answers"]:
                print_line(f"{entry['score']:.3f}  {entry['answer']}")
        if not is_dry_run(self.trainer):
            path = Path(self.trainer.default_root_dir) / "predictions.json"
            write_text(path, json.dumps(rows, indent=1, ensure_ascii=False))
            print_line(f"answered {len(rows)} questions: {path}")


class FigureTask(ChoiceTask):
    """Classification of figures with captions: accuracy, and macro AUROC, sensitivity and specificity."""

    def losses(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return cross-entropies."""
        return -(logits.log_softmax(1) * target).sum(1)

    def score(self, batch: Any) -> list[dict[str, Any]]:
        """Return probabilities and true class of each sample."""
        columns = (batch["subject_id"], batch["patient_id"], batch["label"].tolist(), self.logits(batch).tolist())
        return [
            {"subject_id": subject, "patient_id": patient, "label": label,
             "prediction": self.classes[max(range(len(row)), key=row.__getitem__)], "logits": row}
            for subject, patient, label, row in zip(*columns, strict=True)
        ]  # fmt: skip

    def metrics(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Return the metrics over samples whose class is known; one without is wrong in accuracy."""
        known = [row for row in rows if row["label"] >= 0]
        if not known:
            return {"accuracy": 0.0, "loss": math.nan}
        logits = torch.tensor([row["logits"] for row in known])
        label = torch.tensor([row["label"] for row in known])
        count = len(self.classes)
        # Classes that do not occur have no recall, and would count as 0 in a macro mean.
        there = label.unique()
        recall = multiclass_recall(logits, label, count, average="none")[there]
        specificity = multiclass_specificity(logits, label, count, average="none")[there]
        auroc, _ = macro_auroc(logits.softmax(1), label)
        return {
            "accuracy": float((logits.argmax(1) == label).sum()) / len(rows),
            "auroc": auroc,
            "sensitivity": float(recall.mean()),
            "specificity": float(specificity.mean()),
            "loss": float(F.cross_entropy(logits, label)),
        }


class RetrievalTask(PairTask):
    """Retrieval of captions by image and of images by caption: a score for every pair of a pool.

    Training tells an image's caption from others (cross-entropy over the candidates); R@1, R@5 and R@10 in both
    directions are over all pairs of the pool, each pair once; features before the fusion are computed once per image
    and per text, which changes nothing.
    """

    monitor = ("val/recall_mean", "max")

    _pool: list[dict[str, Any]]

    def make_head(self, encoder: UMDEncoder, classes: Sequence[str]) -> nn.Linear:
        """Make the head: one score for a pair."""
        head = nn.Linear(2 * encoder.dim, 1)
        head.apply(init_normal_weights)
        return head

    def build_network(self, spec: InputSpec) -> PairNetwork:
        """Make encoder and head; the head begins as that of pre-training's matching, where there is one."""
        self._pool = []
        resumed = self.state.encoder is not None
        network = super().build_network(spec)
        if not self._pretrained or resumed:
            return network
        state = read_checkpoint(self._pretrained)["state_dict"]
        if "network.itm_head.weight" in state:
            head = cast(nn.Linear, network.head)
            with torch.no_grad():
                head.weight.copy_(state["network.itm_head.weight"][1:])
                head.bias.copy_(state["network.itm_head.bias"][1:])
            print_line("the retrieval head starts from image-text matching")
        return network

    def loss(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return the sum of cross-entropies of the true caption, the first candidate, and the number of images."""
        encoder: UMDEncoder = self.network.encoder
        count, candidates = batch["candidate_ids"].shape[:2]
        ids, mask = batch["candidate_ids"].flatten(0, 1), batch["candidate_mask"].flatten(0, 1)
        image = encoder.encode_image(batch["image"])[:, None].expand(-1, candidates, -1, -1).flatten(0, 1)
        text, picture = encoder.pool(encoder.fuse(encoder.encode_text(ids, mask), image, mask), mask)
        scores = at_least_float32(self.network.head(torch.cat([text, picture], dim=1)).reshape(count, candidates))
        first = torch.zeros_like(scores)
        first[:, 0] = 1
        self.note_contributions(text, picture, first)
        return -scores.log_softmax(1)[:, 0].sum(), torch.full((), float(count), device=scores.device)

    def score(self, batch: Any) -> list[dict[str, Any]]:
        """Keep the features before the fusion; the pool is scored when it is complete."""
        encoder: UMDEncoder = self.network.encoder
        text = encoder.encode_text(batch["input_ids"], batch["attention_mask"])
        image = encoder.encode_image(batch["image"])
        own_text, own_image = encoder.fusion.attend_selves(text, image, batch["attention_mask"].bool())
        for index, subject in enumerate(batch["subject_id"]):
            length = int(batch["attention_mask"][index].sum())
            self._pool.append(
                {"subject_id": subject, "image_key": int(batch["image_key"][index]),
                 "text": (text[index, :length].cpu(), own_text[index, :length].cpu()),
                 "image": (image[index].cpu(), own_image[index].cpu())}
            )  # fmt: skip
        return []

    def pool_scores(self, texts: Sequence[int]) -> Tensor:
        """Return the scores ``(len(texts), N)`` of some texts of the pool with all of its images."""
        encoder: UMDEncoder = self.network.encoder
        columns = []
        for begin in range(0, len(self._pool), _PAIRS_AT_ONCE):  # images are large, so each goes to the device once
            chunk = [entry["image"] for entry in self._pool[begin : begin + _PAIRS_AT_ONCE]]
            image, own = (torch.stack(parts).to(self.device) for parts in zip(*chunk, strict=True))
            shape, rows = (len(image), -1, -1), []
            for index in texts:
                text, own_text = (part[None].to(self.device) for part in self._pool[index]["text"])
                mask = torch.ones(len(image), text.shape[1], dtype=torch.long, device=self.device)
                fused = encoder.fuse(text.expand(shape), image, mask, (own_text.expand(shape), own))
                rows.append(self.network.head(torch.cat(encoder.pool(fused, mask), dim=1))[:, 0])
            columns.append(torch.stack(rows).float().cpu() if rows else torch.zeros(0, len(image)))
        return torch.cat(columns, dim=1)

    def take_rows(self) -> list[dict[str, Any]]:
        """Score the pool, its texts distributed over the ranks, each of which holds all of it."""
        if not self._pool:
            return []
        # Lightning enters the run's precision around steps, not at the end of an epoch.
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            mine = self.pool_scores(range(rank(), len(self._pool), world_size()))
        scores = torch.zeros(len(self._pool), len(self._pool))
        for other, part in enumerate(gather_objects(mine)):
            scores[other :: world_size()] = part
        keys = torch.tensor([entry["image_key"] for entry in self._pool])
        names = [entry["subject_id"] for entry in self._pool]
        self._pool = []
        ranks = {"image_rank": best_ranks(scores, keys), "text_rank": best_ranks(scores.T, keys)}
        columns = zip(names, ranks["image_rank"].tolist(), ranks["text_rank"].tolist(), strict=True)
        return [{"subject_id": name, "image_rank": image, "text_rank": text} for name, image, text in columns]

    def metrics(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Return recalls: text to image (``t2i``), image to text (``i2t``), their mean, and the size of the pool."""
        scores = {}
        for name, column in (("t2i", "image_rank"), ("i2t", "text_rank")):
            for k in (1, 5, 10):
                scores[f"{name}_recall_at_{k}"] = sum(row[column] < k for row in rows) / len(rows)
        return {"recall_mean": sum(scores.values()) / 6, "pool": float(len(rows)), **scores}


def best_ranks(scores: Tensor, keys: Tensor) -> Tensor:
    """Return the place, from 0, of the first right item of each query; of equal scores the lower index comes first.

    Args:
        scores: ``(N, N)``, query by item.
        keys: ``(N,)``, equal where query and item are of the same image.
    """
    order = scores.argsort(dim=1, descending=True, stable=True)
    right = keys[order] == keys[:, None]
    return right.long().argmax(1)
