"""A rank that dies takes the others with it: at once, with one sentence, and without harm to what was saved."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.checkpoint import read_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.ddp]

LAUNCHERS = {
    "lightning": [sys.executable, "-m", "common.cli"],
    "torchrun": [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "-m",
        "common.cli",
    ],
}


def ranks_of(process):
    """Return the processes of the two ranks by their environment (Linux)."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            facts = dict(part.partition("=")[::2] for part in (folder / "environ").read_text().split("\0"))
            words = (folder / "cmdline").read_text().split("\0")
            session = int((folder / "stat").read_text().rpartition(")")[2].split()[3])
        except (OSError, UnicodeDecodeError):
            continue
        if session == process.pid and "common.cli" in words and "torch.distributed.run" not in words:
            found[int(facts.get("LOCAL_RANK", 0))] = int(folder.name)
    return found


@pytest.mark.parametrize(("launcher", "victim"), [("lightning", 1), ("lightning", 0), ("torchrun", 1)])
def test_a_rank_that_is_killed_takes_the_other_along(pretrain_arguments, tmp_path, launcher, victim):
    arguments = pretrain_arguments("--data.batch_size=1", "--trainer.max_epochs=5000", "--trainer.accelerator=cpu",
                                   "--trainer.check_val_every_n_epoch=2000", "--trainer.num_sanity_val_steps=0",
                                   "--trainer.devices=2", "--trainer.strategy=ddp", "--checkpoint.every_n_steps=4",
                                   "--checkpoint.at_epoch_end=auto")  # fmt: skip
    output = tmp_path / "output.txt"
    with output.open("w") as file:
        process = subprocess.Popen([*LAUNCHERS[launcher], *arguments], stdout=file, stderr=file, start_new_session=True,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    try:
        deadline = time.monotonic() + 200
        while not (saved := list(Path("runs").glob("e_mim/pretrain/*/checkpoints/last.ckpt"))):
            assert process.poll() is None, output.read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.2)
        pids = ranks_of(process)
        assert sorted(pids) == [0, 1]
        os.kill(pids[victim], signal.SIGKILL)
        deadline = time.monotonic() + 10
        while (Path(f"/proc/{pids[1 - victim]}/stat")).exists() and time.monotonic() < deadline:
            state = Path(f"/proc/{pids[1 - victim]}/stat").read_text().rpartition(")")[2].split()[0]
            if state == "Z":
                break
            time.sleep(0.05)
        assert time.monotonic() < deadline
        assert process.wait(timeout=40) != 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    text = output.read_text()
    assert text.count(f"Rank {victim} has died") == 1
    assert f"the run stops. Resume it with RESUME={saved[0].parent.parent}." in text
    if launcher == "lightning":  # torchrun's own agent reports with tracebacks of its own
        assert "Traceback" not in text
        assert victim == 0 or "Rank 1 has died (signal 9)" in text
    assert read_checkpoint(saved[0])["global_step"] % 4 == 0
