import csv
import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from common.blocks.upernet import UPerNet
from common.blocks.vit import VisionTransformer
from common.checkpoint import load_encoder
from common.cli import execute
from common.downstream.image_segmentation import ImageSegmentation, dice_scores, on_source_grid
from common.errors import UserError
from common.losses.focal_dice import IGNORED, FocalDice
from common.metrics import region_dice
from common.optim import OptimizerConfig, WarmupLinear
from common.types import InputSpec
from datamodules.labelled.segmentation import fitted_size, reduced_mask
from datamodules.labelled.siim import SIIMPneumothorax, decode_runs

SPEC = InputSpec(("red", "green", "blue"), (16, 16), {"R": (1,)})
ENCODER = partial(VisionTransformer, patch_size=8, embed_dim=16, depth=2, num_heads=2)
NETWORK = partial(UPerNet, hidden_size=8, auxiliary_channels=4)


class Fixed(nn.Module):
    """Gives out logits, whatever it is shown."""

    def __init__(self, *logits):
        super().__init__()
        self.logits = logits

    def forward(self, image):
        return self.logits


def row(dice, pixels, loss=0.0):
    return {"dice": dice, "reference_pixels": pixels, "loss": loss}


def test_dice_per_image():
    """R9 of the specification."""
    pred = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    truth = torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]], dtype=torch.bool)
    dice = region_dice(pred[:, None, None], truth[:, None, None])[:, 0]
    assert dice.tolist() == pytest.approx([0.666667, 1, 0, 0], abs=1e-6)
    scores = dice_scores([row(float(dice[i]), int(truth[i].sum()), loss=i) for i in range(4)])
    assert scores["dice"] == pytest.approx(0.416667, abs=1e-6)
    assert scores["dice_positive"] == pytest.approx(0.333333, abs=1e-6)
    assert scores["dice_all_empty"] == 0.5
    assert scores["loss"] == 1.5


def test_finding_nothing_scores_the_share_of_images_without_a_region():
    rows = [row(1.0, 0)] * 11 + [row(0.0, 5)] * 6
    scores = dice_scores(rows)
    assert scores["dice"] == pytest.approx(scores["dice_all_empty"])
    assert scores["dice_all_empty"] == pytest.approx(11 / 17)
    assert scores["dice_positive"] == 0
    assert "dice_positive" not in dice_scores([row(1.0, 0)])


def padded_logits(mask, image_size):
    """Return logits that say exactly what a padded label says, and that the padding is one large region."""
    size = fitted_size(mask.shape, image_size)
    label = reduced_mask(mask, size)[0]
    region = torch.ones(image_size)
    region[: size[0], : size[1]] = label
    return torch.stack([10 - 20 * region, 20 * region - 10]), size


@pytest.mark.parametrize("shape", [(64, 48), (48, 64), (32, 32), (128, 96)])
def test_a_region_returns_to_the_grid_of_its_file(shape):
    mask = np.zeros(shape, dtype=np.uint8)
    mask[8:24, 12:36] = 1
    logits, size = padded_logits(mask, (64, 64))
    found = on_source_grid(logits, size, shape)
    assert found.dtype == torch.bool
    assert torch.equal(found, torch.from_numpy(mask) > 0)


def test_padding_is_no_region():
    mask = np.zeros((32, 16), dtype=np.uint8)
    logits, size = padded_logits(mask, (64, 64))
    assert (logits.argmax(0) == 1).any()
    assert not on_source_grid(logits, size, (32, 16)).any()


def test_a_half_is_not_enough():
    logits = torch.zeros(2, 4, 4)
    logits[1, 0, 0] = 1e-3
    assert on_source_grid(logits, (4, 4), (4, 4)).nonzero().tolist() == [[0, 0]]


def module(**options):
    module = ImageSegmentation(encoder=ENCODER, network=NETWORK, **options)
    module.log = lambda *args, **kwargs: None
    return module


def test_the_auxiliary_loss_is_added_with_its_weight():
    logits, further = torch.randn(2, 2, 2, 4, 4).unbind()
    label = torch.randint(0, 2, (2, 1, 4, 4)).float()
    ours = module()
    ours.network = Fixed(logits, further)
    batch = {"image": torch.zeros(2, 1, 4, 4), "label": label}
    focal, dice = FocalDice(1.0, 0.0), FocalDice(0.0, 1.0)
    expected = 2 * focal(logits, label) + dice(logits, label) + 0.8 * focal(further, label) + 0.4 * dice(further, label)
    assert ours.training_step(batch, 0).item() == pytest.approx(expected.item(), rel=1e-6)
    ours.network = Fixed(logits)
    assert ours.training_step(batch, 0).item() == pytest.approx(FocalDice()(logits, label).item(), rel=1e-6)


def test_images_of_a_batch_are_scored_one_by_one():
    shapes = ((64, 48), (32, 64), (20, 20))
    masks = [np.zeros(shape, dtype=np.uint8) for shape in shapes]
    masks[0][8:24, 12:36] = masks[1][4:12, 8:32] = 1
    logits, sizes = zip(*(padded_logits(mask, (64, 64)) for mask in masks), strict=True)
    logits = torch.stack(logits)
    logits[1, :, :4] = torch.tensor([-10.0, 10.0])[:, None, None]
    label = torch.full((3, 1, 64, 64), float(IGNORED))
    for index, (mask, size) in enumerate(zip(masks, sizes, strict=True)):
        label[index, :, : size[0], : size[1]] = reduced_mask(mask, size)
    ours = module()
    ours.network = Fixed(logits)
    names = {"subject_id": ["c", "a", "b"], "patient_id": ["p", "p", "q"]}
    batch = {"image": torch.zeros(3, 1, 64, 64), "label": label, "region": masks, "size": sizes, **names}
    ours.validation_step(batch, 0)
    rows = {entry["subject_id"]: entry for entry in ours.rows}
    assert rows["c"]["dice"] == rows["b"]["dice"] == 1
    predicted, reference = 8 * 24 + 4 * 64, 8 * 24
    assert rows["a"]["dice"] == pytest.approx(2 * reference / (predicted + reference))
    assert [rows["a"][f"{name}_pixels"] for name in ("reference", "predicted")] == [reference, predicted]
    assert rows["a"]["loss"] == pytest.approx(FocalDice()(logits[1:2], label[1:2]).item())
    assert rows["c"]["loss"] < 1e-3
    assert [entry["subject_id"] for entry in ours.take_rows()] == ["a", "b", "c"]
    found = ours.predict_step(batch, 0)
    assert torch.equal(found[0]["region"], torch.from_numpy(masks[0]))
    assert found[2]["region"].shape == (20, 20)


def test_stochastic_depth_reaches_the_encoder():
    network = module(drop_path=0.2).build_network(SPEC)
    assert [getattr(block.drop_path, "drop_prob", 0.0) for block in network.encoder.blocks] == [0.0, 0.2]


def test_the_encoder_learns_more_slowly_towards_the_input():
    ours = module(optimization=OptimizerConfig(partial(torch.optim.AdamW, lr=1.0), WarmupLinear(0), layer_decay=0.65))
    ours.network = ours.build_network(SPEC)
    ours._trainer = SimpleNamespace(estimated_stepping_batches=10)
    rates = {group["lr"] for group in ours.configure_optimizers()["optimizer"].param_groups}
    assert sorted(rates) == pytest.approx([0.65**3, 0.65**2, 0.65, 1.0])


def test_data_without_regions_are_refused():
    with pytest.raises(UserError, match="Exactly one region can be segmented, the dataset defines 0"):
        module().build_network(SPEC._replace(regions={}))


def test_it_learns_where_a_bright_box_is():
    """A few steps on four images; prediction and truth would not meet if rows and columns were exchanged."""
    network = module(drop_path=0.0).build_network(SPEC._replace(image_size=(32, 32))).train()
    label = torch.zeros(4, 1, 32, 32)
    for index, (top, left) in enumerate([(0, 16), (16, 0), (0, 0), (8, 16)]):
        label[index, :, top : top + 8, left : left + 16] = 1
    image = label + 0.1 * torch.randn_like(label)
    optimizer, loss = torch.optim.AdamW(network.parameters(), 3e-3), FocalDice()
    for _ in range(60):
        optimizer.zero_grad()
        loss(network(image)[0], label).backward()
        optimizer.step()
    pred = network.eval()(image)[0].softmax(1)[:, 1:] > 0.5
    assert region_dice(pred, label > 0).mean() > 0.8


@pytest.fixture(scope="module")
def siim_root(tmp_path_factory):
    from datamodules.synthetic.labelled import write_siim

    folder = tmp_path_factory.mktemp("siim")
    write_siim(folder, 16, seed=0, size=(56, 64))
    return folder


def command(run, root, *more):
    config = "experiments/mrm_record/configs/finetune_siim_seg"
    return [
        run, "--config", f"{config}.yaml", "--config", f"{config}.smoke.yaml", f"--data.root={root}",
        "--data.image.size=[64,64]", "--data.cache.side=64", "--trainer.enable_progress_bar=false",
        "--trainer.precision=32-true", "--trainer.log_every_n_steps=1", *more,
    ]  # fmt: skip


@pytest.mark.slow
def test_fine_tuning_testing_and_predicting(siim_root):
    run = execute(command("fit", siim_root, "--trainer.max_steps=6", "--trainer.val_check_interval=3"))
    scalars = json.loads((run / "summary.json").read_text())["scalars"]
    assert {"train/loss", "val/dice", "val/dice_positive", "val/dice_all_empty", "val/loss", "lr"} <= scalars.keys()
    assert scalars["val/dice_all_empty"]["final"] == 0.5
    assert load_encoder(run, image_size=(64, 64)).num_features == 128
    tested = execute(command("test", siim_root, f"--ckpt_path={run}"))
    metrics = json.loads((tested / "metrics.json").read_text())
    rows = list(csv.DictReader((tested / "per_case.csv").open()))
    assert metrics["n"] == len(rows) == 2
    assert metrics["positive"] == 1
    assert metrics["dice"] == pytest.approx(np.mean([float(entry["dice"]) for entry in rows]))
    predicted = execute(command("predict", siim_root, f"--ckpt_path={run}"))
    codes = {line["ImageId"]: line["EncodedPixels"] for line in csv.DictReader((predicted / "predictions.csv").open())}
    assert codes.keys() == {entry["subject_id"] for entry in rows}
    truth = {item.case_id: item.masks for item in SIIMPneumothorax().find(siim_root)}
    for entry in rows:
        pred = decode_runs([codes[entry["subject_id"]]], (56, 64))
        assert pred.sum() == int(entry["predicted_pixels"])
        known = decode_runs(truth[entry["subject_id"]], (56, 64))
        dice = region_dice(torch.from_numpy(pred)[None, None] > 0, torch.from_numpy(known)[None, None] > 0)
        assert float(dice) == pytest.approx(float(entry["dice"]))


@pytest.mark.slow
def test_it_starts_from_a_pretrained_encoder_at_another_size(siim_root):
    short = ["--trainer.max_steps=2", "--trainer.val_check_interval=2"]
    run = execute(command("fit", siim_root, *short))
    again = execute(
        command("fit", siim_root, *short, f"--model.pretrained={run}", "--data.image.size=[48,48]",
                "--model.optimization.optimizer.lr=0")
    )  # fmt: skip
    old, new = (torch.load(f / "checkpoints/best.ckpt", weights_only=True)["state_dict"] for f in (run, again))
    shared = [name for name in new if name.startswith("network.encoder.blocks")]
    assert shared
    assert all(torch.equal(old[name], new[name]) for name in shared)
    assert new["network.encoder.pos_embed"].shape[1] == 36
