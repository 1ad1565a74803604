"""From a pre-trained encoder to labelled tasks, through the commands a person types."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import torch

from common.checkpoint import load_encoder
from common.cli import execute
from common.commands import main as medmim
from common.downstream.segmentation import SegmentationModule
from common.errors import PreemptedError

TINY = ["--data.num_workers=0", "--data.batch_size=2", "--trainer.enable_progress_bar=false",
        "--trainer.precision=32-true", "--trainer.log_every_n_steps=1"]  # fmt: skip
ENCODER = ["--model.encoder.embed_dim=32", "--model.encoder.depth=4", "--model.encoder.num_heads=2"]


def task(name, root, *more, command="fit"):
    return [command, "--config", f"experiments/e_mim/configs/finetune_{name}.yaml", f"--data.root={root}", *TINY, *more]


def segmentation(name, root, crop, *more, command="fit"):
    sizes = [f"--data.crops.size={crop}", "--model.network.feature_size=4", *ENCODER]
    return task(name, root, *sizes, *more, command=command)


EPOCH = ["--trainer.max_epochs=1", "--trainer.check_val_every_n_epoch=1"]
SPLIT = "--data.split.fractions=[0.5,0.25,0.25]"


SHORT = ["--model.encoder.depth=4", "--trainer.max_steps=2", "--trainer.limit_val_batches=1"]


@pytest.fixture
def pretrained(pretrain_arguments):
    return execute(pretrain_arguments(*SHORT))


@pytest.mark.slow
def test_segmentation_from_a_pretrained_encoder(pretrained, brats_root, capsys):
    weights = load_encoder(pretrained).state_dict()
    arguments = segmentation("brats_seg", brats_root, "[32,32,32]", SPLIT, *EPOCH, f"--model.pretrained={pretrained}")
    folder = execute([*arguments, "--model.optimization.optimizer.lr=0"])
    assert "missing: none, unexpected: none" in capsys.readouterr().out
    state = torch.load(folder / "checkpoints/best.ckpt", weights_only=True)["state_dict"]
    for name, value in weights.items():
        assert torch.equal(state[f"network.vit.{name}"], value)

    execute(segmentation("brats_seg", brats_root, "[32,32,32]", SPLIT, f"--ckpt_path={folder}", command="test"))
    report = capsys.readouterr().out
    assert all(f"{region}: Dice" in report for region in ("WT", "TC", "ET"))
    assert "empty" in report


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "crop", "regions"),
    [("brats_seg", "[32,32,32]", ("WT", "TC", "ET")), ("picai_seg", "[32,32,16]", ("TZ", "PZ")),
     ("lung_seg", "[32,32,16]", ("TC", "VD"))],
)  # fmt: skip
def test_segmentation_from_scratch_to_metrics_and_volumes(name, crop, regions, request):
    root = request.getfixturevalue({"b": "brats_root", "p": "pi_cai_root", "l": "lung_root"}[name[0]])
    folder = execute(segmentation(name, root, crop, SPLIT, *EPOCH))
    tested = execute(segmentation(name, root, crop, SPLIT, f"--ckpt_path={folder}", command="test"))
    assert tested.parent.name == f"evaluate_{name}"
    metrics = json.loads((tested / "metrics.json").read_text())
    rows = list(csv.DictReader((tested / "per_case.csv").open()))
    assert metrics["n"] == len(rows) >= 1
    for region in regions:
        dice = [float(row[f"dice_{region}"]) for row in rows]
        assert metrics[f"dice_{region}"]["mean"] == pytest.approx(np.mean(dice))
        assert all(float(row[f"hd95_{region}"]) >= 0 for row in rows)
        assert {row[f"empty_{region}"] for row in rows} <= {"neither", "prediction", "reference", "both"}

    predicted = execute(segmentation(name, root, crop, SPLIT, f"--ckpt_path={folder}", command="predict"))
    volumes = sorted((predicted / "predictions").glob("*.nii.gz"))
    assert len(volumes) == len(rows)
    assert np.asarray(nib.load(volumes[0]).dataobj).dtype == np.uint8


@pytest.mark.slow
@pytest.mark.parametrize("name", ["idh_probe", "cspca_probe", "lung_probe"])
def test_probes(pretrain_arguments, name, request):
    root = request.getfixturevalue({"i": "brats_root", "c": "pi_cai_root", "l": "lung_root"}[name[0]])
    crop = "--data.crops.size=" + ("[32,32,32]" if name[0] == "i" else "[32,32,16]")
    sizes = ["--model.num_folds=2", "--model.num_seeds=2", crop, "--data.split.fractions=[0.75,0.0,0.25]"]
    if name == "idh_probe":
        sizes.append(f"--data.target.file={root / 'idh.csv'}")
    # A frozen encoder is refused other channels than those it was trained on.
    pretrained = execute(pretrain_arguments(*SHORT, crop, root=root))
    before = load_encoder(pretrained).state_dict()
    folder = execute(task(name, root, *sizes, *EPOCH, f"--model.pretrained={pretrained}"))
    scalars = json.loads((folder / "summary.json").read_text())["scalars"]
    assert 0 <= scalars["val/auroc"]["final"] <= 1
    rows = list(csv.DictReader((folder / "out_of_fold.csv").open()))
    assert {row["target"] for row in rows} == {"0", "1"}
    if name == "idh_probe":
        state = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for key, value in before.items():
            assert torch.equal(state[f"network.encoder.{key}"], value), key
    tested = execute(task(name, root, *sizes, f"--ckpt_path={folder}", command="test"))
    assert json.loads((tested / "metrics.json").read_text())["n"] >= 1


@pytest.mark.slow
def test_a_run_resumes_downstream(brats_root, monkeypatch):
    arguments = segmentation("brats_seg", brats_root, "[32,32,32]", SPLIT, "--trainer.check_val_every_n_epoch=1",
                             "--trainer.max_epochs=2", "--data.loader.draws=2")  # fmt: skip
    whole = execute(arguments)
    training_step = SegmentationModule.training_step

    def stop_in_the_second_epoch(self, batch, batch_idx):
        if self.trainer.current_epoch == 1 and batch_idx == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return training_step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(SegmentationModule, "training_step", stop_in_the_second_epoch)
        with pytest.raises(PreemptedError):
            execute(arguments)
    part = max(whole.parent.iterdir(), key=lambda path: path.stat().st_mtime)
    assert part != whole
    assert execute([*arguments, f"--ckpt_path={part}"]) == part
    a, b = (torch.load(f / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for f in (whole, part))
    assert max(float((a[k] - b[k]).abs().max()) for k in a) == 0.0


@pytest.mark.slow
def test_export_loads_in_monai_and_computes_the_same(pretrained, tmp_path, capsys):
    from monai.networks.nets import ViT
    from safetensors.torch import load_file

    medmim(["export", "--exp", "e_mim", "--ckpt", str(pretrained), "--format", "monai", "--out", str(tmp_path / "out")])
    config = json.loads((tmp_path / "out/config.json").read_text())
    theirs = ViT(**config["arguments"]).eval()
    theirs.load_state_dict(load_file(tmp_path / "out/model.safetensors"))
    volume = torch.randn(2, 4, 32, 32, 32)
    ours = load_encoder(pretrained).eval()
    with torch.no_grad():
        assert torch.allclose(theirs(volume)[0], ours.forward_features(volume), atol=1e-5)
        again = load_encoder(tmp_path / "out").eval()
        assert torch.equal(again.forward_features(volume), ours.forward_features(volume))
    card = (tmp_path / "out/README.md").read_text()
    assert config["sha256"] in card
    assert "t1c, t1 (t1n in the archive), flair (t2f in the archive), t2 (t2w in the archive)" in card
    with pytest.raises(SystemExit):
        medmim(["export", "--exp", "e_mim", "--ckpt", str(pretrained), "--format", "onnx", "--out", str(tmp_path)])
    assert "valid formats: monai" in capsys.readouterr().err


@pytest.mark.slow
def test_embeddings_are_the_encoders(pretrained, brats_root, tmp_path):
    import pandas as pd

    out = tmp_path / "features.parquet"
    medmim(["embed", "--config", "experiments/e_mim/configs/pretrain.yaml", "--root", str(brats_root), "--ckpt",
            str(pretrained), "--set", "crops.size=[32,32,32]", "--out", str(out)])  # fmt: skip
    table = pd.read_parquet(out)
    assert len(table) == 8
    assert {len(feature) for feature in table["feature"]} == {32}
    assert set(table["split"]) <= {"train", "val", "test"}


@pytest.mark.slow
def test_new_scans_are_predicted_without_labels(brats_root, tmp_path):
    """The archive in the clinic has no segmentations; the checkpoint knows what it was trained to find."""
    folder = execute(segmentation("brats_seg", brats_root, "[32,32,32]", SPLIT, *EPOCH))
    root = shutil.copytree(brats_root, tmp_path / "new", ignore=shutil.ignore_patterns("*-seg.nii.gz"))
    arguments = segmentation("brats_seg", root, "[32,32,32]", f"--ckpt_path={folder}", command="predict")
    predicted = execute([*arguments, "--data.labels.needed=false", "--data.split.fractions=[1,0,0]"])
    assert len(list((predicted / "predictions").glob("*.nii.gz"))) == 8


@pytest.mark.ddp
def test_two_ranks_score_all_test_cases(pretrained, brats_root):
    """Each rank sees its share; what is written is of all of them."""
    sizes = ["--model.num_folds=2", "--model.num_seeds=2", "--data.crops.size=[32,32,32]", SPLIT,
             f"--data.target.file={brats_root / 'idh.csv'}"]  # fmt: skip
    folder = execute(task("idh_probe", brats_root, *sizes, *EPOCH, f"--model.pretrained={pretrained}"))
    test = task("idh_probe", brats_root, *sizes, "--data.batch_size=1", f"--ckpt_path={folder}", command="test")
    one = execute(test)
    subprocess.run([sys.executable, "-m", "common.cli", *test, "--trainer.devices=2", "--trainer.accelerator=cpu"],
                   check=True, timeout=300)  # fmt: skip
    two = max(one.parent.iterdir(), key=lambda path: path.stat().st_mtime)
    assert two != one
    rows = [list(csv.DictReader((run / "per_case.csv").open())) for run in (one, two)]
    assert len(rows[0]) >= 2
    assert [row["subject_id"] for row in rows[0]] == [row["subject_id"] for row in rows[1]]
