"""Files of weights, read safely: nothing in them is executed, and an unusable file is refused in one sentence.

Checkpoints of this project end in a *seal*, the xxh3 of all bytes before it. It is the comment of the zip archive that
``torch.save`` writes, so the file stays one that ``torch.load`` reads, and keeps its seal when it is copied or renamed.
"""

import hashlib
import json
import os
import pickle
import re
import struct
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from common.errors import CheckpointError

#: The checkpoint to resume from, and the one before it.
LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
_BESIDE = (LAST, PREVIOUS, "best.ckpt")

_ZIP = b"PK\x03\x04"
#: How files of torch.save began before version 1.6: with a pickled number.
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
#: What PyTorch's reader raises for a file that is cut off or overwritten.
_BROKEN = (RuntimeError, EOFError, OSError, KeyError, IndexError, ValueError, TypeError, AttributeError,
           AssertionError, struct.error)  # fmt: skip


_SEAL = b"medmim xxh3 "
_SEAL_LENGTH = len(_SEAL) + 32
#: How the last record of a zip archive begins, how long it is, and that it ends in the length of the comment.
_END, _END_LENGTH = b"PK\x05\x06", 22
_COMMENT_LENGTH = struct.pack("<H", _SEAL_LENGTH)
_CHUNK = 2**23


def _digest(file: BinaryIO, length: int) -> bytes:
    """Return the xxh3 of the first bytes of a file, 32 hexadecimal digits."""
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(min(length, _CHUNK)))
    file.seek(0)
    while length > 0 and (count := file.readinto(buffer[: min(length, _CHUNK)])):  # type: ignore[attr-defined]
        digest.update(buffer[:count])
        length -= count
    return digest.hexdigest().encode()


def seal(file: BinaryIO) -> None:
    """Append the check sum to a file that ``torch.save`` has just written; it is open for writing and reading.

    Raises:
        RuntimeError: it is not a zip archive without a comment.
    """
    file.seek(-_END_LENGTH, os.SEEK_END)
    if not file.read().startswith(_END):
        raise RuntimeError("torch.save did not end the file as it used to, so no check sum can be added")
    file.seek(-len(_COMMENT_LENGTH), os.SEEK_END)
    file.write(_COMMENT_LENGTH)
    file.flush()
    digest = _digest(file, file.tell())
    file.seek(0, os.SEEK_END)
    file.write(_SEAL + digest)


def _fits_its_seal(path: Path, size: int) -> bool:
    """Compare a file with its seal; True if it has none. A change of any byte, of the seal included, is noticed."""
    with path.open("rb") as file:
        file.seek(-min(_SEAL_LENGTH + _END_LENGTH, size), os.SEEK_END)
        tail = file.read()
    end = tail.rfind(_END)
    announced = end >= 0 and tail[end : end + _END_LENGTH].endswith(_COMMENT_LENGTH)
    if not announced and not tail[-_SEAL_LENGTH:].startswith(_SEAL):
        return True
    with path.open("rb") as file:
        return tail.endswith(_SEAL + _digest(file, size - _SEAL_LENGTH))


_whole: dict[Path, tuple[int, int, int]] = {}


def _version(path: Path) -> tuple[int, int, int]:
    facts = path.stat()
    return facts.st_size, facts.st_mtime_ns, facts.st_ino


def trust(path: Path) -> None:
    """Mark a checkpoint as intact because this process has just written it."""
    _whole[path.absolute()] = _version(path)


def is_damaged(path: Path) -> bool:
    """Return whether a checkpoint differs from its check sum; False if it has none. A whole one is read only once.

    Raises:
        OSError: it cannot be read.
    """
    if _whole.get(path.absolute()) == _version(path):
        return False
    fits = _fits_its_seal(path, path.stat().st_size)
    if fits:
        trust(path)
    return not fits


def _refusal(path: Path, why: str) -> CheckpointError:
    """Report that a file is damaged, and which of the checkpoints beside it is whole."""
    for other in (path.with_name(name) for name in _BESIDE if name != path.name and path.name in _BESIDE):
        try:
            if other.is_file() and not is_damaged(other):
                step = torch.load(other, map_location="cpu", weights_only=True, mmap=True)["global_step"]
                return CheckpointError(f"{path} is damaged ({why}). {other} is whole, of step {step}: give that file "
                                       f"instead, as RESUME= or CKPT=.")  # fmt: skip
        except (*_BROKEN, pickle.UnpicklingError):
            continue
    return CheckpointError(f"{path} is damaged or incomplete ({why}): take a copy of it, or another checkpoint.")


def _plainly(error: BaseException) -> str:
    """Return the first line of an error without terminal colours, bounded."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines()
    return lines[0][:120] if lines else type(error).__name__


def _objects(path: Path) -> str:
    """Return, in brackets, what a file holds beside tensors and plain values, if that can be determined."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (*_BROKEN, pickle.UnpicklingError):
        return ""
    return f" ({', '.join(name[:50] for name in names[:2])})" if names else ""


def read_torch(path: Path) -> dict[str, Any]:
    """Read a file of ``torch.save`` on the CPU without unpickling anything but tensors and plain values.

    Raises:
        CheckpointError: it is missing, damaged, of another format, or holds objects that would have to be executed.
    """
    try:
        if is_damaged(path):
            raise _refusal(path, "its content does not match its check sum")
        with path.open("rb") as file:
            start = file.read(len(_LEGACY))
        if not start.startswith(_ZIP) and start != _LEGACY:
            raise CheckpointError(f"{path} is not a checkpoint: it does not begin as a file of torch.save does.")
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
        raise _refusal(path, _plainly(error)) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, no state dict or checkpoint.")
    return content


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file on the CPU.

    Raises:
        CheckpointError: it is missing, damaged or of another format.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors; it is damaged or incomplete: "
                              f"{_plainly(error)}") from error  # fmt: skip


def check_export(folder: Path, facts: Any) -> None:
    """Compare the weights of an export with the check sum in its ``config.json``.

    Raises:
        CheckpointError: they differ, or there are none.
    """
    weights = folder / "model.safetensors"
    try:
        with weights.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{folder} has a config.json but no model.safetensors that can be read: export the "
                              f"encoder again.") from error  # fmt: skip
    if facts.get("sha256", found) != found:
        raise CheckpointError(f"{weights} is damaged or was changed: its sha256 is not the one in config.json. Export "
                              f"the encoder again, or copy it again.")  # fmt: skip


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: the file is missing, not JSON, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {_plainly(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__} where an object is needed.")
    return content
