"""Checkpoints on disk: written completely or not at all, with a check sum, the previous one kept, never unpickled."""

import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from common.checkpoint import read_checkpoint
from common.errors import StorageError
from common.files import remove_file, whole_file
from common.names import printable
from common.weights.files import LAST, PREVIOUS, is_damaged, seal, trust


def _keep_previous(path: Path) -> None:
    """Give a checkpoint that is about to be replaced a second name, so that one exists under its own at all times."""
    if not path.is_file() or is_damaged(path):
        return  # a damaged one must not replace a complete one
    with whole_file(path.with_name(PREVIOUS)) as second:
        try:
            second.hardlink_to(path)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, second)


def atomic_save(content: Any, path: Path) -> None:
    """Save with torch and a check sum under a temporary name, flush it to the disk, and rename it.

    ``last.ckpt`` becomes ``previous.ckpt`` before it is replaced.

    Raises:
        StorageError: it cannot be written; the existing file is kept.
    """
    with whole_file(path, durable=True) as temporary:
        with temporary.open("w+b") as file:
            torch.save(content, file)
            seal(file)
        if path.name == LAST:
            _keep_previous(path)
    trust(path)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint plugin, with :func:`atomic_save` and ``weights_only=True``."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Save a checkpoint completely or not at all.

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

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint that a better one has replaced: a file, never a folder.

        Lightning takes the name from the resumed checkpoint, which may contain anything.

        Raises:
            StorageError: it is not a checkpoint of the run.
        """
        path = Path(path)
        if path.suffix != ".ckpt" or ".." in path.parts:
            raise StorageError(f"{printable(path)} is not a checkpoint of this run, so it was not removed.")
        remove_file(path, path.parent)
