"""From an archive to a run, through the commands a person types: what is logged, missing sequences, ranks, resuming."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.cli import execute, main
from common.errors import PreemptedError
from datamodules.synthetic.brain import write_brain_archive
from experiments.brainmvp.module import BrainMVPPretrain

pytestmark = pytest.mark.slow


def weights(folder):
    return torch.load(Path(folder) / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


def rows(folder):
    return list(csv.DictReader((Path(folder) / "data_faults.csv").open()))


def test_what_a_run_leaves(brain_arguments):
    folder = execute(brain_arguments("--trainer.max_epochs=3"))
    scalars = json.loads((folder / "summary.json").read_text())["scalars"]
    terms = {"cross_modal", "template", "contrastive"}
    assert {f"val/loss_{term}" for term in terms} | {"val/loss"} <= scalars.keys()
    assert {f"train/loss_{term}" for term in terms} <= scalars.keys()
    wanted = {"collapse/floor_ratio", "collapse/floor_ratio_control", "collapse/effective_rank"}
    wanted |= {"collapse/floor_ratio_identity"}
    wanted |= {"collapse/prediction_diversity", "probe/view_retrieval", "templates/range_t1"}
    assert wanted <= scalars.keys()
    assert rows(folder) == []
    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    assert {"templates/t1", "collapse/spectrum"} <= set(events.Tags()["images"])
    assert any(tag.startswith("reconstruction/") for tag in events.Tags()["images"])


def at_step(monkeypatch, step, action):
    """Do something in the middle of one training step."""
    training_step = BrainMVPPretrain.training_step
    done = []

    def wrapped(self, batch, batch_idx):
        if self.trainer.fit_loop.total_batch_idx == step and not done:
            done.append(step)
            action()
        return training_step(self, batch, batch_idx)

    monkeypatch.setattr(BrainMVPPretrain, "training_step", wrapped)


@pytest.mark.parametrize(
    ("more", "step"),
    [([], 2), ([], 3), (["--data.num_workers=2"], 2), (["--trainer.accumulate_grad_batches=2"], 2)],
    ids=["inside an epoch", "last step of an epoch", "two workers", "accumulation"],
)
def test_resumed_equals_uninterrupted(brain_arguments, monkeypatch, more, step):
    """Templates, their moments and the phases of the schedule included."""
    arguments = brain_arguments("--trainer.max_epochs=3", "--model.template_warmup=0.3", *more)
    whole = weights(execute(arguments))
    with monkeypatch.context() as patch:
        at_step(patch, step, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(PreemptedError):
            execute(arguments)
    folder = max(Path("runs/brainmvp/pretrain").iterdir(), key=lambda path: path.stat().st_mtime)
    execute([*arguments, "--ckpt_path", str(folder)])
    resumed = weights(folder)
    assert whole["network.templates.weight"].any()
    assert max(float((whole[key].double() - resumed[key].double()).abs().max()) for key in whole) == 0.0


@pytest.mark.ddp
def test_two_ranks_equal_one(brain_arguments):
    """Negatives of all ranks, batch norm over all ranks, templates from all crops; studies without a partner."""
    shared = ["--trainer.max_epochs=1", "--trainer.precision=64-true", "--model.contrastive_start=0",
              "--data.loader.draws=3", "--trainer.limit_train_batches=5", "--model.optimization.optimizer.lr=0.01",
              "--model.optimization.optimizer.fused=false"]  # fmt: skip
    alone = execute(brain_arguments(*shared, "--data.batch_size=4"))
    command = [sys.executable, "-m", "common.cli", *brain_arguments(*shared, "--data.batch_size=2"),
               "--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    together = next(line.split(": ", 1)[1] for line in done.stdout.splitlines() if line.startswith("run folder"))
    first, second = weights(alone), weights(together)
    assert first["network.templates.weight"].any()
    for key, value in first.items():
        assert torch.allclose(value.double(), second[key].double(), rtol=1e-6, atol=1e-6), key


def test_half_of_the_studies_miss_two_sequences(brain_arguments, tmp_path):
    write_brain_archive(tmp_path / "archive", 9, seed=1, shape=(40, 44, 36), half_incomplete=True)
    counts = Counter(len(list(folder.glob("*.nii.gz"))) for folder in (tmp_path / "archive").glob("*/*"))
    assert len(counts) >= 4
    folder = execute(brain_arguments("--trainer.max_epochs=2", root=tmp_path / "archive"))
    assert rows(folder) == []
    assert json.loads((folder / "summary.json").read_text())["status"] == "finished"


def test_files_that_vanish_during_the_run(brain_arguments, brain_root, tmp_path, monkeypatch):
    root = shutil.copytree(brain_root, tmp_path / "archive")
    lost = [*sorted(root.glob("ucsf_pdgm/*/*_T2.nii.gz"))[:2], sorted(root.glob("ixi/*-T2.nii.gz"))[1]]
    at_step(monkeypatch, 1, lambda: [path.unlink() for path in lost])
    arguments = brain_arguments("--data.cache.format=none", "--trainer.max_epochs=3", "--data.loader.draws=2",
                                "--data.split.fractions=[0.8,0.2,0.0]", root=root)  # fmt: skip
    folder = execute(arguments)
    assert sorted(row["path"] for row in rows(folder)) == sorted(map(str, lost))
    assert {row["kind"] for row in rows(folder)} == {"missing"}
    assert json.loads((folder / "summary.json").read_text())["status"] == "finished"


def test_presets_and_the_second_backbone(brain_arguments):
    upstream = ["--config", "experiments/brainmvp/configs/upstream.yaml", "--trainer.max_steps=1"]
    arguments = brain_arguments()
    folder = execute([*arguments[:3], *upstream, *arguments[3:]])
    config = (folder / "config.yaml").read_text()
    assert "template_weight: 10" in config
    unet = ["--model.encoder=common.blocks.residual_unet.ResidualUNetEncoder", "--model.encoder.width=8",
            "--model.decoder=common.blocks.residual_unet.ResidualUNetDecoder", "--trainer.max_steps=1"]  # fmt: skip
    plain = [argument for argument in arguments if not argument.startswith("--model.encoder")]
    folder = execute([*plain, *unet])
    assert "network.encoder.levels.0.0.gn1.weight" in weights(folder)


def test_float16_is_refused(brain_arguments, capsys):
    with pytest.raises(SystemExit):
        main(brain_arguments("--trainer.precision=16-mixed"))
    assert "float16" in capsys.readouterr().err
