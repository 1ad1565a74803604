"""Checkpoints on disk: whole or not at all, with a check sum, the one before kept, and never unpickled."""

import contextlib
import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from common.checkpoint import read_checkpoint
from common.errors import UserError
from common.weights.files import LAST, PREVIOUS, is_damaged, seal, trust


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def remove_temporaries(folder: Path) -> None:
    """Remove what a process that was killed inside a save has left; no other process may be writing there."""
    for path in folder.glob(".*.ckpt.*.tmp"):
        path.unlink(missing_ok=True)


def _keep_previous(path: Path) -> None:
    """Give a checkpoint that is about to be replaced a second name; there is one under its own at every moment."""
    if not path.is_file() or is_damaged(path):
        return  # a damaged one must not take the place of a whole one
    previous, link = path.with_name(PREVIOUS), _temporary(path.with_name(PREVIOUS))
    link.unlink(missing_ok=True)
    try:
        link.hardlink_to(path)
        link.replace(previous)
    except OSError:  # a file system without hard links
        path.replace(previous)


def atomic_save(content: Any, path: Path) -> None:
    """Save with torch and a check sum under a temporary name, flush it to the disk, and rename it.

    What is called ``last.ckpt`` becomes ``previous.ckpt`` before it is replaced.

    Raises:
        UserError: it cannot be written; what was there before is still there.
    """
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w+b") as file:
            torch.save(content, file)
            seal(file)
            file.flush()
            os.fsync(file.fileno())
        if path.name == LAST:
            _keep_previous(path)
        temporary.replace(path)
        trust(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:
        # torch reports a failed write as a RuntimeError.
        cause = error if isinstance(error, OSError) else error.__context__
        reason = getattr(cause, "strerror", None) or str(error).splitlines()[0][:80]
        raise UserError(f"The checkpoint {path} cannot be written ({reason}); what was saved before is intact. Make "
                        "room or mend the folder's permissions, and resume the run.") from error  # fmt: skip
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint plugin, with :func:`atomic_save` and ``weights_only=True``."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Save a checkpoint whole or not at all.

        Raises:
            UserError: it cannot be written.
        """
        atomic_save(checkpoint, Path(path))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        """Load a checkpoint on the CPU without unpickling objects.

        Raises:
            CheckpointError: missing, damaged, or holding more than tensors and plain values.
        """
        return read_checkpoint(path)
