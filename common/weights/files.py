"""Files of weights, read safely: nothing in them is run, and what cannot be used is refused in one sentence."""

import json
import pickle
import re
import struct
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from common.errors import CheckpointError

_ZIP = b"PK\x03\x04"
#: How files of torch.save began before version 1.6: a pickled number.
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
#: What PyTorch's reader raises for a file that is cut off or overwritten.
_BROKEN = (RuntimeError, EOFError, OSError, KeyError, IndexError, ValueError, TypeError, AttributeError,
           AssertionError, struct.error)  # fmt: skip


def _plainly(error: BaseException) -> str:
    """Return the first line of an error without terminal colours, bounded."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines()
    return lines[0][:120] if lines else type(error).__name__


def _objects(path: Path) -> str:
    """Name what a file holds beside tensors and plain values, in brackets, if that can be told."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (*_BROKEN, pickle.UnpicklingError):
        return ""
    return f" ({', '.join(name[:50] for name in names[:2])})" if names else ""


def read_torch(path: Path) -> dict[str, Any]:
    """Read a file of ``torch.save`` on the CPU without unpickling anything but tensors and plain values.

    Raises:
        CheckpointError: it is missing, damaged, no such file, or holds objects that would have to be executed.
    """
    try:
        with path.open("rb") as file:
            start = file.read(len(_LEGACY))
        if not start.startswith(_ZIP) and start != _LEGACY:
            raise CheckpointError(f"{path} is no checkpoint: it does not begin as a file of torch.save does.")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=start.startswith(_ZIP))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} was not opened: it holds more than tensors and plain values{_objects(path)}, and such a file can "
            f"run any code. Get its weights alone: safetensors, or a state dict of tensors."
        ) from error
    except CheckpointError:
        raise
    except _BROKEN as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint; it is damaged or incomplete: "
                              f"{_plainly(error)}") from error  # fmt: skip
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, no state dict or checkpoint.")
    return content


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file on the CPU.

    Raises:
        CheckpointError: it is missing, damaged or no such file.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors; it is damaged or incomplete: "
                              f"{_plainly(error)}") from error  # fmt: skip


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: the file is missing, no JSON, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {_plainly(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__} where an object is needed.")
    return content
