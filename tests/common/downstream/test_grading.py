import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge, RidgeCV

from common.downstream.grading import (
    GradeClassifier,
    RidgeNetwork,
    apply_thresholds,
    bootstrap_kappa,
    decode_ordinal,
    matched_thresholds,
    quadratic_kappa,
    severity,
)
from common.downstream.regression import ImageRegression, squared_errors
from common.errors import UserError
from common.types import InputSpec, TaskState

GRADES = [f"grade {i}" for i in range(5)]
SIZE = (("a",), (16, 16))


def test_kappa_by_hand():
    """Case 10 of the specification of masked relation modeling."""
    truth, pred = torch.tensor([0, 1, 2, 3, 4, 2, 0, 1]), torch.tensor([0, 2, 2, 3, 3, 2, 0, 0])
    assert quadratic_kappa(pred, truth, 5) == pytest.approx(0.8846153846, abs=1e-6)
    low, high = bootstrap_kappa(pred, truth)
    assert low < 0.8846 < high <= 1
    assert bootstrap_kappa(pred, truth) == (low, high)
    constant = torch.zeros(8, dtype=torch.long)
    assert bootstrap_kappa(constant, truth) == (0, 0)


def test_ordinal_logits_become_grades():
    logits = torch.tensor([[9.0, 9, -9, -9, -9], [-9.0] * 5, [9.0] * 5, [9.0, -1, -9, 9, -9]])
    assert decode_ordinal(logits).tolist() == [1, 0, 4, 1]
    assert severity(logits)[:3].tolist() == pytest.approx([1, -1, 4], abs=1e-3)


def test_thresholds_give_training_images_their_own_distribution():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(500, generator=generator)
    grades = torch.randint(0, 5, (500,), generator=generator).clamp(max=3)
    thresholds = matched_thresholds(scores, grades, 5)
    found = apply_thresholds(scores, thresholds)
    counts = torch.bincount(found, minlength=5) - torch.bincount(grades, minlength=5)
    assert counts.abs().max() <= 2
    order = scores.argsort()
    assert (found[order].diff() >= 0).all()


def classifier(targets, classes):
    module = GradeClassifier(targets=targets)
    module.state = TaskState(InputSpec(*SIZE, classes=tuple(classes)))
    module._trainer = SimpleNamespace(testing=True, datamodule=None)
    return module


def test_scores_of_grades():
    module = classifier("ordinal", GRADES)
    targets = [[float(k <= grade) for k in range(5)] for grade in (0, 1, 2, 4)]
    rows = [{"logits": [8 * (2 * t - 1) for t in target], "target": target} for target in targets]
    scores = module.metrics(rows) | module.test_metrics(rows)
    assert scores["kappa"] == pytest.approx(1)
    assert scores["accuracy"] == 1
    assert scores["kappa_low"] == scores["kappa_high"] == pytest.approx(1)
    assert module.monitor == ("val/kappa", "max")
    assert {"targets", "decision", "pretrained", "drop_path"} <= set(module.hparams)


def test_images_without_a_grade_are_left_out():
    module = classifier("ordinal", GRADES)
    unknown = {"subject_id": "u", "patient_id": "u", "logits": [9.0] * 5, "target": [float("nan")] * 5}
    targets = [[float(k <= grade) for k in range(5)] for grade in (0, 2)]
    rows = [{"logits": [8 * (2 * t - 1) for t in target], "target": target} for target in targets]
    assert module.metrics([*rows, unknown])["kappa"] == pytest.approx(1)
    assert math.isnan(module.metrics([unknown])["kappa"])
    assert module.test_metrics([unknown]) == {}
    assert "pred" not in module.line(unknown)


def test_a_line_has_the_grades_that_are_scored():
    module = classifier("ordinal", GRADES)
    row = {"subject_id": "s", "patient_id": "p", "logits": [9.0, 9, -1, -9, -9], "target": [1.0, 1, 1, 0, 0]}
    assert {name: module.line(row)[name] for name in ("pred", "target")} == {"pred": 1, "target": 2}
    module._thresholds = torch.tensor([0.1, 0.2, 0.3, 9.0])
    assert module.line(row)["pred"] == 3


class Pixels(torch.nn.Module):
    """An encoder whose only token is the image."""

    num_features = 6

    def forward_features(self, image):
        return image.flatten(1)[:, None]


def test_a_ridge_head_is_that_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(60, 1, 2, 3, generator=generator) * torch.arange(1, 4.0)
    target = (images.mean((1, 2, 3))[:, None] > torch.tensor([-9.0, 0.0, 0.5])).float()
    network = RidgeNetwork(Pixels(), 3)
    penalty = network.fit(
        [{"image": images[:32], "target": target[:32]}, {"image": images[32:], "target": target[32:]}]
    )
    features = images.flatten(1).double().numpy()
    scaled = (features - features.mean(0)) / features.std(0)
    expected = Ridge(penalty).fit(scaled, target.double().numpy()).predict(scaled)
    assert network(images).sigmoid().numpy() == pytest.approx(expected.clip(0, 1), abs=1e-5)
    assert penalty == RidgeCV(np.logspace(-1, 6, 29)).fit(scaled, target.numpy()).alpha_
    with pytest.raises(UserError, match="no training image"):
        network.fit([])


def test_a_ridge_head_is_not_trained():
    module = GradeClassifier(ridge=True)
    with pytest.raises(UserError, match="leave fit out"):
        module.on_fit_start()


def test_exclusive_classes_are_scored_by_patient():
    module = classifier("exclusive", ["II", "III", "IV"])
    assert module.monitor == ("val/auroc", "max")
    rows = [
        {"patient_id": "a", "logits": [3.0, 0, 0], "target": [1.0, 0, 0]},
        {"patient_id": "a", "logits": [0.0, 1, 0], "target": [1.0, 0, 0]},
        {"patient_id": "b", "logits": [0.0, 0, 2], "target": [0.0, 0, 1]},
        {"patient_id": "c", "logits": [0.0, 0, 2], "target": [float("nan")] * 3},
    ]
    scores = module.metrics(rows)
    assert scores["patients"] == 2
    assert scores["classes_left_out"] == 1
    assert scores["f1_micro"] == scores["f1_IV"] == scores["auroc"] == scores["average_precision"] == 1


def test_squared_errors_by_hand():
    pred, target = torch.tensor([[1.0, 2], [3, 4]]), torch.tensor([[0.0, 2], [1, 9]])
    known = torch.tensor([[True, True], [True, False]])
    assert squared_errors(pred, target, known).item() == pytest.approx((1 + 4) / 2 + 0)
    none = torch.zeros(2, 2, dtype=torch.bool)
    assert squared_errors(pred.requires_grad_(), target, none).item() == 0


def test_predicting_the_mean_scores_as_many_as_there_are_measurements():
    module = ImageRegression()
    module.build(InputSpec(*SIZE, classes=("age", "bmi")))
    values = torch.tensor([[50.0, 20], [60, 30], [70, float("nan")]])
    data = SimpleNamespace(training_targets=lambda: [tuple(row) for row in values.tolist()])
    module._trainer = SimpleNamespace(ckpt_path=None, datamodule=data)
    module.on_fit_start()
    assert module.network.target_mean.tolist() == [60, 25]
    assert module.network.target_std.tolist() == pytest.approx([66.667**0.5, 5], rel=1e-4)
    rows = [{"logits": [0.0, 0.0], "target": row} for row in values.tolist()]
    scores = module.metrics(rows)
    assert scores["mse"] == pytest.approx(2)
    assert scores["mse_age"] == pytest.approx(1)
    line = module.line({"subject_id": "s", "patient_id": "p", "logits": [1.0, 0.0], "target": [70.0, float("nan")]})
    assert line["predicted_age"] == pytest.approx(60 + 66.667**0.5, rel=1e-4)
    assert line["target_bmi"] == ""
