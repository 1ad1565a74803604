"""The one training step that every pre-training method shares."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from common.callbacks.finite_check import FiniteCheck, refuse_to_save
from common.checkpoint import check_shapes, encoder_record
from common.distributed import reduce_sums
from common.errors import CheckpointError, NonFiniteError, UserError
from common.finite import FiniteSteps, check_finite
from common.optim import Schedule, WarmupCosine, param_groups
from common.randomness import run_seed, seed_step, stable_hash
from common.runtime.reporting import log_scalars
from common.types import HiddenTokens, InputSpec, Panel, Reconstruction, TokenFeatures


class StepOutput(NamedTuple):
    """What one step computes.

    Attributes:
        losses: unweighted scalars by name; their weighted sum is trained on.
        weights: what each validation loss counts for: hidden entries, or samples.
        reconstruction: for the collapse diagnostics and the pictures.
        extras: further scalars, logged as ``train/<name>`` and ``val/<name>``.
    """

    losses: dict[str, Tensor]
    weights: dict[str, Tensor]
    reconstruction: Reconstruction
    extras: dict[str, Tensor]

    def named(self) -> dict[str, Tensor]:
        """Return losses and extras under the names they are logged by."""
        return {f"loss_{name}": value for name, value in self.losses.items()} | self.extras


@contextmanager
def seeded_init(name: str) -> Any:
    """Make what is built inside depend on the run's seed and ``name`` alone, and leave torch's generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stable_hash("init", run_seed(), name))
        yield


#: Arguments that say what a network's input is like; None in the configuration, filled in from the data.
SIZES = ("channels", "image_size", "regions", "vocabulary", "classes", "genome")


_OTHER_WORDS = "set data.tokenizer to the tokenizer.json of the checkpoint's run, and text_length to its length."


def _plain(value: Any) -> Any:
    """Return lists and dicts of plain values, as YAML and checkpoints have them."""
    if isinstance(value, Mapping):
        return {name: _plain(entry) for name, entry in value.items()}
    return list(value) if isinstance(value, list | tuple) else value


class BuiltFromData(pl.LightningModule):
    """A module whose network takes its sizes from the data module, or from the checkpoint it is loaded from.

    Subclasses call ``save_hyperparameters()`` with ``channels`` and ``image_size`` among their arguments (None = as the
    data say) and build in :meth:`build_network`.

    Anything that follows the weights, such as a teacher's moving average, is updated in ``optimizer_step``: checkpoints
    are written in callbacks' ``on_train_batch_end``, which Lightning runs before the module's.
    """

    network: Any
    compile_network: bool = False
    preprocessing: Mapping[str, Any] = {}

    def __init__(self) -> None:
        super().__init__()
        self.finite = FiniteSteps()

    @abstractmethod
    def build_network(self, spec: InputSpec) -> nn.Module:
        """Make the network for inputs of ``spec``."""

    def configure_model(self) -> None:
        """Build the network once its input is known (Lightning hook)."""
        if self.network is not None:
            return
        spec = self.resolve_input()
        try:
            with seeded_init(type(self).__name__):
                self.network = self.build_network(spec)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(str(error)) from error
        if self.compile_network:
            self.network.compile()

    def resolve_input(self) -> InputSpec:
        """Return the input's sizes and store them for the checkpoint.

        Raises:
            CheckpointError: the checkpoint was made for other channels or another size than the data give.
        """
        stored = {name: self.hparams[name] for name in SIZES if self.hparams.get(name) is not None}
        datamodule = getattr(self._trainer, "datamodule", None) if self._trainer is not None else None
        if datamodule is None:
            if not {"channels", "image_size"} <= stored.keys():
                raise CheckpointError("The input's `channels` and `image_size` are unknown: attach a data module.")
            return InputSpec(**stored)
        spec: InputSpec = datamodule.input_spec
        given: dict[str, Any] = {"channels": list(spec.channels), "image_size": list(spec.image_size)}
        given |= {name: _plain(getattr(spec, name)) for name in ("regions", "vocabulary", "classes", "genome")}
        for name in ("regions", "classes"):
            if name in stored and not getattr(spec, name):
                # An archive without labels, to predict: the checkpoint knows what it was trained to find.
                given[name] = _plain(stored[name])
                spec = spec._replace(**{name: stored[name]})
        if "vocabulary" in stored and given["vocabulary"]:
            # Older checkpoints know less of their vocabulary.
            known = {key: value for key, value in given["vocabulary"].items() if key in stored["vocabulary"]}
            stored["vocabulary"] = (
                given["vocabulary"] if known == _plain(stored["vocabulary"]) else stored["vocabulary"]
            )
        for name, value in stored.items():
            if _plain(value) != given[name]:
                raise CheckpointError(
                    f"The model was made for {name} {_plain(value)}, but the data give {given[name]}: "
                    + (
                        _OTHER_WORDS
                        if name == "vocabulary"
                        else "choose matching data, or start from its encoder with a fine-tuning configuration."
                    )
                )
        self.hparams.update({name: given[name] for name in SIZES if name in self.hparams})
        self.preprocessing = spec.preprocessing
        return spec

    def configure_callbacks(self) -> list[pl.Callback]:
        """Look after steps that are not finite in every trainer (Lightning hook)."""
        callbacks: list[pl.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        return [] if any(isinstance(callback, FiniteCheck) for callback in callbacks) else [FiniteCheck()]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Record how to rebuild the encoder alone; weights that are not finite are never saved (Lightning hook).

        Raises:
            NonFiniteError: they are not.
        """
        refuse_to_save(checkpoint, self.global_step)
        checkpoint["encoder"] = encoder_record(self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse weights of another shape, and such as are not finite, in one sentence (Lightning hook)."""
        self.preprocessing = self.preprocessing or checkpoint.get("encoder", {}).get("preprocessing", {})
        check_shapes(checkpoint["state_dict"], self.state_dict())
        check_finite(checkpoint["state_dict"], "The checkpoint")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Tie dropout to the step, and log the highest learning rate (Lightning hook)."""
        seed_step(run_seed(), self.global_step, batch_idx, self.global_rank)
        names = batch.get("subject_id", ()) if isinstance(batch, Mapping) else ()
        self.finite.begin(self, self.global_step + 1, self.device, map(str, names))
        groups = [group for optimizer in self.trainer.optimizers for group in optimizer.param_groups]
        self.log("lr", max(group["lr"] for group in groups), batch_size=1)

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Log a scalar, and remember it until it is known that its step was finite."""
        if name.startswith("train/"):
            self.finite.note(name, value)
        super().log(name, value, *args, **kwargs)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute gradients; all are NaN, on every rank, where the loss is not finite (Lightning hook)."""
        try:
            super().backward(self.finite.poisoned(loss), *args, **kwargs)
        except RuntimeError as error:
            if not self.finite.strict or "returned nan values" not in str(error):
                raise
            raise NonFiniteError(f"Step {self.global_step + 1}: {str(error).splitlines()[0].rstrip('.')}: its gradient "
                                 f"is the first that is not finite. The warning above shows where it was computed."
                                 ) from error  # fmt: skip

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip gradients, and hold those back that are not finite (Lightning hook).

        Lightning refuses to clip for fused optimisers under mixed precision, because float16's would still be scaled;
        bfloat16's never are.
        """
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            self.finite.judge_loss()
            return
        parameters = [parameter for parameter in self.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        if gradient_clip_algorithm in (None, "norm") and gradient_clip_val:
            nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, norm)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        self.finite.judge(norm.to(self.device), self.trainer.optimizers)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, unless the gradients are not finite (Lightning hook)."""
        super().optimizer_step(*args, **kwargs)
        self.finite.restore()


class SSLModule(BuiltFromData, ABC):
    """A pre-training method: losses by name, summed with weights, logged the same in training and validation.

    Args:
        loss_weights: Weight of each loss that :meth:`step` returns.
        optimizer: Makes the optimiser from parameter groups.
        schedule: Attaches a learning-rate schedule for a number of optimiser steps.
    """

    #: What ``best.ckpt`` watches.
    monitor = ("val/loss", "min")

    def __init__(
        self,
        loss_weights: Mapping[str, float],
        optimizer: OptimizerCallable = torch.optim.AdamW,
        schedule: Schedule | None = None,
    ) -> None:
        super().__init__()
        self.network = None
        self.loss_weights = dict(loss_weights)
        self._make_optimizer = optimizer
        self._make_schedule = schedule or WarmupCosine()
        self._validation: list[StepOutput] = []

    @abstractmethod
    def step(self, batch: Any, sync: bool) -> StepOutput:
        """Compute the losses of one batch; ``sync`` tells whether statistics run over all ranks."""

    @abstractmethod
    def reconstruct(self, batch: Any, image: str = "image") -> Reconstruction:
        """Reconstruct a batch from what its masks leave visible of ``batch[image]``; the target is always its own."""

    @abstractmethod
    def reconstruction_target(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return the target ``(B, ..., P)`` in the loss's units and which entries exist, bool ``(B, ...)``."""

    def reconstruction_groups(self, batch: Any) -> dict[str, Tensor]:
        """Return which entries of :meth:`reconstruction_target` belong to a group, bool ``(B, ...)`` by its name.

        Groups of a :class:`~common.types.Reconstruction` that are named here are held against a constant of their own.
        """
        return {}

    @abstractmethod
    def token_features(self, batch: Any) -> TokenFeatures:
        """Encode unmasked inputs."""

    @abstractmethod
    def panels(self, batch: Any, output: Reconstruction, index: int) -> dict[str, Panel]:
        """Draw sample ``index`` of a batch, by modality."""

    def hidden_tokens(self, batch: Any) -> HiddenTokens:
        """Predict the words that were hidden from a batch; only methods with text have any.

        Raises:
            UserError: the method has no text.
        """
        raise UserError(f"{type(self).__name__} has no text: leave the callbacks of text out of its configuration.")

    def total(self, losses: Mapping[str, Tensor]) -> Tensor:
        """Sum the losses with their weights."""
        return torch.stack([self.loss_weights[name] * value for name, value in losses.items()]).sum()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the weighted loss of a batch, reduced over ranks (Lightning hook)."""
        output = self.step(batch, sync=True)
        loss = self.total(output.losses)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=1)
        self.log_dict({f"train/{name}": value.detach() for name, value in output.named().items()}, batch_size=1)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Collect the losses of a batch and hand its reconstruction to the callbacks (Lightning hook)."""
        output = self.step(batch, sync=False)
        self._validation.append(output._replace(reconstruction=None))  # type: ignore[arg-type]
        return {"reconstruction": output.reconstruction}

    def on_validation_epoch_end(self) -> None:
        """Log sums over counts, over all samples of all ranks (Lightning hook)."""
        sums: dict[str, tuple[float, float]] = {}
        for output in self._validation:
            for name, value in output.named().items():
                weight = float(output.weights[name.removeprefix("loss_")])
                total, count = sums.get(name, (0.0, 0.0))
                sums[name] = (total + float(value) * weight, count + weight)
        self._validation.clear()
        means = reduce_sums(sums)
        if means:
            means["loss"] = sum(weight * means.get(f"loss_{name}", 0.0) for name, weight in self.loss_weights.items())
        log_scalars(self, {f"val/{name}": value for name, value in means.items()})

    def configure_optimizers(self) -> Any:
        """Make the optimiser and its schedule (Lightning hook)."""
        optimizer = self._make_optimizer(param_groups(self))
        schedule = self._make_schedule(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
