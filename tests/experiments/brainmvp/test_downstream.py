"""From a pre-trained encoder to labelled tasks: replaced channels, deep supervision, missing sequences, classes."""

import csv
import json
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from common.blocks.residual_unet import ResidualUNetEncoder
from common.blocks.template_bank import place_of
from common.blocks.uniformer import UniFormer3D
from common.checkpoint import load_encoder
from common.cli import execute
from common.distributed import loss_and_gradient
from common.losses.region import BatchDiceBCE
from common.metrics import region_dice
from common.types import InputSpec
from datamodules.synthetic.brain import write_tree
from experiments.brainmvp.classification import weighted_cross_entropy
from experiments.brainmvp.segmentation import BrainSegmentation, augmented, replaced_channels, subsets
from experiments.brainmvp.segmentation_networks import segmenter

TINY = {"embed_dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1), "head_dim": 8}
ENCODER = ["--model.encoder.embed_dims=[8,8,16,16]", "--model.encoder.depths=[1,1,1,1]", "--model.encoder.head_dim=8",
           "--model.encoder.recompute_stages=0"]  # fmt: skip
CHANNELS = ["t1", "t1c", "t2", "flair"]


def test_the_specifications_loss():
    logits = torch.tensor([0.0, 3, 1 / 3, 1]).log().nan_to_num(neginf=0).reshape(1, 1, 4, 1, 1)
    target = torch.tensor([1.0, 1, 0, 0]).reshape(1, 1, 4, 1, 1)
    assert BatchDiceBCE(1, 0)(logits, target).item() == pytest.approx(0.151515, abs=1e-6)
    assert BatchDiceBCE(0, 1)(logits, target).item() == pytest.approx(0.490415, abs=1e-6)
    assert BatchDiceBCE()(logits, target).item() == pytest.approx(0.253185, abs=1e-6)
    assert region_dice(logits > 0, target > 0.5).item() == pytest.approx(0.666667, abs=1e-6)


@pytest.mark.ddp
def test_two_ranks_equal_one(rank_pool):
    logits, target = torch.randn(4, 2, 3, 2, 5, dtype=torch.float64), (torch.rand(4, 2, 3, 2, 5) < 0.4).double()
    classes, weight = torch.tensor([0, 1, 1, 2]), torch.rand(5, 5, dtype=torch.float64)
    share = torch.tensor([0.5, 1.0, 2.0, 1.0, 1.5])
    cases = [
        (BatchDiceBCE(), {"logits": logits, "target": target}),
        (partial(weighted_cross_entropy, weight=share), {"logits": torch.randn(4, 5), "target": classes}),
    ]
    for loss, tensors in cases:
        matrix = weight.to(tensors["logits"])
        whole, gradient = loss_and_gradient(loss, tensors, ["logits"], matrix)
        jobs = [
            (loss, {k: v[part] for k, v in tensors.items()}, ["logits"], matrix) for part in (slice(1), slice(1, 4))
        ]
        for value, part_gradient in rank_pool.run(loss_and_gradient, jobs):
            assert value.item() == pytest.approx(whole.item(), rel=1e-5)
            assert torch.allclose(part_gradient, gradient, rtol=1e-4, atol=1e-6)


def test_replaced_channels():
    keys = torch.arange(4000) * 7919 + 3
    for channels, expected in ((4, [0.25, 0.25, 0.25, 0.25]), (3, [0.25, 0.25, 0.5]), (1, [1.0])):
        mask = replaced_channels(keys, channels)
        share = mask.sum(1).bincount(minlength=len(expected)) / len(keys)
        assert share.tolist() == pytest.approx(expected, abs=0.03)
        assert (~mask).any(1).all()
        if channels > 1:
            assert mask.float().mean(0).std() < 0.02
    assert torch.equal(replaced_channels(keys[5:8], 4), replaced_channels(keys, 4)[5:8])


def test_versions_are_augmented_alike():
    image, label = torch.rand(6, 2, 4, 4, 4), (torch.rand(6, 1, 4, 4, 4) < 0.5).float()
    keys = torch.arange(6) * 31
    (first, second), turned = augmented(keys, [image, image], label)
    assert torch.equal(first, second)
    (marked, _), again = augmented(keys, [label, label], label, shift=0, scale=0)
    assert torch.equal(again, turned)
    assert torch.equal(marked, turned)
    assert not torch.equal(turned, label)


@pytest.mark.parametrize("encoder", [
    UniFormer3D(4, (32, 16, 16), **TINY), ResidualUNetEncoder(4, (32, 16, 16), 8, (1, 1, 1, 1)),
    ResidualUNetEncoder(4, (32, 16, 16), 8, (1, 1, 1), patch_size=2),
], ids=["uniformer", "unet", "unet on patches"])  # fmt: skip
def test_networks_have_heads_at_three_resolutions(encoder):
    network = segmenter(encoder, 3)
    x = torch.randn(1, 4, 32, 16, 16)
    full, half, quarter = network.levels(x)
    assert full.shape == (1, 3, 32, 16, 16)
    patch = encoder.config.get("patch_size", 1)
    assert half.shape[2:] == torch.Size([16 // patch, 8 // patch, 8 // patch])
    assert quarter.shape[2:] == torch.Size([8 // patch, 4 // patch, 4 // patch])
    deep = network.deep(x)
    assert {tuple(y.shape) for y in deep} == {(1, 3, 32, 16, 16)}
    network.eval()
    assert torch.equal(network(x), network.levels(x)[0])
    wanted = F.interpolate(network.levels(x)[2], (32, 16, 16), mode="trilinear", align_corners=True)
    assert torch.allclose(network.deep(x)[2], wanted)


def module(**settings):
    made = BrainSegmentation(encoder=partial(UniFormer3D, **TINY), **settings)
    made.build(InputSpec(CHANNELS, (16, 16, 16), regions={"WT": (1, 2, 3), "ET": (3,)}))
    with torch.no_grad():
        made.network.templates = torch.nn.Parameter(torch.rand(4, 24, 24, 24), requires_grad=False)
    return made


def batch_of():
    there = torch.ones(2, 4, dtype=torch.bool)
    there[1, 2] = False
    return {"image": torch.rand(2, 4, 16, 16, 16) * there[..., None, None, None], "modality_mask": there,
            "label": (torch.rand(2, 2, 16, 16, 16) < 0.3).float(), "key": torch.tensor([5, 9]),
            "place": [(1, 2, 3, 20, 20, 22), (0, 0, 0, 16, 30, 16)]}  # fmt: skip


def test_absent_sequences_are_their_templates_at_the_same_place():
    made, batch = module(), batch_of()
    inputs = made.inputs(batch)
    assert torch.equal(inputs[0], batch["image"][0])
    _, *start = place_of(2, (0, 0, 0), (16, 30, 16), (24, 24, 24))
    assert start == [4, -3, 4]
    assert torch.equal(inputs[1, 2, :, 3:], made.network.templates[2, 4:20, 0:13, 4:20])
    assert not inputs[1, 2, :, :3].any()
    alone = made.inputs(batch, ["t1"])
    assert torch.equal(alone[:, 0], inputs[:, 0])
    assert torch.equal(alone[0, 1], made.network.templates[1, 3:19, 4:20, 4:20])


def test_the_loss_is_the_specifications(monkeypatch):
    """Three levels of both versions, stacked in the batch, and a tenth of the quarter level's squared difference."""
    made, batch = module(augment=False), batch_of()
    logged = {}
    monkeypatch.setattr(made, "log", lambda name, value, **_: logged.setdefault(name, float(value)))
    monkeypatch.setattr(made, "log_dict", lambda values, **_: logged.update({k: float(v) for k, v in values.items()}))
    made.eval()
    loss = made.training_step(batch, 0)
    views, whole = made.templates(batch["place"], (16, 16, 16)), made.inputs(batch)
    masks = [replaced_channels(batch["key"] + 1 + version, 4)[..., None, None, None] for version in (0, 1)]
    outputs = made.network.deep(torch.cat([torch.where(mask, views, whole) for mask in masks]))
    expected = sum(BatchDiceBCE()(y, batch["label"].repeat(2, 1, 1, 1, 1)) for y in outputs)
    expected = expected + 0.1 * (outputs[2][:2] - outputs[2][2:]).square().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert {"train/loss", "train/loss_level0", "train/loss_level2", "train/loss_consistency"} == logged.keys() - {
        "train/loss_level1"
    }


def test_overlapping_windows_count_alike_unless_asked_otherwise():
    class Ramp(torch.nn.Module):
        def forward(self, image):
            return torch.arange(16.0)[:, None, None].expand(len(image), 1, 16, 16, 16).clone()

    def along(**settings):
        made = module(**settings)
        made.network = Ramp()
        return made.logits(torch.zeros(1, 4, 24, 16, 16))[0, 0, :, 8, 8]

    shared = torch.arange(8.0, 16) - 4  # the mean of v and v - 8
    assert torch.allclose(along(), torch.cat([torch.arange(8.0), shared, torch.arange(8.0, 16)]))
    assert not torch.allclose(along(window_mode="gaussian")[8:16], shared, atol=0.1)


def test_sets_of_sequences():
    assert subsets(["a", "b", "c"]) == [("a", "b", "c"), ("a", "b"), ("a", "c"), ("b", "c"), ("a",), ("b",), ("c",)]
    assert len(subsets(CHANNELS)) == 15


def task(name, root, *more, command="fit"):
    return [command, "--config", f"experiments/brainmvp/configs/finetune_{name}.yaml", f"--data.root={root}",
            "--data.num_workers=0", "--data.batch_size=2", "--trainer.precision=32-true", *ENCODER,
            "--trainer.enable_progress_bar=false", *more]  # fmt: skip


EPOCH = ["--trainer.max_epochs=1", "--trainer.check_val_every_n_epoch=1"]
SPLIT = "--data.split.fractions=[0.5,0.25,0.25]"
SEG = ["--data.crops.size=[16,16,16]", "--data.atlas=[40,44,36]", SPLIT]


@pytest.mark.slow
def test_segmentation_from_a_pretrained_encoder_to_the_table_of_missing_sequences(brain_arguments, brats_root, capsys):
    pretrained = execute(brain_arguments("--trainer.max_epochs=1"))
    start = task(
        "brats_seg", brats_root, *SEG, *EPOCH, f"--model.pretrained={pretrained}", "--model.optimization.optimizer.lr=0"
    )
    folder = execute(start)
    report = capsys.readouterr().out
    assert "one stored kernel shared out among 4" in report
    assert "decoder from pre-training: 4 tensors; templates: yes" in report
    state = torch.load(folder / "checkpoints/best.ckpt", weights_only=True)["state_dict"]
    before = load_encoder(pretrained, channels=CHANNELS).state_dict()
    for name, value in before.items():
        if "running" not in name and "batches" not in name:
            assert torch.equal(state[f"network.encoder.{name}"], value), name
    bank = torch.load(pretrained / "checkpoints/best.ckpt", weights_only=True)["state_dict"]
    assert state["network.templates"].shape == (4, 40, 44, 36)
    assert state["network.templates"][0].max() <= 1
    assert bank["network.templates.weight"][1].any()

    tested = execute(task("brats_seg", brats_root, *SEG, f"--ckpt_path={folder}", command="test"))
    table = list(csv.DictReader((tested / "missing_sequences.csv").open()))
    assert len(table) == 15
    assert table[0]["sequences"] == "t1+t1c+t2+flair"
    metrics = json.loads((tested / "metrics.json").read_text())
    for region in ("TC", "WT", "ET"):
        assert float(table[0][f"dice_{region}"]) == pytest.approx(metrics[f"dice_{region}"]["mean"], abs=1e-6)
    assert {f"dice_absent_{count}" for count in range(4)} <= metrics.keys()
    predicted = execute(task("brats_seg", brats_root, *SEG, f"--ckpt_path={folder}", command="predict"))
    assert list((Path(predicted) / "predictions").glob("*.nii.gz"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["isles22", "mrbrains13", "vsseg", "upenn"])
def test_segmentation_of_other_layouts(name, tmp_path):
    layout = {"upenn": "upenn_gbm"}.get(name, name)
    write_tree(tmp_path / "root", 4, 0, layout, (40, 44, 36))
    folder = execute(task(f"{name}_seg", tmp_path / "root", *SEG, *EPOCH))
    scalars = json.loads((folder / "summary.json").read_text())["scalars"]
    assert {"val/loss", "val/dice"} <= scalars.keys()
    assert (folder / "data_faults.csv").read_text().count("\n") == 1
    assert (folder / "checkpoints/best.ckpt").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["brats2018", "adni", "adhd200", "abide1"])
def test_classification(name, tmp_path):
    write_tree(tmp_path / "root", 12, 2, name, (24, 28, 20))
    sizes = ["--data.crops.size=[16,16,16]", "--data.resize=[24,24,16]", SPLIT]
    folder = execute(task(f"{name}_cls", tmp_path / "root", *sizes, *EPOCH))
    scalars = json.loads((folder / "summary.json").read_text())["scalars"]
    assert {"val/classes_left_out", "val/accuracy", "val/f1", "val/loss"} <= scalars.keys()
    if name in ("brats2018", "adni"):
        tested = execute(task(f"{name}_cls", tmp_path / "root", *sizes, f"--ckpt_path={folder}", command="test"))
        metrics = json.loads((tested / "metrics.json").read_text())
        rows = list(csv.DictReader((tested / "per_case.csv").open()))
        assert metrics["n"] == len(rows) > 0
