"""A rank that dies takes the others down within seconds, with one sentence."""

import multiprocessing
import os
import secrets
import selectors
import socket
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from common.checkpoint_io import SAVING
from common.distributed import agree, broadcast_object, rank, world_size
from common.errors import PreemptedError
from common.weights.files import LAST

#: What a rank says before it closes its connection: that it has ended well, or with an error that it has printed; and
#: what the first one says when another has died.
_WELL, _FAILED, _DEAD = b"W", b"F", b"D"
#: Seconds to connect in, that a rank has to print its own error where another has one, that an error may turn out to be
#: another rank's death in, and that a checkpoint may take to be written to its end.
_CONNECT, _OWN_ERROR, _CAUSE, _SAVE = 20.0, 10.0, 5.0, 600.0


class RankWatch(pl.Callback):
    """Ends every rank of a run if one dies, instead of leaving them in a collective that never returns.

    Every rank holds a connection to the first. One that closes without a word is that of a process which is no more.
    A thread waits for that, prints one sentence, lets a checkpoint be written to its end, and ends the process.

    Args:
        folder: The run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._peers: dict[int, socket.socket] = {}
        self._launcher: Any = None

    def attach(self, strategy: Any) -> None:
        """Watch the ranks of a strategy from the moment on that they know each other."""
        connect = strategy.setup_environment

        def watched() -> None:
            connect()
            self._launcher = strategy.launcher
            self._start()

        strategy.setup_environment = watched

    def _start(self) -> None:
        """Connect the ranks; where their machines do not let them, nobody watches."""
        if world_size() == 1:
            return
        host, token = os.environ.get("MASTER_ADDR", "127.0.0.1"), secrets.token_bytes(16)
        listener = None
        if rank() == 0:
            with suppress(OSError):
                listener = socket.create_server((host, 0), backlog=world_size())
        port, token = broadcast_object((0 if listener is None else listener.getsockname()[1], token))
        connected = False
        with suppress(OSError):
            if listener is not None:
                self._accept(listener, token)
            elif port:
                peer = socket.create_connection((host, port), timeout=_CONNECT)
                peer.sendall(token + rank().to_bytes(4, "big"))
                self._peers[0] = peer
            connected = bool(self._peers)
        if agree(not connected):
            self._say(_WELL)
            return
        for peer in self._peers.values():
            _keep_alive(peer)
        threading.Thread(target=self._watch, name="rank watch", daemon=True).start()

    def _accept(self, listener: socket.socket, token: bytes) -> None:
        """Wait for the other ranks; whoever does not know the token is none.

        Raises:
            OSError: one does not come.
        """
        end = time.monotonic() + _CONNECT
        with listener:
            while len(self._peers) < world_size() - 1:
                listener.settimeout(max(end - time.monotonic(), 0.01))
                peer, _ = listener.accept()
                peer.settimeout(_CONNECT)
                hello = peer.recv(len(token) + 4, socket.MSG_WAITALL)
                if hello[:-4] == token:
                    self._peers[int.from_bytes(hello[-4:], "big")] = peer
                else:
                    peer.close()

    def _watch(self) -> None:
        """Wait for what the other ranks say, or no longer say."""
        with selectors.DefaultSelector() as selector:
            for number, peer in self._peers.items():
                selector.register(peer, selectors.EVENT_READ, number)
            while selector.get_map():
                for key, _ in selector.select():
                    word = b""
                    with suppress(OSError):
                        word = key.fileobj.recv(1)  # type: ignore[union-attr]
                    if word != _WELL:
                        self._end(key.data, word)
                    selector.unregister(key.fileobj)

    def _end(self, number: int, word: bytes) -> None:
        """End this process because a rank has died, or has failed and printed why."""
        if word == _FAILED:
            time.sleep(_OWN_ERROR)  # most errors are every rank's
        elif word == b"":
            self._say(_DEAD)
            if rank() == 0 or (number == 0 and rank() == 1):
                os.write(2, f"\nerror: {self._sentence(number)}\n".encode())
        SAVING.acquire(timeout=_SAVE)
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(1)

    def _sentence(self, number: int) -> str:
        processes = getattr(self._launcher, "procs", [])
        how = ""
        if 0 < number <= len(processes):
            with suppress(OSError, subprocess.TimeoutExpired):
                how = f" (signal {-processes[number - 1].wait(1)})"
        saved = any((self.folder / "checkpoints" / name).is_file() for name in (LAST, "previous.ckpt"))
        advice = f"Resume it with RESUME={self.folder}" if saved else "Nothing was saved yet: start it again"
        return f"Rank {number} has died{how}, killed from outside or for its memory, and the run stops. {advice}."

    def _say(self, word: bytes) -> None:
        """Say something to all other ranks."""
        for peer in self._peers.values():
            with suppress(OSError):
                peer.sendall(word)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take leave (Lightning hook)."""
        self._say(_WELL)
        self._peers = {}

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Take leave, unless the error is that another rank is gone (Lightning hook)."""
        if self._peers and isinstance(exception, RuntimeError):
            time.sleep(_CAUSE)
        self._say(_WELL if isinstance(exception, PreemptedError) else _FAILED)
        self._peers = {}


def _keep_alive(peer: socket.socket) -> None:
    """Notice within a minute that a whole machine is gone, which closes nothing."""
    peer.settimeout(None)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 6)):
        if hasattr(socket, name):  # Linux's names
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
