import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.blocks.dense_linear import DenseLinear
from common.blocks.vit import VisionTransformer
from common.distributed import loss_and_gradient
from common.downstream.labels import LabelClassifier, at_least, class_weights, probabilities, target_loss
from common.downstream.regression import ImageRegression, squared_errors
from common.downstream.segmentation import summarise
from common.errors import UserError
from common.losses.region import RegionDiceBCE
from common.types import InputSpec

SPEC = InputSpec(("a",), (16, 16, 16), classes=("low", "mid", "high"), target={"kind": "classes"})
TARGET = torch.eye(3)[[0, 2, 1, 1, 0]]
KNOWN = torch.ones(5, 3, dtype=torch.bool)


def tiny(channels, size):
    return VisionTransformer(channels, size, patch_size=8, embed_dim=24, depth=2, num_heads=2)


def rows_of(count=24, seed=0):
    generator = np.random.default_rng(seed)
    return [
        {"subject_id": f"s{i:02d}", "patient_id": f"p{i // 2}", "logits": generator.normal(size=3).tolist(),
         "target": np.eye(3)[i // 2 % 3].tolist()}
        for i in range(count)
    ]  # fmt: skip


def built(kind="classes", **settings):
    module = LabelClassifier(encoder=tiny, **settings)
    module.build(SPEC._replace(target={"kind": kind}))
    return module


@pytest.mark.parametrize("kind", ["classes", "labels", "ordinal"])
def test_the_loss_equals_a_slow_one(kind):
    logits, weight = torch.randn(5, 3), torch.tensor([1.0, 2, 5])
    known = KNOWN.clone()
    known[1] = False
    total = count = 0.0
    for i in (0, 2, 3, 4):
        grade = int(TARGET[i].argmax())
        if kind == "classes":
            total += float(weight[grade] * F.cross_entropy(logits[i], torch.tensor(grade)))
            count += float(weight[grade])
            continue
        for k in range(3):
            wanted = k <= grade if kind == "ordinal" else k == grade
            loss = -math.log(torch.sigmoid(logits[i, k] if wanted else -logits[i, k]))
            factor = float(weight[grade]) if kind == "ordinal" else float(weight[k]) if wanted else 1.0
            total += factor * loss
            count += factor if kind == "ordinal" else 1.0
    assert target_loss(logits, TARGET, known, kind, weight).item() == pytest.approx(total / count, rel=1e-5)
    nothing = target_loss(logits.requires_grad_(), TARGET, torch.zeros_like(known), kind)
    assert nothing == 0
    assert nothing.requires_grad


@pytest.mark.ddp
@pytest.mark.parametrize("kind", ["classes", "labels", "ordinal", "regression"])
def test_two_ranks_equal_one(rank_pool, kind):
    logits, known = torch.randn(5, 3), KNOWN.clone()
    known[3] = False
    tensors = {"logits": logits, "target": TARGET, "known": known}
    loss, projected = partial(target_loss, kind=kind, weight=torch.tensor([1.0, 2, 5])), "logits"
    if kind == "regression":
        tensors = {"pred": logits, "target": torch.randn(5, 3), "known": known}
        loss, projected = squared_errors, "pred"
    parts = [{name: value[cut] for name, value in tensors.items()} for cut in (slice(5), slice(2), slice(2, 5))]
    arguments = [(loss, part, [projected], torch.eye(3)) for part in parts]
    value, gradient = loss_and_gradient(*arguments[0])
    for rank_value, rank_gradient in rank_pool.run(loss_and_gradient, arguments[1:]):
        assert torch.allclose(rank_value, value, rtol=1e-6)
        assert torch.allclose(rank_gradient, gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.ddp
def test_crops_of_two_ranks_teach_what_those_of_one_do(rank_pool):
    """Each crop is compared by itself, and ranks have equally many: the mean of their gradients is the whole's."""
    tensors = {"logits": torch.randn(4, 2, 3, 3, 3), "target": torch.randint(0, 2, (4, 2, 3, 3, 3)).float()}
    parts = [{name: value[cut] for name, value in tensors.items()} for cut in (slice(4), slice(2), slice(2, 4))]
    arguments = [(RegionDiceBCE(), part, ["logits"], torch.eye(3)) for part in parts]
    value, gradient = loss_and_gradient(*arguments[0])
    results = rank_pool.run(loss_and_gradient, arguments[1:])
    assert torch.allclose((results[0][0] + results[1][0]) / 2, value, rtol=1e-6)
    for _, rank_gradient in results:
        assert torch.allclose(rank_gradient, gradient, rtol=1e-5, atol=1e-6)


def scores_of_rank(kind, rows):
    """Score the rows of all ranks, as the end of a test does."""
    if kind == "segmentation":
        module = built()
        module.rows = rows
        return summarise(module.take_rows())
    module = built() if kind == "classes" else ImageRegression(encoder=tiny)
    if kind == "regression":
        module.build(SPEC._replace(target={"kind": "regression"}))
    module.rows = rows
    gathered = module.take_rows()
    module._trainer = type("T", (), {"is_global_zero": False, "fast_dev_run": False})()
    return module.metrics(gathered) | module.test_metrics(gathered)


@pytest.mark.ddp
@pytest.mark.parametrize("kind", ["classes", "regression", "segmentation"])
def test_scores_of_two_ranks_are_those_of_one(rank_pool, kind):
    rows = rows_of()
    if kind == "segmentation":
        rows = [{"subject_id": row["subject_id"], "dice_a": row["logits"][0], "empty_a": "both"} for row in rows]
    alone = scores_of_rank(kind, rows)
    for part in rank_pool.run(scores_of_rank, [(kind, rows[::2]), (kind, rows[1::2])]):
        assert part == pytest.approx(alone, nan_ok=True) if kind != "segmentation" else part == alone


def test_balanced_classes_weigh_alike():
    target = torch.eye(2)[[0, 0, 0, 1]]
    known = torch.ones(4, 2, dtype=torch.bool)
    weight = class_weights(target, known, "classes")
    assert (target * weight).sum(0).tolist() == [2, 2]
    assert class_weights(target, known, "labels").tolist() == pytest.approx([1 / 3, 3])


def test_probabilities_of_grades_sum_to_one_and_follow_their_order():
    logits = torch.tensor([[9.0, 2, -1], [0.0, -3, 4]])  # the second contradicts itself: high without mid
    shares = probabilities(logits, "ordinal")
    assert shares.sum(1).tolist() == pytest.approx([1, 1])
    assert (shares >= 0).all()
    s = torch.sigmoid(torch.tensor([2.0, -1.0]))
    assert shares[0].tolist() == pytest.approx([1 - float(s[0]), float(s[0] - s[1]), float(s[1])])
    assert at_least(TARGET[:2]).tolist() == [[1, 0, 0], [1, 1, 1]]


def test_a_frozen_encoder_stays_as_it_is_and_the_head_learns():
    module = built(freeze_encoder=True)
    module.train()
    assert not module.network.encoder.training
    assert not isinstance(module.network.encoder.norm, nn.Identity)
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert trained == {"network.norm.weight", "network.norm.bias", "network.head.weight", "network.head.bias"}
    assert module.new_channels == "refuse"
    loss = target_loss(module(torch.randn(5, 1, 16, 16, 16)), TARGET, KNOWN, "classes")
    loss.backward()
    assert module.network.head.weight.grad.abs().sum() > 0


def test_a_patient_is_scored_once_where_that_is_wanted():
    rows = rows_of()
    by_patient = built(aggregate="patient").metrics(rows)
    merged = [{**rows[i], "logits": np.mean([rows[i]["logits"], rows[i + 1]["logits"]], 0).tolist()}
              for i in range(0, 24, 2)]  # fmt: skip
    assert by_patient == pytest.approx(built().metrics(merged))
    rows[1] = {**rows[1], "target": [0.0, 0.0, 1.0]}
    with pytest.raises(UserError, match="different targets"):
        built(aggregate="patient").metrics(rows)


def test_cases_without_a_known_class_are_not_scored():
    rows = rows_of()
    unknown = {"subject_id": "x", "patient_id": "x", "logits": [9.0, 0, 0], "target": [math.nan] * 3}
    module = built()
    assert module.metrics([*rows, unknown]) == pytest.approx(module.metrics(rows))
    assert math.isnan(module.metrics([unknown])["auroc"])
    assert module.line(unknown)["target"] == ""
    assert module.line(unknown)["predicted"] == "low"
    assert module.line(rows[2])["target"] == "mid"


def test_a_target_of_numbers_is_no_class():
    with pytest.raises(UserError, match="TASK=regression"):
        built("regression")


def test_a_dense_linear_layer_segments_on_any_grid():
    network = DenseLinear(tiny(1, (16, 16, 16)), 2)
    assert network(torch.zeros(2, 1, 16, 16, 16)).shape == (2, 2, 16, 16, 16)
    with pytest.raises(ValueError, match="grid"):
        DenseLinear(nn.Linear(2, 2), 2)
