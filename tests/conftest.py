"""Fixtures: tiny official trees, a pool of two ranks, real samples where there are any."""

import os
import resource
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from common.cli import main
from common.distributed import RankPool
from datamodules.registry import open_archive
from datamodules.synthetic.brain import write_brain_archive
from datamodules.synthetic.command import write_brats, write_lung, write_pi_cai
from datamodules.volumes.cases import case_of
from datamodules.volumes.profiles import prepared


def pytest_configure():
    """Share the cores among the workers of pytest-xdist instead of giving each of them all."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))
        os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())


@pytest.fixture(autouse=True)
def _isolated(tmp_path, monkeypatch):
    """Give every test its own working directory, cache and seeds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEDMIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for name in ("PL_GLOBAL_SEED", "MEDMIM_RUN_TIME", "MEDMIM_ANONYMISE", "MEDMIM_ANONYMISE_KEY"):
        monkeypatch.delenv(name, raising=False)
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002


@pytest.fixture(scope="session")
def brats_root(tmp_path_factory) -> Path:
    """Eight tiny BraTS 2023 cases of seven patients; the third lacks FLAIR."""
    root = tmp_path_factory.mktemp("brats")
    write_brats(root, 8, seed=0, shape=(40, 44, 36))
    return root


@pytest.fixture(scope="session")
def pi_cai_root(tmp_path_factory) -> Path:
    """Eight small prostate studies of seven patients; the seventh has no zonal mask."""
    root = tmp_path_factory.mktemp("pi_cai")
    write_pi_cai(root, 8, seed=0, shape=(96, 96, 8))
    return root


@pytest.fixture(scope="session")
def lung_root(tmp_path_factory) -> Path:
    """Eight small chests."""
    root = tmp_path_factory.mktemp("lung")
    write_lung(root, 8, seed=0, shape=(32, 32, 16))
    return root


@pytest.fixture(scope="session")
def brain_root(tmp_path_factory) -> Path:
    """Twelve tiny studies of three sources with different sets of sequences; one has a single sequence."""
    root = tmp_path_factory.mktemp("brain")
    write_brain_archive(root, 12, seed=0, shape=(40, 44, 36))
    return root


@pytest.fixture
def volumes_of():
    """Return a function that recognises an archive of volumes: its layout, prepared as suits it, and its cases."""

    def read(root: Path, layout: str = "auto"):
        archive = open_archive(root, layout, {"volumes"})
        return prepared(archive), [case_of(record) for record in archive.records]

    return read


@pytest.fixture(scope="session")
def rank_pool():
    """Two ranks joined by gloo, started once."""
    pool = RankPool(2)
    yield pool
    pool.close()


@pytest.fixture
def real_data():
    """Return the path of a real sample set; without one skip, or fail where MEDMIM_REQUIRE_DATA is 1."""

    def path_of(name: str) -> Path:
        root = os.environ.get("MEDMIM_DATA")
        path = Path(root) / name if root else None
        if path is None or not path.exists():
            reason = f"MEDMIM_DATA does not point to a folder that holds {name}"
            if os.environ.get("MEDMIM_REQUIRE_DATA") == "1":
                pytest.fail(reason)
            pytest.skip(reason)
        return path

    return path_of


@pytest.fixture
def refusal(capsys):
    """Return a function that runs a command, expects exit code 1, and returns the one sentence it printed."""

    def sentence(arguments: list[str]) -> str:
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 1
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        return line

    return sentence


@pytest.fixture
def small_disk():
    """Return a context in which no file can grow beyond some bytes, as on a disk that is full."""

    @contextmanager
    def limited(size: int):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


TINY = {
    "encoder": ["--model.encoder.embed_dim=32", "--model.encoder.depth=2", "--model.encoder.num_heads=2"],
    "taps": ["--model.taps=[1,2]"],
    "data": ["--data.crops.size=[32,32,32]", "--data.batch_size=2", "--data.loader.draws=2", "--data.num_workers=0",
             "--data.loader.val_draws=2"],
    "trainer": ["--trainer.max_epochs=2", "--trainer.check_val_every_n_epoch=1", "--trainer.enable_progress_bar=false",
                "--trainer.precision=32-true", "--trainer.log_every_n_steps=1",
                "--checkpoint.at_epoch_end=always"],
}  # fmt: skip


@pytest.fixture
def pretrain_arguments(brats_root):
    """Return the command line of a pre-training that takes about a second, with further arguments appended."""

    def arguments(*more: str, root: Path = brats_root, command: str = "fit") -> list[str]:
        config = ["--config", "experiments/e_mim/configs/pretrain.yaml"]
        tiny = [*TINY["encoder"], *TINY["taps"], *TINY["data"], *TINY["trainer"]]
        return [command, *config, f"--data.root={root}", *tiny, *more]

    return arguments


BRAIN = ["--model.encoder.embed_dims=[8,8,16,16]", "--model.encoder.depths=[1,1,1,1]", "--model.encoder.head_dim=8",
         "--model.encoder.recompute_stages=0", "--data.atlas=[40,44,36]", "--data.crops.size=[16,16,16]",
         "--data.batch_size=2", "--data.loader.draws=1", "--data.loader.val_draws=2", "--data.num_workers=0",
         "--data.split.fractions=[0.7,0.3,0.0]"]  # fmt: skip


@pytest.fixture
def brain_arguments(brain_root):
    """Return the command line of a BrainMVP pre-training of a few seconds, with further arguments appended."""

    def arguments(*more: str, root: Path = brain_root, command: str = "fit") -> list[str]:
        config = ["--config", "experiments/brainmvp/configs/pretrain.yaml"]
        return [command, *config, f"--data.root={root}", *BRAIN, *TINY["trainer"], *more]

    return arguments
