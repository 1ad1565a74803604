"""From an encoder to every downstream task, on trees in the official layouts."""

import json
import os
import signal

import pytest
import torch

from common.cli import execute
from common.downstream.classification import ImageClassifier
from common.errors import PreemptedError
from datamodules.labelled.classification import FoldConfig, LabelledImageDataModule
from datamodules.labelled.covid import CovidFindings
from datamodules.reports.covid_cxr import COVID_CXR
from datamodules.synthetic.command import WRITERS
from datamodules.tree import Tree

CONFIGS = "experiments/mrm_record/configs"
TREES = {"chexpert": "chexpert", "nih": "nih_cxr", "rsna": "rsna", "covid": "covid_cxr", "viral": "covid_cxr",
         "siim_seg": "siim"}  # fmt: skip


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trees")
    for name in set(TREES.values()):
        WRITERS[name](folder / name, 16, 0)
    return folder


def line(run, task, root, *more):
    configs = [f"{CONFIGS}/finetune_{task}.yaml", f"{CONFIGS}/finetune_{task}.smoke.yaml"]
    named = [word for config in configs for word in ("--config", config)]
    short = ["--trainer.enable_progress_bar=false", "--trainer.precision=32-true", "--trainer.log_every_n_steps=1"]
    return [run, *named, f"--data.root={root}", *short, *more]


SHORT = ("--trainer.max_steps=4", "--trainer.val_check_interval=2")


@pytest.mark.slow
@pytest.mark.parametrize("task", list(TREES))
def test_every_task_trains_and_is_scored(trees, task):
    root = trees / TREES[task]
    run = execute(line("fit", task, root, *SHORT))
    scalars = json.loads((run / "summary.json").read_text())["scalars"]
    assert {"train/loss", "val/loss", "lr", "throughput/samples_per_second"} <= scalars.keys()
    tested = execute(line("test", task, root, f"--ckpt_path={run}"))
    assert json.loads((tested / "metrics.json").read_text())["n"] > 0
    assert (tested / "per_case.csv").is_file()


@pytest.mark.slow
def test_a_pre_trained_encoder_is_carried_over(trees, tmp_path_factory):
    archive = tmp_path_factory.mktemp("mimic")
    WRITERS["mimic_cxr"](archive, 12, 0)
    tiny = ["--data.batch_size=4", "--trainer.max_epochs=1", "--trainer.check_val_every_n_epoch=1"]
    pretrained = execute(["fit", "--config", f"{CONFIGS}/pretrain.yaml", "--config", f"{CONFIGS}/smoke.yaml",
                          f"--data.root={archive}", "--trainer.enable_progress_bar=false", *tiny])  # fmt: skip
    weights = torch.load(pretrained / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    for task in ("covid", "siim_seg"):
        still = ["--model.optimization.optimizer.lr=0.0"]
        run = execute(line("fit", task, trees / TREES[task], *SHORT, *still,
                           f"--model.pretrained={pretrained}/checkpoints/last.ckpt"))  # fmt: skip
        carried = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        key = "network.encoder.blocks.0.attn.qkv.weight"
        assert torch.equal(carried[key], weights[key])


@pytest.mark.slow
def test_a_fine_tuning_resumes(trees, monkeypatch):
    arguments = line("fit", "covid", trees / "covid_cxr", "--trainer.max_steps=5", "--trainer.val_check_interval=1",
                     "--data.batch_size=4")  # fmt: skip
    whole = execute(arguments)
    training_step = ImageClassifier.training_step

    def stopped(self, batch, batch_idx):
        if self.trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return training_step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(ImageClassifier, "training_step", stopped)
        with pytest.raises(PreemptedError):
            execute(arguments)
    part = max(whole.parent.iterdir(), key=lambda path: path.stat().st_mtime)
    assert part != whole
    assert execute([*arguments, f"--ckpt_path={part}"]) == part
    a, b = (torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for folder in (whole, part))
    assert max(float((a[key] - b[key]).abs().max()) for key in a) == 0.0


@pytest.mark.real_data
@pytest.mark.parametrize("task", ["covid", "viral"])
def test_real_folds_share_no_patient_and_no_note(real_data, task):
    root = real_data("covid_cxr")
    notes = {study.images[0][0].name: study.text for study in COVID_CXR.find(Tree(root))}
    tested = []
    for fold in range(5):
        datamodule = LabelledImageDataModule(
            str(root), CovidFindings(task), split=FoldConfig((0.7, 0.1, 0.2), fold=fold)
        )
        datamodule.index()
        parts = datamodule.splits
        for one, other in (("train", "test"), ("train", "val"), ("val", "test")):
            assert not {i.patient_id for i in parts[one]} & {i.patient_id for i in parts[other]}
            assert not {notes[i.case_id] for i in parts[one]} & {notes[i.case_id] for i in parts[other]} - {None}
        assert {item.targets[0] for item in parts["test"]} == {0.0, 1.0}
        tested += [item.case_id for item in parts["test"]]
    assert len(tested) == len(set(tested)) == {"covid": 132, "viral": 113}[task]
