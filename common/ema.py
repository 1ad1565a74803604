"""A teacher whose weights are a moving average of a student's."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import CheckpointError


class EMATeacher(nn.Module):
    """An exponential moving average of a network: ``teacher <- decay teacher + (1 - decay) student`` (UMD Eq. 5).

    It starts as an exact copy, always stays in evaluation mode, and has no gradients. Its weights are
    float32 at least, and part of its parent's ``state_dict``, so a checkpoint holds it by name.

    Call :meth:`update` once per optimiser step, in a LightningModule's ``optimizer_step``: checkpoints are written by
    callbacks right after it.

    Args:
        student: The network.
        decay: Share of the old weights that is kept in a step, in [0, 1).

    Raises:
        ValueError: ``decay`` is outside [0, 1).
    """

    def __init__(self, student: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"The teacher's `decay` must lie in [0, 1), got {decay}.")
        super().__init__()
        self.decay = decay
        self.module = copy.deepcopy(student).requires_grad_(False).eval()
        for tensor in (*self.module.parameters(), *self.module.buffers()):
            if tensor.is_floating_point() and tensor.dtype in (torch.float16, torch.bfloat16):
                tensor.data = tensor.data.float()

    def train(self, mode: bool = True) -> "EMATeacher":
        """Stay in evaluation mode."""
        return super().train(False)

    def _pairs(self, student: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        theirs = dict(student.named_parameters())
        names = dict(self.module.named_parameters())
        if names.keys() != theirs.keys():
            raise ValueError("The student's parameters are not those of the teacher.")
        return list(names.values()), [theirs[name].detach() for name in names]

    def _copy_buffers(self, student: nn.Module) -> None:
        theirs = dict(student.named_buffers())
        for name, buffer in self.module.named_buffers():
            buffer.copy_(theirs[name])

    @torch.no_grad()
    def reset(self, student: nn.Module) -> None:
        """Copy the student again, for example after loading weights into it."""
        for mine, theirs in zip(*self._pairs(student), strict=True):
            mine.copy_(theirs)
        self._copy_buffers(student)

    @torch.no_grad()
    def update(self, student: nn.Module) -> None:
        """Move towards the student's weights by one step; buffers are copied."""
        mine, theirs = self._pairs(student)
        torch._foreach_lerp_(mine, [x.to(m.dtype) for x, m in zip(theirs, mine, strict=True)], 1 - self.decay)
        self._copy_buffers(student)

    @torch.no_grad()
    def distance(self, student: nn.Module) -> Tensor:
        """Return the L2 distance to the student over the student's norm."""
        mine, theirs = self._pairs(student)
        gap = torch.stack(torch._foreach_norm(torch._foreach_sub(mine, theirs))).norm()
        return gap / torch.stack(torch._foreach_norm(theirs)).norm().clamp(min=1e-30)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the averaged network."""
        return self.module(*args, **kwargs)


def need_teacher(state: Mapping[str, Tensor], prefix: str) -> None:
    """Check that a checkpoint contains a teacher.

    Args:
        state: The checkpoint's ``state_dict``.
        prefix: Prefix of the teacher's keys.

    Raises:
        CheckpointError: there is no such key.
    """
    if not any(key.startswith(prefix) for key in state):
        raise CheckpointError(
            "The checkpoint holds no teacher, so training cannot go on from it as if it had not stopped: begin a new "
            "run from its weights with --model.pretrained."
        )
