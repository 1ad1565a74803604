import csv
import json
import math

import pytest
import torch
from torch import nn

from common.blocks.vit import VisionTransformer
from common.checkpoint import load_encoder
from common.cli import execute
from common.distributed import loss_and_gradient
from common.downstream.classification import (
    ClassifierNetwork,
    ImageClassifier,
    auroc_by_class,
    macro_auroc,
    masked_binary_cross_entropy,
)
from common.errors import UserError
from common.types import InputSpec
from experiments.mrm_record.baselines import GrayHistogram


def small_vit(channels=3, size=(16, 16), **more):
    return VisionTransformer(channels, size, patch_size=8, embed_dim=24, depth=3, num_heads=3, class_token=True, **more)


def test_the_loss_is_the_mean_over_what_is_known():
    logits, target = torch.randn(5, 3), torch.randint(0, 2, (5, 3)).float()
    mask = torch.rand(5, 3) > 0.4
    slow = [
        -math.log(torch.sigmoid(logits[i, k] if target[i, k] else -logits[i, k]))
        for i, k in mask.nonzero().tolist()
    ]  # fmt: skip
    assert masked_binary_cross_entropy(logits, target, mask).item() == pytest.approx(sum(slow) / len(slow), rel=1e-5)


def test_an_unknown_target_has_no_gradient_and_nothing_known_gives_zero():
    logits = torch.randn(4, 2, requires_grad=True)
    mask = torch.tensor([[True, False]] * 4)
    masked_binary_cross_entropy(logits, torch.ones(4, 2), mask).backward()
    assert (logits.grad[:, 1] == 0).all()
    assert (logits.grad[:, 0] != 0).all()
    nothing = masked_binary_cross_entropy(logits, torch.ones(4, 2), torch.zeros(4, 2, dtype=torch.bool))
    assert nothing == 0
    assert nothing.requires_grad


@pytest.mark.ddp
def test_two_ranks_equal_one(rank_pool):
    logits, target = torch.randn(4, 3), torch.randint(0, 2, (4, 3)).float()
    mask = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 0, 0], [0, 1, 0]], dtype=torch.bool)
    parts = [{"logits": logits[i], "target": target[i], "mask": mask[i]} for i in (slice(4), slice(2), slice(2, 4))]
    weight = torch.randn(3, 3)
    arguments = [(masked_binary_cross_entropy, part, ["logits"], weight) for part in parts]
    loss, gradient = loss_and_gradient(*arguments[0])
    for rank_loss, rank_gradient in rank_pool.run(loss_and_gradient, arguments[1:]):
        assert torch.allclose(rank_loss, loss, rtol=1e-6)
        assert torch.allclose(rank_gradient, gradient, rtol=1e-6, atol=1e-7)


def test_a_class_of_one_value_is_left_out_not_counted_as_zero():
    scores = torch.tensor([[0.1, 0.3], [0.9, 0.2], [0.8, 0.1], [0.4, 0.5]])
    target = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    mask = torch.ones(4, 2, dtype=torch.bool)
    assert auroc_by_class(scores, target, mask) == [1.0, None]
    mask[1, 0] = False
    assert auroc_by_class(scores, target, mask) == [None, None]


def test_the_macro_mean_is_over_the_classes_that_occur():
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.4, 0.5, 0.1], [0.6, 0.3, 0.1], [0.2, 0.7, 0.1]])
    # By hand: both classes that occur rank 3 of their 4 pairs rightly; the third never occurs.
    area, left_out = macro_auroc(probabilities, torch.tensor([0, 0, 1, 1]))
    assert (area, left_out) == (0.75, 1)
    alone, left_out = macro_auroc(probabilities, torch.zeros(4, dtype=torch.long))
    assert math.isnan(alone)
    assert left_out == 3


def test_the_head_reads_patches_alone_through_a_fresh_norm():
    encoder = small_vit()
    network = ClassifierNetwork(encoder, 5)
    image = torch.randn(2, 1, 16, 16)
    tokens = encoder.encode_image(image.expand(-1, 3, -1, -1), taps=(3,)).hidden[0][:, 1:]
    features = nn.functional.layer_norm(tokens.mean(1), (24,), eps=1e-6)
    assert torch.allclose(network(image), network.head(features), atol=1e-6)
    assert isinstance(encoder.norm, nn.Identity)
    assert encoder.pos_embed.requires_grad
    assert network.head.weight.std() < 1e-4
    network(image).sum().backward()
    unused = [name for name, parameter in network.named_parameters() if parameter.grad is None]
    assert unused == []


def test_stochastic_depth_rises_to_the_last_block():
    module = ImageClassifier(encoder=lambda channels, size: small_vit(channels, size), drop_path=0.1)
    network = module.build_network(InputSpec(("red", "green", "blue"), (16, 16), classes=("a",)))
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in network.encoder.blocks]
    assert rates == pytest.approx([0.0, 0.05, 0.1])


def test_data_without_classes_are_refused():
    with pytest.raises(UserError, match="defines no classes"):
        ImageClassifier().build_network(InputSpec(("red", "green", "blue"), (16, 16)))


def test_a_histogram_counts_pixels():
    encoder = GrayHistogram(3, (4, 4), bins=4, limits=(0.0, 1.0))
    image = torch.tensor([0.1, 0.1, 0.3, 1.0]).reshape(1, 1, 2, 2).expand(1, 3, 2, 2)
    assert encoder.forward_features(image).tolist() == [[[0.5, 0.25, 0.0, 0.25]]]


@pytest.fixture(scope="module")
def covid_root(tmp_path_factory):
    from datamodules.synthetic.labelled import write_covid_cxr

    folder = tmp_path_factory.mktemp("covid_cxr")
    write_covid_cxr(folder, 24, seed=0, size=(56, 64))
    return folder


def command(run, root, *more):
    config = "experiments/mrm_record/configs/finetune_covid"
    return [
        run, "--config", f"{config}.yaml", "--config", f"{config}.smoke.yaml", f"--data.root={root}",
        "--trainer.enable_progress_bar=false", "--trainer.precision=32-true", "--trainer.log_every_n_steps=1", *more,
    ]  # fmt: skip


@pytest.mark.slow
def test_fine_tuning_testing_and_predicting(covid_root):
    run = execute(command("fit", covid_root, "--trainer.max_steps=6", "--trainer.val_check_interval=3"))
    scalars = json.loads((run / "summary.json").read_text())["scalars"]
    assert {"train/loss", "val/auroc", "val/loss", "lr"} <= scalars.keys()
    assert load_encoder(run, image_size=(64, 64)).num_features == 64
    tested = execute(command("test", covid_root, f"--ckpt_path={run}"))
    metrics = json.loads((tested / "metrics.json").read_text())
    rows = list(csv.DictReader((tested / "per_case.csv").open()))
    assert metrics["n"] == len(rows)
    assert 0 <= metrics["auroc"] <= 1
    assert {"subject_id", "patient_id", "score_COVID-19", "target_COVID-19"} == rows[0].keys()
    predicted = execute(command("predict", covid_root, f"--ckpt_path={run}"))
    scores = {
        row["subject_id"]: row["score_COVID-19"] for row in csv.DictReader((predicted / "predictions.csv").open())
    }
    assert scores == {row["subject_id"]: row["score_COVID-19"] for row in rows}
    with pytest.raises(UserError, match=r"made for classes \['COVID-19'\], but the dataset has \['viral'\]"):
        execute(command("test", covid_root, f"--ckpt_path={run}", "--data.labels.task=viral"))


@pytest.mark.slow
def test_the_histogram_and_shuffled_labels_run(covid_root):
    histogram = ["--config", "experiments/mrm_record/configs/finetune_covid.histogram.yaml"]
    short = ["--trainer.max_steps=2", "--trainer.val_check_interval=2"]
    arguments = command("fit", covid_root)
    run = execute([*arguments[:5], *histogram, *arguments[5:], *short, "--data.shuffle.seed=1"])
    assert (run / "checkpoints/best.ckpt").is_file()
