"""Steps whose loss or gradient is not finite: kept away from the weights without waiting for the device.

Every step ends in a flag on the device: 1 where the norm of the gradients is not finite. A loss that is not finite
makes all gradients NaN, and the mean over ranks makes them NaN everywhere, so all ranks raise the same flag without a
message. A fused Adam takes the flag as ``found_inf`` and changes neither weights nor its state; for any other
optimiser the gradients are removed, which requires reading the flag. Running statistics are restored.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from common.errors import CheckpointError, NonFiniteError


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of floating-point tensors that hold NaN or infinity; waits for the device."""
    floats = {name: value for name, value in tensors.items() if isinstance(value, Tensor) and value.is_floating_point()}
    return [name for name, value in floats.items() if not bool(torch.isfinite(value).all())]


def check_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Check that weights are finite.

    Args:
        tensors: The weights.
        source: Their source, as the beginning of a sentence.

    Raises:
        CheckpointError: a tensor holds NaN or infinity.
    """
    if found := not_finite(tensors):
        more = f" and {len(found) - 1} more of its {len(tensors)} tensors" if len(found) > 1 else ""
        raise CheckpointError(f"{source} holds NaN or infinity in {found[0]}{more}: its training diverged. Take an "
                              f"earlier checkpoint, or train again at a lower learning rate.")  # fmt: skip


class StepRecord(NamedTuple):
    """The record of a step, kept until the host has read its flag.

    Attributes:
        step: Its number, from 1.
        scalars: Scalars logged in training, by name, on the device.
        samples: Names of this rank's samples.
        flag: 1 if it was not finite, on the device; set at its end.
    """

    step: int
    scalars: list[tuple[str, Tensor]]
    samples: list[str]
    flag: list[Tensor]

    def bad_terms(self) -> list[str]:
        """Return the names of the scalars that were not finite on this rank; waits for the device."""
        return [name for name, value in self.scalars if not math.isfinite(float(value))]


class FiniteSteps:
    """Keeps non-finite steps away from a module's weights.

    Attributes:
        flag: 1 if the current step is not finite, else 0; float32 on the device.
        skipped: Number of non-finite steps so far, on the device.
        records: The last steps.
        strict: Whether to raise at once for a non-finite scalar, for debugging.
    """

    def __init__(self) -> None:
        self.flag = torch.zeros(())
        self.skipped = torch.zeros(())
        self.records: deque[StepRecord] = deque(maxlen=21)
        self.strict = False
        self._loss_flag = torch.zeros(())
        self._open: StepRecord | None = None
        self._buffers: list[tuple[Tensor, Tensor]] = []

    def begin(self, module: nn.Module, step: int, device: torch.device, samples: Iterable[str]) -> None:
        """Begin a batch, of a new or an accumulating step.

        Args:
            module: The module whose running statistics are saved.
            step: Number of the step, from 1.
            device: The module's device.
            samples: Names of the batch's samples.
        """
        if self.flag.device != device:
            self.flag, self.skipped, self._loss_flag = (torch.zeros((), device=device) for _ in range(3))
        if self._open is None:
            self._open = StepRecord(step, [], [], [])
            self._loss_flag.zero_()
            self._keep_buffers(module)
        self._open.samples.extend(samples)

    @torch.no_grad()
    def _keep_buffers(self, module: nn.Module) -> None:
        buffers = [buffer for part in module.modules() if part.training for buffer in part._buffers.values()
                   if buffer is not None]  # fmt: skip
        if len(buffers) == len(self._buffers) and all(a is b for a, (b, _) in zip(buffers, self._buffers, strict=True)):
            for buffer, kept in self._buffers:
                kept.copy_(buffer)
        else:
            self._buffers = [(buffer, buffer.clone()) for buffer in buffers]

    def note(self, name: str, value: Any) -> None:
        """Record a scalar of the step.

        Raises:
            NonFiniteError: it is not finite, and ``strict`` is set.
        """
        if self.strict and not math.isfinite(float(value)):
            step = "" if self._open is None else f"Step {self._open.step}: "
            raise NonFiniteError(f"{step}{name} is {float(value)}, computed from modules whose outputs are finite. "
                                 f"--debug shows where.")  # fmt: skip
        if self._open is not None and isinstance(value, Tensor) and value.numel() == 1:
            self._open.scalars.append((name, value.detach()))

    def poisoned(self, loss: Tensor) -> Tensor:
        """Return the loss itself, or one with only NaN gradients if it is not finite."""
        finite = torch.isfinite(loss.detach())
        self._loss_flag.copy_(torch.maximum(self._loss_flag, finite.logical_not().to(self._loss_flag)))
        return loss * torch.where(finite, 1.0, math.nan)

    @torch.no_grad()
    def check_norm(self, norm: Tensor, optimizers: Iterable[Optimizer]) -> None:
        """Raise the flag if the gradients' norm is not finite, and keep the optimisers from stepping.

        Args:
            norm: Norm of all gradients, on the device.
            optimizers: The optimisers about to step.
        """
        self.flag.copy_(torch.isfinite(norm).logical_not())
        for optimizer in optimizers:
            # Fused SGD leaves its momentum uninitialised if the very first step is skipped.
            if isinstance(optimizer, Adam) and getattr(optimizer, "_step_supports_amp_scaling", False):
                optimizer.found_inf = self.flag  # type: ignore[attr-defined]
            elif bool(self.flag):
                for group in optimizer.param_groups:
                    for parameter in group["params"]:
                        parameter.grad = None

    @torch.no_grad()
    def check_loss(self) -> None:
        """Raise the flag if the loss was not finite: float16's scaler handles the gradients itself."""
        self.flag.copy_(self._loss_flag)

    @torch.no_grad()
    def also(self, flag: Tensor) -> None:
        """Count the step as not finite if ``flag``, 0 or 1, is raised: something besides the optimiser was skipped."""
        self.flag.copy_(torch.maximum(self.flag, flag.to(self.flag)))

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the running statistics from before a non-finite step."""
        bad = self.flag > 0
        for buffer, kept in self._buffers:
            buffer.copy_(torch.where(bad, kept, buffer))

    @torch.no_grad()
    def end(self) -> None:
        """End a step."""
        self.skipped.add_(self.flag)
        if self._open is not None:
            self._open.flag.append(self.flag.clone())
            self.records.append(self._open)
            self._open = None
