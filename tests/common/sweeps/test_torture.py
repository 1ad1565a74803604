"""A kill of one experiment, so that CI knows when resuming breaks; `make torture` does hundreds of all."""

import random
import subprocess
import sys

import pytest
import torch

from common.checkpoint_io import atomic_save
from common.files import temporary_beside
from common.sweeps.torture import KINDS, Tally, _blow, table
from common.sweeps.torture_checks import judge


def test_what_happens_is_drawn_by_the_seed():
    for kind in KINDS:
        first, again, other = (_blow(kind, random.Random(seed), 2, 10.0) for seed in ("a", "a", "b"))
        assert first == again != other
        assert 0 < first.seconds < 10


def test_the_table_has_a_sum():
    tallies = {("a", "in a save"): Tally(3, 2, 3), ("b", "in a save"): Tally(2, 1, 0, ["x"])}
    assert table(tallies).splitlines()[-2:] == ["| b | in a save | 2 | 1 | 0 | 1 |", "| all |  | 5 | 3 | 3 | 1 |"]


def left_by(folder, weight=1.0, rows=("0,1.5", "1,1.2")):
    (folder / "checkpoints").mkdir(parents=True)
    content = {"state_dict": {"w": torch.tensor([weight])}, "optimizer_states": [{"state": {0: {"step": 2}}}]}
    atomic_save(content, folder / "checkpoints/last.ckpt")
    (folder / "metrics.csv").write_text("\n".join(("step,train/loss", *rows)) + "\n")
    return folder


def test_every_kind_of_harm_is_seen(tmp_path):
    whole, cache = left_by(tmp_path / "whole"), tmp_path / "cache"
    cache.mkdir()
    runs = tmp_path / "runs"
    assert judge(left_by(runs / "good"), whole, cache) == []
    other = judge(left_by(runs / "other", weight=1.0000001), whole, cache)
    assert other == ["1 of 2 values differ, such as .0.w"]
    assert judge(left_by(runs / "twice", rows=("0,1.5", "0,1.5")), whole, cache) == [
        "metrics.csv holds train/loss of step 0 twice"
    ]
    assert judge(left_by(runs / "value", rows=("0,1.5", "1,1.3")), whole, cache) == [
        "train/loss of step 1 has another value"
    ]
    temporary_beside(cache / "entry.npy").touch()
    assert judge(runs / "good", whole, cache)[0].endswith("is left")


@pytest.mark.slow
def test_a_kill_of_one_experiment(tmp_path):
    """Of the one whose data are made fastest, on one rank; test_rank_watch.py kills one of two."""
    command = [sys.executable, "-m", "common.commands", "torture", "--exp", "mrm_genetics", "--kills", "1", "--seed"]
    done = subprocess.run([*command, "1", "--out", str(tmp_path / "out")], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "| all |  | 1 | " in done.stdout
