"""Handling of non-finite steps: reported, counted, tolerated up to a number, and never saved."""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from common.distributed import agree, gather_objects
from common.errors import NonFiniteError
from common.finite import FiniteSteps, StepRecord, not_finite
from common.runtime.reporting import print_line

#: Number of sample or loss names in a message.
_SHOWN = 3


class _Finding(NamedTuple):
    """A non-finite step, as seen by one rank."""

    step: int
    terms: list[str]
    samples: list[str]


def _finding(record: StepRecord) -> _Finding:
    terms = [name.removeprefix("train/") for name in record.bad_terms()]
    return _Finding(record.step, [name for name in terms if name != "loss"] or terms, record.samples)


def _few(names: Sequence[str]) -> str:
    """Join the first names, each shortened."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(name if len(name) <= 30 else f"{name[:27]}..." for name in names[:_SHOWN]) + more


def describe(parts: Sequence[Sequence[_Finding]]) -> str:
    """Describe the first non-finite step: what was not finite, and with which samples.

    Args:
        parts: Findings of each rank, in rank order; empty for none.
    """
    step = min(finding.step for part in parts for finding in part)
    found = {rank: finding for rank, part in enumerate(parts) for finding in part if finding.step == step}
    guilty = {rank: finding for rank, finding in found.items() if finding.terms}
    terms = list(dict.fromkeys(term for finding in guilty.values() for term in finding.terms))
    samples = [name for finding in (guilty or found).values() for name in finding.samples]
    what = f"the loss ({_few(terms)})" if terms else "the gradient"
    where = f" on rank {', '.join(map(str, guilty))}" if guilty and len(parts) > len(guilty) else ""
    return f"step {step}: {what} is not finite{where}, with the samples {_few(samples) or '(without names)'}"


def refuse_to_save(checkpoint: Mapping[str, Any], step: int) -> None:
    """Refuse to write a checkpoint whose weights or optimiser state hold NaN or infinity; all ranks call it.

    Raises:
        NonFiniteError: NaN or infinity on any rank.
    """
    tensors = dict(checkpoint["state_dict"])
    for number, optimizer in enumerate(checkpoint.get("optimizer_states", ())):
        for index, state in optimizer["state"].items():
            tensors |= {f"state {name} of optimiser {number}, parameter {index}": value
                        for name, value in state.items() if isinstance(value, Tensor)}  # fmt: skip
    found = not_finite(tensors)
    if agree(bool(found)):
        where = f": {found[0]} holds NaN or infinity" if found else " on another rank"
        raise NonFiniteError(f"The training has diverged, and nothing was saved at step {step}{where}. What was saved "
                             f"before is intact; lower the learning rate, and go on from there.")  # fmt: skip


class FiniteCheck(pl.Callback):
    """Checks for non-finite steps every few steps and before every save and validation.

    Such steps never change the weights (:class:`~common.finite.FiniteSteps`). If there are more than tolerated, the run
    stops on all ranks together. With ``trainer.detect_anomaly`` the first module or loss with a non-finite value stops
    the run at once, by name, at the cost of waiting for the device everywhere.

    Args:
        every_n_steps: Optimiser steps between checks.
        max_skipped_steps: Number of tolerated steps, over all restarts of a run.
    """

    def __init__(self, every_n_steps: int = 10, max_skipped_steps: int = 0) -> None:
        self.every_n_steps, self.max_skipped_steps = every_n_steps, max_skipped_steps
        self.skipped = 0
        self._known = 0
        self._ahead: tuple[Tensor, Any] | None = None
        self._handles: list[Any] = []

    def state_dict(self) -> dict[str, Any]:
        """Return the count for a resumed run (Lightning hook)."""
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the count (Lightning hook)."""
        self.skipped = state_dict["skipped"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep records of the steps between two checks; watch every module if requested (Lightning hook)."""
        finite: FiniteSteps = pl_module.finite  # type: ignore[assignment]
        finite.records = deque(maxlen=2 * self.every_n_steps + 1)
        self._known = int(finite.skipped)
        if trainer._detect_anomaly:
            finite.strict = True
            self._handles = [part.register_forward_hook(_watch(name, pl_module))
                             for name, part in pl_module.named_modules() if name]  # fmt: skip

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Close a step's record, and check at every n-th (Lightning hook)."""
        if trainer.fit_loop._should_accumulate():
            return
        pl_module.finite.end()  # type: ignore[union-attr, operator]
        if trainer.global_step % self.every_n_steps == 0:
            self.look(pl_module, wait=False)
            pl_module.log("throughput/skipped_steps", float(self.skipped), batch_size=1)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check before validation (Lightning hook)."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.look(pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check at the end of an epoch (Lightning hook)."""
        self.look(pl_module)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Check before anything is saved (Lightning hook)."""
        self.look(pl_module)

    def _count(self, finite: FiniteSteps, wait: bool) -> int:
        """Return the number of skipped steps: the current one, or without waiting that of the previous check."""
        if wait or finite.skipped.device.type != "cuda":
            self._ahead = None
            return int(finite.skipped)
        count = self._known
        if self._ahead is not None:
            copy, done = self._ahead
            done.synchronize()
            count = int(copy)
        copy = torch.zeros((), pin_memory=True)
        copy.copy_(finite.skipped, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        self._ahead = copy, done
        return count

    def look(self, module: pl.LightningModule, wait: bool = True) -> None:
        """Report non-finite steps since the last check, or stop the run; all ranks call it.

        Args:
            module: The module.
            wait: Whether to wait for the device; otherwise the count may be that of the previous check.

        Raises:
            NonFiniteError: more steps than tolerated.
        """
        finite: FiniteSteps = module.finite  # type: ignore[assignment]
        count = self._count(finite, wait)
        new, self._known = count - self._known, count
        if not agree(new > 0):
            return
        self.skipped += new
        bad = [record for record in finite.records if bool(record.flag[0])]
        finite.records.clear()
        message = describe(gather_objects([_finding(record) for record in bad]))
        if self.skipped > self.max_skipped_steps:
            raise NonFiniteError(
                f"Stopped at {message}. No weight has seen it. Lower the learning rate, look at these samples "
                f"(doctor), or let such steps pass with --safety.max_skipped_steps; then resume from what was saved."
            )
        first = "" if new == 1 else f"{new} steps, the first of them "
        print_line(f"skipped {first}{message}; {self.skipped} of {self.max_skipped_steps} such steps are tolerated")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave modules and optimisers alone (Lightning hook)."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for optimizer in trainer.optimizers:
            if hasattr(optimizer, "found_inf"):
                del optimizer.found_inf


def _numbered(values: Any) -> dict[str, Any]:
    return {str(index): value for index, value in enumerate(tree_leaves(values))}


def _watch(name: str, module: pl.LightningModule) -> Any:
    """Return a forward hook that raises if a module's output holds NaN or infinity."""

    def hook(part: Any, inputs: Any, output: Any) -> None:
        if module.training and not_finite(_numbered(output)):
            whole = not not_finite(_numbered(inputs))
            raise NonFiniteError(
                f"Step {module.global_step + 1}: the output of {name} ({type(part).__name__}) is the first that is not "
                f"finite; its input {'is' if whole else 'is not either'}. --debug shows where it is called."
            )

    return hook
