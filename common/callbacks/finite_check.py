"""What becomes of steps that were not finite: said, counted, forgiven up to a number, and never saved."""

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

#: Names of samples, and of losses, that a sentence holds.
_SHOWN = 3


class _Finding(NamedTuple):
    """A step that was not finite, as one rank saw it."""

    step: int
    terms: list[str]
    samples: list[str]


def _finding(record: StepRecord) -> _Finding:
    terms = [name.removeprefix("train/") for name in record.bad_terms()]
    return _Finding(record.step, [name for name in terms if name != "loss"] or terms, record.samples)


def _few(names: Sequence[str]) -> str:
    """Join the first names, each cut short."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(name if len(name) <= 30 else f"{name[:27]}..." for name in names[:_SHOWN]) + more


def describe(parts: Sequence[Sequence[_Finding]]) -> str:
    """Say of the first step that was not finite what was wrong with it, and on which samples.

    Args:
        parts: What each rank found, in rank order; empty where one found nothing.
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
        NonFiniteError: one does, on any rank.
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
    """Looks every few steps, and before every save and validation, whether a step was not finite.

    The weights have not seen such a step (:class:`~common.finite.FiniteSteps`). More of them than are forgiven stop the
    run, on all ranks together. With ``trainer.detect_anomaly`` the first module or loss whose value is not finite stops
    it at once, by name, at the price of waiting for the device everywhere.

    Args:
        every_n_steps: Optimiser steps between looks.
        max_skipped_steps: How many steps a run forgives, over all its restarts.
    """

    def __init__(self, every_n_steps: int = 10, max_skipped_steps: int = 0) -> None:
        self.every_n_steps, self.max_skipped_steps = every_n_steps, max_skipped_steps
        self.skipped = 0
        self._known = 0
        self._ahead: tuple[Tensor, Any] | None = None
        self._handles: list[Any] = []

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run adds to (Lightning hook)."""
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting (Lightning hook)."""
        self.skipped = state_dict["skipped"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember as many steps as lie between two looks; watch every module where that was asked for."""
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
        """Close a step's record, and look at every n-th (Lightning hook)."""
        if trainer.fit_loop._should_accumulate():
            return
        pl_module.finite.end()  # type: ignore[union-attr, operator]
        if trainer.global_step % self.every_n_steps == 0:
            self.look(pl_module, wait=False)
            pl_module.log("throughput/skipped_steps", float(self.skipped), batch_size=1)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look before validation (Lightning hook)."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.look(pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the end of an epoch (Lightning hook)."""
        self.look(pl_module)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Look before anything is saved (Lightning hook)."""
        self.look(pl_module)

    def _count(self, finite: FiniteSteps, wait: bool) -> int:
        """Return how many steps were skipped: now, or as of the look before, which nothing has to wait for."""
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
        """Stop the run, or say so, if steps since the last look were not finite; all ranks call it.

        Args:
            module: The module.
            wait: Whether to wait for the device; else the answer may be that of the look before.

        Raises:
            NonFiniteError: more were not than are forgiven.
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
        print_line(f"skipped {first}{message}; {self.skipped} of {self.max_skipped_steps} such steps are forgiven")

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
    """Return a forward hook that raises where the output of a part holds NaN or infinity."""

    def hook(part: Any, inputs: Any, output: Any) -> None:
        if module.training and not_finite(_numbered(output)):
            whole = not not_finite(_numbered(inputs))
            raise NonFiniteError(
                f"Step {module.global_step + 1}: the output of {name} ({type(part).__name__}) is the first that is not "
                f"finite; its input {'is' if whole else 'is not either'}. --debug shows where it is called."
            )

    return hook
