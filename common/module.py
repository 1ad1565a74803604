"""The one training step that every pre-training method shares."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import contextmanager
from typing import Any, Generic, NamedTuple, TypeVar

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from common.callbacks.finite_check import FiniteCheck, refuse_to_save
from common.checkpoint import check_shapes, encoder_record
from common.distributed import gather_objects, reduce_sums
from common.errors import CheckpointError, NonFiniteError, UserError
from common.finite import FiniteSteps, check_finite
from common.optim import OptimizerConfig, Schedule, WarmupCosine, param_groups
from common.randomness import run_seed, seed_step, stable_hash
from common.runtime.reporting import log_scalars, say
from common.types import HiddenTokens, ImageKey, InputSpec, Panel, Reconstruction, TaskState, TokenFeatures
from common.weights.channels import ChannelReport, deliver_channels

#: The batch of a method, a type of :mod:`common.types`.
BatchT = TypeVar("BatchT", bound=Mapping[str, Any])


class Term(NamedTuple):
    """One scalar of a step: a loss, or something to watch.

    Attributes:
        value: a mean.
        count: what it is the mean of: hidden entries, or samples. Validation weighs batches by it.
        weight: its factor in the loss that is trained on; None: logged alone.
    """

    value: Tensor
    count: Tensor | float = 1.0  # type: ignore[assignment]  # tuple has a method of this name
    weight: float | None = None


class StepOutput(NamedTuple):
    """What one step computes.

    Attributes:
        terms: by name; those with a weight are logged as ``train/loss_<name>``, the others as ``train/<name>``.
        reconstruction: for the collapse diagnostics and the pictures.
    """

    terms: dict[str, Term]
    reconstruction: Reconstruction | None

    def loss(self) -> Tensor:
        """Return the weighted sum that is trained on."""
        return torch.stack([term.weight * term.value for term in self.terms.values() if term.weight is not None]).sum()

    def logged(self) -> dict[str, Term]:
        """Return the terms under the names they are logged by, the losses first."""
        losses = {f"loss_{name}": term for name, term in self.terms.items() if term.weight is not None}
        return losses | {name: term for name, term in self.terms.items() if term.weight is None}


@contextmanager
def seeded_init(name: str) -> Any:
    """Make what is built inside depend on the run's seed and ``name`` alone, and leave torch's generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stable_hash("init", run_seed(), name))
        yield


class BuiltFromData(pl.LightningModule):
    """A module whose network takes its sizes from the data module, or from the checkpoint it is loaded from.

    Subclasses call ``save_hyperparameters()``, name in ``remembered`` what of their input their network is built for,
    and build it in :meth:`build_network`. None of it is an argument: it is the module's ``state``, which checkpoints
    carry. Those with learning rates of their own for some parameters say so in :meth:`lr_scale`.

    Anything that follows the weights, such as a teacher's moving average, is updated in ``optimizer_step``: checkpoints
    are written in callbacks' ``on_train_batch_end``, which Lightning runs before the module's.
    """

    network: Any
    #: Fields of the input's spec that the network is built for.
    remembered: tuple[str, ...] = ("channels", "image_size")
    #: How the channels of stored weights were matched with those of the data; None without such weights.
    channel_report: ChannelReport | None = None

    def __init__(self, optimization: OptimizerConfig) -> None:
        super().__init__()
        self.network = None
        self.optimization = optimization
        #: What a checkpoint remembers beside the weights.
        self.state = TaskState()
        #: Keeps steps that are not finite away from the weights.
        self.finite = FiniteSteps()

    @property
    def spec(self) -> InputSpec:
        """What the network is built for.

        Raises:
            CheckpointError: it is not built yet.
        """
        if self.state.spec is None:
            raise CheckpointError("The network is not built yet: attach a data module, or load a checkpoint.")
        return self.state.spec

    @abstractmethod
    def build_network(self, spec: InputSpec) -> nn.Module:
        """Make the network for inputs of ``spec``."""

    def configure_model(self) -> None:
        """Build the network once its input is known (Lightning hook).

        Raises:
            CheckpointError: the trainer has no data module, or the checkpoint was made for other inputs than its.
        """
        if self.network is not None:
            return
        stored = self.state.spec
        datamodule = getattr(self._trainer, "datamodule", None) if self._trainer is not None else None
        if datamodule is not None:
            spec = self.meet_channels(datamodule, stored)
            if stored is not None:
                spec = spec.merge(stored)
                if problem := spec.difference(stored):
                    raise CheckpointError(problem)
            self.build(spec)
        elif stored is not None:
            self.build(stored)
        elif self._trainer is not None:
            raise CheckpointError("The input's channels and size are unknown: attach a data module.")

    def build(self, spec: InputSpec) -> None:
        """Build the network for inputs of ``spec``, from the run's seed and the class's name alone.

        Raises:
            UserError: sizes or settings that do not fit.
        """
        self.state = self.state._replace(spec=spec.only(self.remembered))
        try:
            with seeded_init(type(self).__name__):
                self.network = self.build_network(spec)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(str(error)) from error
        if self.optimization.compile:
            self.network.compile()

    def meet_channels(self, datamodule: Any, stored: InputSpec | None) -> InputSpec:
        """Bring the data's channels into a checkpoint's order, and return what the batches will hold.

        Args:
            datamodule: The data.
            stored: What the checkpoint was made for; None lets the data decide.

        Raises:
            CheckpointError: the data have a channel that the checkpoint lacks, or none of its channels.
        """
        given: InputSpec = datamodule.input_spec
        if stored is None or not stored.channels or given.channels == stored.channels:
            return given
        spec, report = deliver_channels(datamodule, stored.channels, stored.names)
        self.note_channels(report, spec)
        return spec

    def note_channels(self, report: ChannelReport, spec: InputSpec) -> None:
        """Log how the channels of stored weights were matched with those of the data, and keep it for the summary."""
        self.channel_report = report
        say(report.line(spec.shown))

    def shown_channels(self) -> tuple[str, ...]:
        """Return what pictures and logs call the channels."""
        return self.spec.names or self.spec.channels

    def configure_callbacks(self) -> list[pl.Callback]:
        """Look after steps that are not finite in every trainer (Lightning hook)."""
        callbacks: list[pl.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        return [] if any(isinstance(callback, FiniteCheck) for callback in callbacks) else [FiniteCheck()]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Record the state, and how to rebuild the encoder alone (Lightning hook).

        Raises:
            NonFiniteError: weights or the optimiser's state are not finite; such are never saved.
        """
        refuse_to_save(checkpoint, self.global_step)
        checkpoint["state"] = self.state.plain()
        checkpoint["encoder"] = encoder_record(self, self.spec)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Build the network where no data module did; refuse weights of another shape or NaN (Lightning hook)."""
        stored = TaskState.read(checkpoint)
        if self.network is None:
            self.state = stored
            self.build(self.spec)
        elif stored.spec is not None and (problem := self.spec.difference(stored.spec)):
            raise CheckpointError(problem)
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
        self.finite.note("train/loss", loss)
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

    def lr_scale(self, name: str) -> float:
        """Return the factor of the learning rate of a parameter."""
        return 1.0

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the groups that the optimiser is made from."""
        return param_groups(self, self.optimization.layer_decay, self.lr_scale)

    def default_schedule(self) -> Schedule | None:
        """Return the schedule where the configuration has none; None keeps the rate as it is."""
        return WarmupCosine()

    def configure_optimizers(self) -> Any:
        """Make the optimiser and its schedule (Lightning hook)."""
        optimizer = self.optimization.optimizer(self.parameter_groups())
        attach = self.optimization.schedule or self.default_schedule()
        if attach is None:
            return optimizer
        schedule = attach(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class SSLModule(BuiltFromData, ABC, Generic[BatchT]):
    """A pre-training method: terms by name, summed with weights, logged the same in training and validation.

    Args:
        optimization: How its weights are updated.
    """

    #: The metric that selects ``best.ckpt``.
    monitor = ("val/loss", "min")

    def __init__(self, optimization: OptimizerConfig) -> None:
        super().__init__(optimization)
        self._validation: list[StepOutput] = []
        self._validated = 0

    @abstractmethod
    def step(self, batch: BatchT, sync: bool) -> StepOutput:
        """Compute the terms of one batch; ``sync`` tells whether statistics run over all ranks."""

    @abstractmethod
    def reconstruct(self, batch: BatchT, image: ImageKey = "image") -> Reconstruction:
        """Reconstruct a batch from what its masks leave visible of ``batch[image]``; the target is always its own."""

    @abstractmethod
    def reconstruction_target(self, batch: BatchT) -> tuple[Tensor, Tensor]:
        """Return the target ``(B, ..., P)`` in the loss's units and which entries exist, bool ``(B, ...)``."""

    def reconstruction_groups(self, batch: BatchT) -> dict[str, Tensor]:
        """Return which entries of :meth:`reconstruction_target` belong to a group, bool ``(B, ...)`` by its name.

        Groups of a :class:`~common.types.Reconstruction` that are named here are held against a constant of their own.
        """
        return {}

    @abstractmethod
    def token_features(self, batch: BatchT) -> TokenFeatures:
        """Encode unmasked inputs."""

    @abstractmethod
    def panels(self, batch: BatchT, output: Reconstruction, index: int) -> dict[str, Panel]:
        """Draw sample ``index`` of a batch, by modality."""

    def on_host(self, batch: BatchT) -> Mapping[str, Any]:
        """Return what a training batch needs beside what was loaded, found before it goes to the device.

        The ranks may talk to each other over :func:`common.distributed.control_group`; all call it.
        """
        return {}

    def hidden_tokens(self, batch: BatchT) -> HiddenTokens:
        """Predict the words that were hidden from a batch; only methods with text have any.

        Raises:
            UserError: the method has no text.
        """
        raise UserError(f"{type(self).__name__} has no text: leave the callbacks of text out of its configuration.")

    def training_step(self, batch: BatchT, batch_idx: int) -> Tensor:
        """Return the weighted loss of a batch, reduced over ranks (Lightning hook)."""
        output = self.step(batch, sync=True)
        loss = output.loss()
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=1)
        terms = output.logged()
        self.log_dict({f"train/{name}": term.value.detach() for name, term in terms.items()}, batch_size=1)
        return loss

    def validation_step(self, batch: BatchT, batch_idx: int) -> dict[str, Any]:
        """Collect the terms of a batch and hand its reconstruction to the callbacks (Lightning hook)."""
        output = self.step(batch, sync=False)
        self._validation.append(output._replace(reconstruction=None))
        self._validated += next(len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim)
        return {"reconstruction": output.reconstruction}

    def on_validation_epoch_end(self) -> None:
        """Log sums over counts, over all samples of all ranks (Lightning hook)."""
        sums: dict[str, tuple[float, float]] = {}
        weights: dict[str, float] = {}
        for output in self._validation:
            for name, term in output.logged().items():
                total, count = sums.get(name, (0.0, 0.0))
                sums[name] = (total + float(term.value) * float(term.count), count + float(term.count))
                if term.weight is not None:
                    weights[name] = term.weight
        self._validation.clear()
        means = reduce_sums(sums)
        if means:
            means["loss"] = sum(weight * means.get(name, 0.0) for name, weight in weights.items())
        means["samples"] = float(sum(gather_objects(self._validated)))
        self._validated = 0
        log_scalars(self, {f"val/{name}": value for name, value in means.items()})
