"""UMD's own callbacks: its teacher, the coordination of gradients, and answers to look at."""

from abc import abstractmethod
from html import escape
from textwrap import fill
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from matplotlib.figure import Figure
from torch import Tensor
from torch.optim import Optimizer

from common.distributed import all_reduce_sum
from common.errors import UserError
from common.randomness import run_seed, stable_hash
from common.runtime.reporting import log_figure, log_text, print_line
from experiments.umd.coordination import (
    Noise,
    NoiseScope,
    contribution_ratio,
    coordinate_gradients,
    modality_coefficients,
)
from experiments.umd.module import UMDPretrain
from experiments.umd.tasks import AnswerTask


class TeacherWatch(pl.Callback):
    """Logs ``umd/teacher_distance``, ``umd/feat_std_img`` and ``umd/feat_std_txt``.

    The distance is that of the teacher's weights to the student's over the student's norm; the spreads are standard
    deviations of the teacher's projected features over tokens, mean over features. A collapse is reported once.

    Args:
        floor: Spread below which features count as collapsed.
    """

    def __init__(self, floor: float = 1e-3) -> None:
        self.floor = floor
        self._said = False

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log at the steps that scalars are logged at (Lightning hook)."""
        due = trainer.global_step % getattr(trainer, "log_every_n_steps", 1) == 0
        if not isinstance(pl_module, UMDPretrain) or not due or trainer.fit_loop._should_accumulate():
            return
        network = pl_module.network
        if network.teacher is None:
            return
        values = {f"umd/feat_std_{name}": float(spread) for name, spread in pl_module.feature_spread.items()}
        distance = network.teacher.distance(network.averaged())
        pl_module.log_dict(values | {"umd/teacher_distance": distance}, batch_size=1)
        if min(values.values()) < self.floor and not self._said:
            self._said = True
            print_line(f"warning: the teacher's projected features have a spread of {min(values.values()):.1e}: they "
                f"have collapsed, and the losses of features mean nothing (model.features.target)")  # fmt: skip


class AnswerCallback(pl.Callback):
    """Looks at the validation questions of rank 0; at none where the data module anonymises."""

    @abstractmethod
    def keep(self, task: AnswerTask, rows: list[dict[str, Any]], batch: Any) -> None:
        """Keep what will be shown of a batch and of what was answered."""

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Look at the answers of rank 0 (Lightning hook)."""
        hidden = trainer.datamodule.ledger.anonymise  # type: ignore[attr-defined]
        if isinstance(pl_module, AnswerTask) and trainer.is_global_zero and not hidden:
            self.keep(pl_module, outputs["rows"], batch)


class AttentionOverlay(AnswerCallback):
    """Logs ``attention/question_to_image``: where the last fusion layer looks from the question, over the image.

    Always the same validation questions, the first about each image; none where the data module anonymises. All
    share one scale, on which 1 is the same attention everywhere, and what gets none stays as it is.

    Args:
        num_samples: Questions.
    """

    def __init__(self, num_samples: int = 4) -> None:
        self.num_samples = num_samples
        self._drawn: dict[int, tuple[str, Tensor, Tensor]] = {}

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reset for a new validation (Lightning hook)."""
        self._drawn = {}

    def keep(self, task: AnswerTask, rows: list[dict[str, Any]], batch: Any) -> None:
        """Keep the first questions."""
        room, keys = self.num_samples - len(self._drawn), batch["image_key"].tolist()
        new = [index for index, key in enumerate(keys) if key not in self._drawn and key not in keys[:index]]
        new = new[: max(room, 0)]
        if not new:
            return
        first = {name: batch[name][new] for name in ("image", "input_ids", "attention_mask")}
        maps = task.attention_map(first).float().cpu()
        for index, image, seen in zip(new, first["image"].float().cpu(), maps, strict=True):
            row = rows[index]
            title = f"{row['question']}\n{row['prediction']} ({'right' if row['right'] else 'it is ' + row['answer']})"
            self._drawn[keys[index]] = title, image.mean(0), seen * seen.numel()

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw them (Lightning hook)."""
        if not self._drawn:
            return
        figure = Figure(figsize=(3 * len(self._drawn) + 0.6, 3.6), layout="constrained")
        panels = figure.subplots(1, len(self._drawn), squeeze=False)[0]
        top = max(2.0, *(float(seen.max()) for _, _, seen in self._drawn.values()))
        for axes, (title, image, seen) in zip(panels, self._drawn.values(), strict=True):
            axes.imshow(image, cmap="gray")
            extent = (-0.5, image.shape[1] - 0.5, image.shape[0] - 0.5, -0.5)
            shown = axes.imshow(seen, cmap="autumn", vmin=0, vmax=top, alpha=(seen / top).numpy() * 0.7, extent=extent,
                                interpolation="bilinear")  # fmt: skip
            axes.set_title("\n".join(fill(line, 40) for line in title.split("\n")), fontsize=7, parse_math=False)
            axes.set_axis_off()
        figure.colorbar(shown, ax=panels, label="attention, 1 = the same everywhere", fraction=0.02)
        log_figure(trainer, "attention/question_to_image", figure)


class AnswerExamples(AnswerCallback):
    """Logs ``examples/answers`` as text: validation questions that were answered rightly, and wrongly, one per image.

    Nothing is logged where the data module anonymises.

    Args:
        num_each: How many of either.
    """

    def __init__(self, num_each: int = 8) -> None:
        self.num_each = num_each
        self._rows: dict[bool, list[dict[str, Any]]] = {True: [], False: []}

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reset for a new validation (Lightning hook)."""
        self._rows = {True: [], False: []}

    def keep(self, task: AnswerTask, rows: list[dict[str, Any]], batch: Any) -> None:
        """Keep the first of either."""
        for row in rows:
            kept = self._rows[bool(row["right"])]
            if len(kept) < self.num_each and row["patient_id"] not in {other["patient_id"] for other in kept}:
                kept.append(row)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Send the examples to the loggers (Lightning hook)."""
        rows = [row for kept in self._rows.values() for row in kept]
        if not rows:
            return
        lines = ["| | question | answered | truth |", "|---|---|---|---|"]
        for row in rows:
            texts = (escape(str(row[name]), quote=False) for name in ("question", "prediction", "answer"))
            cells = " | ".join(text.replace("|", "&#124;") for text in texts)
            lines.append(f"| {'right' if row['right'] else 'wrong'} | {cells} |")
        log_text(trainer, "examples/answers", "\n".join(lines))


class GradientCoordination(pl.Callback):
    """GM-Coord (Eqs. 10 to 13): damps the gradients of the modality that leads, and adds noise, once a step.

    The module sums what each modality contributes in ``contributions`` (:class:`ContributionSums`) and names the
    parameters of each in ``modality_parameters()``. Contributions are summed over micro-batches and ranks; the noise is
    a function of seed and step, the same on every rank. Logs ``gmcoord/rho_text``, ``gmcoord/k_text``,
    ``gmcoord/k_image``, ``gmcoord/noise_over_grad``.

    Args:
        beta: Strength of the damping.
        apply_to: ``"grad"`` multiplies gradients by k, which AdamW all but undoes; ``"update"`` multiplies the step
            that the optimiser takes.
        noise_scope: ``"both"``, ``"damped"`` or ``"none"``.
        noise_scale: Standard deviation of the noise over that of the gradient.
        noise_std_of: ``"raw"`` or ``"damped"``.
        start_step: First optimiser step that is coordinated.
        end_step: First that is not any more; None: to the end.

    Raises:
        ValueError: an option is unknown.
    """

    def __init__(
        self,
        beta: float = 0.1,
        apply_to: Literal["grad", "update"] = "grad",
        noise_scope: NoiseScope = "both",
        noise_scale: float = 1.0,
        noise_std_of: Literal["raw", "damped"] = "raw",
        start_step: int = 0,
        end_step: int | None = None,
    ) -> None:
        if apply_to not in ("grad", "update"):
            raise ValueError(f"`apply_to` must be 'grad' or 'update', got {apply_to!r}.")
        if noise_scope not in ("both", "damped", "none"):
            raise ValueError(f"`noise_scope` must be 'both', 'damped' or 'none', got {noise_scope!r}.")
        self.beta, self.apply_to = beta, apply_to
        self.noise = Noise(noise_scope, noise_scale, noise_std_of)
        self.start_step, self.end_step = start_step, end_step
        self._parameters: dict[str, list[torch.nn.Parameter]] = {}
        self._pending: list[tuple[Tensor, list[Tensor], list[Tensor]]] = []
        self._handles: list[Any] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot be coordinated (Lightning hook).

        Raises:
            UserError: sharded gradients, or a module without two modalities.
        """
        if stage != "fit":
            return
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise UserError("GradientCoordination needs whole gradients on every rank: use one device or ddp.")
        if not hasattr(pl_module, "modality_parameters") or not hasattr(pl_module, "contributions"):
            raise UserError(f"{type(pl_module).__name__} has no two modalities to coordinate: leave the callback out.")

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Watch the optimisers' steps, where those are what is damped (Lightning hook)."""
        self._parameters = pl_module.modality_parameters()
        if self.apply_to == "update":
            self._handles = [o.register_step_post_hook(self._damp_update) for o in trainer.optimizers]

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Begin with no contribution (Lightning hook)."""
        pl_module.contributions.take()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the optimisers alone (Lightning hook)."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Optimizer) -> None:
        """Coordinate the gradients of one step: reduced over ranks, unscaled, not yet clipped (Lightning hook)."""
        sums = pl_module.contributions.take()
        step = trainer.global_step
        active = self.start_step <= step and (self.end_step is None or step < self.end_step)
        if sums is None or not active:
            return
        image, text = all_reduce_sum(sums).unbind()
        k_image, k_text = modality_coefficients(image, text, self.beta)
        coefficients = {"image": k_image, "text": k_text}
        groups = self._parameters.items()
        gradients = {name: [weight.grad for weight in group if weight.grad is not None] for name, group in groups}
        generator = torch.Generator(device=pl_module.device)
        generator.manual_seed(stable_hash("gmcoord", run_seed(), step))
        damp = self.apply_to == "grad"
        share = coordinate_gradients(gradients, coefficients, self.noise, generator, damp)
        if not damp:
            self._pending = [
                (coefficients[name], list(group), list(torch._foreach_add([p.detach() for p in group], 0)))
                for name, group in groups
            ]
        ratio = contribution_ratio(image, text)
        scalars = {"rho_text": ratio, "k_text": k_text, "k_image": k_image, "noise_over_grad": share}
        pl_module.log_dict({f"gmcoord/{name}": value for name, value in scalars.items()}, batch_size=1)

    @torch.no_grad()
    def _damp_update(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Take back all but k of the step that was taken."""
        for k, parameters, before in self._pending:
            moved = [parameter.detach() for parameter in parameters]
            torch._foreach_sub_(moved, before)
            # Of a step that was not finite nothing was taken, and its k is no number either.
            torch._foreach_mul_(moved, torch.where(torch.isfinite(k), k, 1.0).to(moved[0].dtype))
            torch._foreach_add_(moved, before)
        self._pending = []
