"""A rank that dies takes the others with it: at once, with one sentence, and without harm to what was saved."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from common.checkpoint import read_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.ddp]

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
LAUNCHERS = {"lightning": ["-m", "common.cli"], "torchrun": [*TORCHRUN, "-m", "common.cli"]}


def content(pid, name):
    with suppress(OSError):
        return Path(f"/proc/{pid}/{name}").read_bytes().split(b"\0")
    return []


def marked(mark):
    """Return the processes that have inherited a mark; torchrun gives every rank a session of its own (Linux)."""
    pids = [int(folder.name) for folder in Path("/proc").glob("[0-9]*")]
    return [pid for pid in pids if mark.encode() in content(pid, "environ")]


def ranks(mark):
    """Return the processes of the two ranks, by their number."""
    found = {}
    for pid in marked(mark):
        words, facts = content(pid, "cmdline"), dict(part.partition(b"=")[::2] for part in content(pid, "environ"))
        if b"common.cli" in words and b"torch.distributed.run" not in words:
            found[int(facts.get(b"LOCAL_RANK", 0))] = pid
    return found


def end(process, mark):
    """Kill whatever is left, also what is being started meanwhile."""
    while process.poll() is None or marked(mark):
        for pid in {*marked(mark), *([process.pid] if process.poll() is None else [])}:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def wait_for(truth, seconds):
    deadline = time.monotonic() + seconds
    while not truth():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(("launcher", "victim"), [("lightning", 1), ("lightning", 0), ("torchrun", 1)])
def test_a_rank_that_is_killed_takes_the_other_along(pretrain_arguments, tmp_path, launcher, victim):
    arguments = pretrain_arguments("--data.batch_size=1", "--data.loader.draws=8", "--trainer.max_epochs=60",
                                   "--trainer.accelerator=cpu", "--trainer.check_val_every_n_epoch=60",
                                   "--trainer.num_sanity_val_steps=0", "--trainer.devices=2", "--trainer.strategy=ddp",
                                   "--checkpoint.every_n_steps=4", "--checkpoint.at_epoch_end=auto")  # fmt: skip
    output, mark = tmp_path / "output.txt", f"MEDMIM_TEST={tmp_path}"
    with output.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *LAUNCHERS[launcher], *arguments],
            stdout=file,
            stderr=file,
            env={**os.environ, "OMP_NUM_THREADS": "1", **dict([mark.split("=", 1)])},
        )
    try:
        saved = []
        wait_for(lambda: saved.extend(Path("runs").glob("e_mim/pretrain/*/checkpoints/last.ckpt"))
                 or saved or process.poll() is not None, 200)  # fmt: skip
        assert process.poll() is None, output.read_text()[-3000:]
        pids = ranks(mark)
        assert sorted(pids) == [0, 1]
        os.kill(pids[victim], signal.SIGKILL)
        wait_for(lambda: not content(pids[1 - victim], "cmdline")[1:], 10)  # a zombie has no command line
        assert process.wait(timeout=40) != 0
    finally:
        end(process, mark)
    text = output.read_text()
    assert text.count(f"Rank {victim} has died") == 1
    assert f"the run stops. Resume it with RESUME={saved[0].parent.parent}." in text
    if launcher == "lightning":  # torchrun's own agent reports with tracebacks of its own
        assert "Traceback" not in text
        assert victim == 0 or "Rank 1 has died (signal 9)" in text
    assert read_checkpoint(saved[0])["global_step"] % 4 == 0
