from functools import partial

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.types import InputSpec
from experiments.umd.encoder import UMDEncoder
from experiments.umd.tasks import AnswerTask, FigureTask, RetrievalTask, answer_head, best_ranks, split_logits
from experiments.umd.towers import TowerConfig

TINY = {
    "patch_size": 8, "vision": TowerConfig(16, 1, 2), "text": TowerConfig(16, 1, 2),
    "max_positions": 20, "dim": 16, "fusion_depth": 2, "fusion_heads": 2, "dropout": 0.0,
}  # fmt: skip
VOCABULARY = {"size": 40, "length": 12, "fingerprint": "x", "pad_id": 0}


class Stub:
    """What a task asks its trainer for."""

    datamodule = type("Data", (), {"most_frequent": staticmethod(lambda: {"": "yes", "open": "a", "closed": "yes"})})()


def make(kind, classes=("a", "no", "yes"), **settings):
    task = kind(
        encoder=partial(UMDEncoder, **TINY),
        **settings,
    )
    size = {"channels": ("red", "green", "blue"), "image_size": (32, 32), "vocabulary": VOCABULARY}
    task.build(InputSpec(**size, classes=tuple(classes)))
    return task


def batch_of(count=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 40, (count, 7), generator=generator)
    mask = (torch.arange(7) < torch.randint(3, 8, (count, 1), generator=generator)).long()
    return {
        "image": torch.randn(count, 3, 32, 32, generator=generator),
        "image_key": torch.arange(count),
        "input_ids": ids * mask,
        "attention_mask": mask,
        "label": torch.arange(count) % 3,
        "answers": [[("a", "no", "yes")[i % 3]] for i in range(count)],
        "kind": ["open" if i % 3 == 0 else "closed" for i in range(count)],
        "text": [f"question {i}" for i in range(count)],
        "subject_id": [str(i) for i in range(count)],
        "patient_id": [str(i) for i in range(count)],
    }


def test_ranks_of_the_specification():
    """R7: image x text."""
    scores = torch.tensor([[0.9, 0.1, 0.3], [0.8, 0.2, 0.1], [0.2, 0.6, 0.5]])
    keys = torch.arange(3)
    by_image, by_text = best_ranks(scores, keys), best_ranks(scores.T, keys)
    assert [float((by_image < k).float().mean()) for k in (1, 2)] == pytest.approx([1 / 3, 1])
    assert [float((by_text < k).float().mean()) for k in (1, 2)] == pytest.approx([2 / 3, 1])
    ties = torch.zeros(3, 3)
    assert best_ranks(ties, keys).tolist() == [0, 1, 2], "the lower index comes first"
    assert best_ranks(ties, torch.tensor([5, 5, 6])).tolist() == [0, 0, 2], "any caption of the image is right"


def test_answer_loss_of_the_specification(monkeypatch):
    """R8: mean times classes; a sample without a class counts nowhere."""
    task, batch = make(AnswerTask), batch_of(2)
    batch["label"] = torch.tensor([1, -1])
    logits = torch.tensor([[0.0, 1, -1], [5.0, 5, 5]])
    monkeypatch.setattr(task.network, "forward", lambda *a: (logits, torch.zeros(2, 16), torch.zeros(2, 16)))
    total, count = task.loss(batch)
    assert total.item() == pytest.approx(1.3196706, abs=1e-6)
    assert count.item() == 1


def test_answers_begin_alike():
    task = make(AnswerTask, classes=[str(i) for i in range(50)]).eval()
    batch = batch_of()
    begin = task.network(batch["image"], batch["input_ids"], batch["attention_mask"])[0].sigmoid()
    assert begin.mean().item() == pytest.approx(1 / 50, rel=0.3)


def test_contributions_of_a_linear_head_add_up():
    head, text, image = nn.Linear(8, 3), torch.randn(5, 4), torch.randn(5, 4)
    of_text, of_image = split_logits(head, text, image, "linear_split")
    assert torch.allclose(of_text + of_image, head(torch.cat([text, image], dim=1)), atol=1e-6)
    zero_text, _ = split_logits(head, text, image, "zero_other")
    assert torch.allclose(zero_text, of_text + head.bias / 2, atol=1e-6)
    deep = answer_head(4, 3)
    nn.init.normal_(deep[3].weight)
    upstream, _ = split_logits(deep, text, image, "upstream")
    assert torch.allclose(upstream, F.linear(text, deep[3].weight[:, :4], deep[3].bias / 2), atol=1e-6)


@pytest.mark.parametrize("kind", [AnswerTask, FigureTask])
def test_contributions_are_noted_in_training_alone(kind):
    task, batch = make(kind).train(), batch_of()
    task.loss(batch)
    task.loss(batch)
    image, text = task.contributions.take().tolist()
    assert 0 < image < 8
    assert 0 < text < 8
    task.eval().loss(batch)
    assert task.contributions.take() is None
    assert all(p.grad is None for p in task.parameters()), "nothing has gone backwards"


def test_every_parameter_is_used():
    for kind in (AnswerTask, FigureTask, RetrievalTask):
        task, batch = make(kind).train(), batch_of()
        batch |= {"candidate_ids": batch["input_ids"][:, None].expand(-1, 3, -1),
                  "candidate_mask": batch["attention_mask"][:, None].expand(-1, 3, -1)}  # fmt: skip
        total, _ = task.loss(batch)
        total.backward()
        assert not [name for name, p in task.named_parameters() if p.grad is None]


def test_answers_are_scored():
    task, batch = make(AnswerTask).eval(), batch_of(6)
    task._trainer = Stub()
    batch["answers"][0] = ["something else"]
    batch["label"][0] = -1
    rows = task.score(batch)
    metrics = task.metrics(rows)
    assert metrics["accuracy"] == pytest.approx(sum(row["right"] for row in rows) / 6)
    assert rows[0]["right"] == 0
    assert metrics["unseen"] == pytest.approx(1 / 6)
    assert metrics["accuracy_frequent_closed"] == 0.5
    assert {"accuracy_open", "accuracy_closed", "loss"} <= metrics.keys()
    maps = task.attention_map(batch)
    assert maps.shape == (6, 4, 4)
    assert torch.allclose(maps.sum((1, 2)), torch.ones(6), atol=1e-5)
    best = task.predict_step(batch, 0)
    assert [len(row["answers"]) for row in best] == [3] * 6
    assert best[0]["answers"][0]["score"] >= best[0]["answers"][1]["score"]


def test_figures_are_scored_over_the_classes_that_occur():
    task = make(FigureTask)
    rows = [
        {"label": 0, "logits": [2.0, 0, 0]}, {"label": 0, "logits": [0.0, 2, 0]}, {"label": 1, "logits": [0.0, 3, 0]},
        {"label": -1, "logits": [0.0, 0, 1]},
    ]  # fmt: skip
    metrics = task.metrics(rows)
    assert metrics["accuracy"] == 0.5
    assert metrics["sensitivity"] == pytest.approx((0.5 + 1) / 2)
    assert metrics["specificity"] == pytest.approx((1 + 0.5) / 2)
    assert metrics["auroc"] == pytest.approx(1.0)


def test_pool_scores_are_exact():
    """Features kept before the fusion give the scores that computing every pair anew gives."""
    task, batch = make(RetrievalTask).eval(), batch_of(5)
    nn.init.normal_(task.network.head.weight)
    assert task.score(batch) == []
    with torch.no_grad():
        kept = task.pool_scores(range(5))
        for text in range(5):
            ids, mask = (batch[name][text : text + 1].expand(5, -1) for name in ("input_ids", "attention_mask"))
            anew = task.network(batch["image"], ids, mask)[0][:, 0]
            assert torch.allclose(kept[text], anew, atol=1e-5)
    task.trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    rows = task.take_rows()
    metrics = task.metrics(rows)
    assert metrics["pool"] == 5
    assert metrics["t2i_recall_at_5"] == metrics["i2t_recall_at_10"] == 1
    assert task.take_rows() == []


@pytest.mark.parametrize(("precision", "dtype"), [("32-true", torch.float32), ("bf16-mixed", torch.bfloat16)])
def test_the_pool_is_fused_in_the_precision_of_the_run(precision, dtype):
    task, seen = make(RetrievalTask).eval(), []
    task.trainer = pl.Trainer(accelerator="cpu", precision=precision, logger=False, enable_checkpointing=False)
    task.score(batch_of(5))
    task.network.head.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    assert len(task.take_rows()) == 5
    assert set(seen) == {dtype}


def test_unknown_split_of_the_head():
    with pytest.raises(ValueError, match="split_head"):
        make(AnswerTask, split_head="half")
