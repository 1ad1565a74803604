"""Pseudonyms for people: a keyed hash, whose key stays with the user and is never stored in a run.

Ids are short and their forms are known, so anyone who sees a plain hash of one can find it by trying all; without the
key that is impossible. The key is created once, in the user's configuration folder, and read from there by all runs, so
that a person has the same pseudonym in all of them. Without it nobody can trace a pseudonym back to a name.
"""

import hashlib
import os
import secrets
from functools import lru_cache
from pathlib import Path

from common.errors import StorageError
from common.files import make_folder, remove_file, storage_errors, temporary_beside
from common.names import printable

_KEY_BYTES = 32
#: Tell child processes whether names are hidden, and with which key where that is not their own machine's.
_SWITCH, _SHARED_KEY = "MEDMIM_ANONYMISE", "MEDMIM_ANONYMISE_KEY"


def hide_names(hidden: bool) -> None:
    """Set whether names are hidden in everything that this process and its children print and write from now on."""
    if hidden:
        os.environ[_SWITCH] = "1"
    else:
        os.environ.pop(_SWITCH, None)


def names_are_hidden() -> bool:
    """Whether names are hidden; see :func:`hide_names`."""
    return os.environ.get(_SWITCH) == "1"


def pseudonym(name: str) -> str:
    """Return the pseudonym of a person's, a study's or a file's name: the same for the same name and key.

    Raises:
        StorageError: the key can be neither read nor made.
    """
    text = name.encode("utf-8", "surrogatepass")
    return f"subject-{hashlib.blake2b(text, key=_key(), digest_size=8, person=b'medmim').hexdigest()}"


#: Most letters of a name quoted in a message.
_SHOWN = 100


def public_name(name: object) -> str:
    """Return a name from an archive for a message: shortened, on one line, or its pseudonym if names are hidden."""
    if names_are_hidden():
        return pseudonym(str(name))
    shown = printable(name)
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."


def key_file() -> Path:
    """Return the path of the key: ``medmim/anonymise.key`` in ``XDG_CONFIG_HOME``, else in ``~/.config``."""
    folder = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(folder).expanduser() / "medmim" / "anonymise.key"


def share_key() -> None:
    """Send the first rank's key to all ranks, since machines may have separate home folders."""
    from common.distributed import gather_objects, world_size  # torch: whoever prints a line imports this module

    if world_size() > 1:
        os.environ[_SHARED_KEY] = gather_objects(_key().hex())[0]


def _key() -> bytes:
    shared = os.environ.get(_SHARED_KEY)
    return bytes.fromhex(shared) if shared else _stored_key(key_file())


@lru_cache(maxsize=4)
def _stored_key(path: Path) -> bytes:
    """Read the key, or create it if missing; of several processes only one creates it.

    Raises:
        StorageError: it cannot be read or made, is damaged, or others may read it.
    """
    if not path.exists():
        _make_key(path)
    with storage_errors(path, "read"):
        if path.stat().st_mode & 0o077:
            raise StorageError(f"Others may read {path}, the key of all pseudonyms: take that from them with "
                               f"`chmod 600`, or delete it for a new key and new pseudonyms.")  # fmt: skip
        text = path.read_text(encoding="ascii", errors="replace").strip()
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != _KEY_BYTES:
        raise StorageError(f"{path} is damaged: the key of all pseudonyms is {_KEY_BYTES} bytes in hexadecimal. "
                           f"Restore it, or delete it for a new key and new pseudonyms.")  # fmt: skip
    return key


def _make_key(path: Path) -> None:
    """Write a new key under a temporary name and link it into place, which fails if another process was faster.

    Raises:
        StorageError: the folder cannot be written.
    """
    make_folder(path.parent)
    temporary = temporary_beside(path)
    with storage_errors(path):
        try:
            handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "w", encoding="ascii") as file:
                file.write(secrets.token_hex(_KEY_BYTES) + "\n")
            os.link(temporary, path)
        except FileExistsError:
            return
        finally:
            remove_file(temporary, path.parent)
