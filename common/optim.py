"""Parameter groups and learning-rate schedules."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler


def _modules_with(module: nn.Module, method: str) -> Iterable[tuple[str, Any]]:
    """Yield (prefix, module) for the submodules that have ``method``."""
    for name, child in module.named_modules():
        if child is not module and callable(getattr(child, method, None)):
            yield (f"{name}." if name else "", child)


def param_groups(
    module: nn.Module, layer_decay: float = 1.0, lr_scale: Callable[[str], float] | None = None
) -> list[dict[str, Any]]:
    """Sort the trainable parameters into groups for an optimiser.

    Biases, norms and whatever a submodule names in ``no_weight_decay()`` (positions, mask tokens) get a weight decay
    of 0; all others keep the optimiser's. Encoders with ``layer_index(name)`` get learning rates that fall by
    ``layer_decay`` per layer towards the input, stored as ``lr_scale`` for :class:`Schedule`.

    Args:
        module: The module to train.
        layer_decay: Factor per layer in (0, 1]; 1 means equal rates.
        lr_scale: Factor of the rate by a parameter's name; multiplied with that.

    Raises:
        ValueError: ``layer_decay`` is outside (0, 1].
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"`layer_decay` must lie in (0, 1], got {layer_decay}.")
    exempt = {prefix + name for prefix, child in _modules_with(module, "no_weight_decay")
              for name in child.no_weight_decay()}  # fmt: skip
    layered = list(_modules_with(module, "layer_index"))

    def scale(name: str) -> float:
        for prefix, child in layered:
            if name.startswith(prefix):
                last = len(child.blocks) + 1
                return layer_decay ** (last - child.layer_index(name[len(prefix) :]))
        return 1.0

    groups: dict[tuple[bool, float], dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        plain = parameter.ndim > 1 and name not in exempt
        key = (plain, scale(name) * (lr_scale(name) if lr_scale else 1.0))
        group = groups.setdefault(key, {"params": [], "lr_scale": key[1]} | ({} if plain else {"weight_decay": 0.0}))
        group["params"].append(parameter)
    return list(groups.values())


class Schedule(ABC):
    """The learning rate over a training of known length, stepped once per optimiser step."""

    @abstractmethod
    def factor(self, step: int, total_steps: int) -> float:
        """Return the rate at ``step`` (from 0) over the highest."""

    def __call__(self, optimizer: Optimizer, total_steps: int) -> LRScheduler:
        """Attach the schedule to ``optimizer``, honouring each group's ``lr_scale``."""

        def with_scale(scale: float) -> Callable[[int], float]:
            return lambda step: scale * self.factor(step, total_steps)

        return LambdaLR(optimizer, [with_scale(group.get("lr_scale", 1.0)) for group in optimizer.param_groups])


class WarmupSchedule(Schedule):
    """Linear warm-up, then decay from the highest rate to a fraction of it; subclasses define the decay.

    Args:
        warmup: Warm-up steps: a share of all steps in [0, 1), or a whole number from 1 on.
        final: Last rate over the highest.

    Raises:
        ValueError: ``warmup`` is neither.
    """

    def __init__(self, warmup: float = 0.05, final: float = 0.0) -> None:
        if warmup < 0 or (warmup >= 1 and warmup != int(warmup)):
            raise ValueError(f"`warmup` is a share of all steps in [0, 1) or a whole number of steps, got {warmup}.")
        self.warmup = warmup
        self.final = final

    @abstractmethod
    def remaining(self, progress: float) -> float:
        """Return the remaining share of the decay, 1 to 0, at ``progress`` (0 to 1) after the warm-up."""

    def factor(self, step: int, total_steps: int) -> float:
        """Return the rate at ``step`` (from 0) over the highest."""
        warmup_steps = int(self.warmup) if self.warmup >= 1 else round(self.warmup * total_steps)
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
        return self.final + (1 - self.final) * self.remaining(progress)


class WarmupCosine(WarmupSchedule):
    """Linear warm-up, then half a cosine; the arguments are those of :class:`WarmupSchedule`."""

    def remaining(self, progress: float) -> float:
        """Return the remaining share of the decay, 1 to 0, at ``progress`` (0 to 1) after the warm-up."""
        return 0.5 * (1 + math.cos(math.pi * progress))


class WarmupLinear(WarmupSchedule):
    """Linear warm-up, then a straight line; the arguments are those of :class:`WarmupSchedule`."""

    def remaining(self, progress: float) -> float:
        """Return the remaining share of the decay, 1 to 0, at ``progress`` (0 to 1) after the warm-up."""
        return 1 - progress


@dataclass(frozen=True)
class OptimizerConfig:
    """How a module's weights are updated.

    Args:
        optimizer: Creates the optimiser from parameter groups.
        schedule: Attaches a learning-rate schedule for a number of optimiser steps; None: the module's default.
        layer_decay: Factor of the learning rate per encoder layer towards the input.
        compile: Whether to compile the network.
    """

    optimizer: OptimizerCallable = torch.optim.AdamW
    schedule: Schedule | None = None
    layer_decay: float = 1.0
    compile: bool = False
