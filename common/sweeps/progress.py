"""What a study has done already, so that one that was stopped goes on where it was."""

import fcntl
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import xxhash

from common.files import make_folder, write_text
from common.runtime.provenance import source_digest
from common.runtime.reporting import print_line


class Progress:
    """The finished commands of a study and their run folders, kept in a file.

    A command counts as the same where its words, the commit and the uncommitted changes are. A training that was
    stopped goes on from its last checkpoint, because the folder of a command's run is named after the command.

    Args:
        folder: The study's folder under ``runs``.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / "steps.json"
        self._done: dict[str, str] = {}
        self._code = source_digest()

    def run(self, arguments: Sequence[str], execute: Callable[[list[str], str], Path]) -> Path:
        """Return the run folder of a command, which is run unless it is done.

        Args:
            arguments: Its words.
            execute: Runs a command, given its words and the name for its run, and returns its run folder.
        """
        key = xxhash.xxh3_64_hexdigest("\0".join([self._code, *arguments]).encode())
        make_folder(self._file.parent)
        # Jobs of other arms may need the same command: one runs it, the others wait and take its run.
        with (self._file.parent / f"{key}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return self._run_once(key, arguments, execute)

    def _read(self) -> dict[str, str]:
        return json.loads(self._file.read_text()) if self._file.is_file() else {}

    def _run_once(self, key: str, arguments: Sequence[str], execute: Callable[[list[str], str], Path]) -> Path:
        self._done |= self._read()
        folder = Path(self._done.get(key, ""))
        if key in self._done and folder.is_dir():
            print_line(f"done before: {folder}")
            return folder
        stamp = f"study_{key}"
        words = list(arguments)
        if arguments[0] == "fit":
            # Only stopped runs of this very command have its name: one that runs holds the lock.
            stopped = sorted(Path("runs").glob(f"*/*/{stamp}*/checkpoints/last.ckpt"), key=os.path.getmtime)
            words += [f"--ckpt_path={path.parent.parent}" for path in stopped[-1:]]
        folder = execute(words, stamp)
        self._done |= self._read() | {key: str(folder)}
        write_text(self._file, json.dumps(self._done, indent=1) + "\n")
        return folder
