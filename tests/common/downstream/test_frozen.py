"""The cases of the specification, and scores against independent references."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from common.downstream.frozen import (
    PENALTIES,
    Features,
    attention_pool,
    attentive_scores,
    choose,
    logistic_scores,
    mean_auroc,
    neighbour_scores,
)


def features(labels, seed=0, planted=1.5, patients=None):
    """Encoded cases in which the first feature of one token shows the label."""
    generator = np.random.default_rng(seed)
    tokens = generator.normal(size=(len(labels), 5, 8)).astype(np.float16)
    tokens[:, 2, 0] += planted * 5 * np.nan_to_num(labels[:, 0])
    return Features(
        tokens.astype(float).mean(1), tokens, labels, [str(i) for i in range(len(labels))], patients or list("x")
    )


def labels_of(count, columns=1, seed=0):
    return np.random.default_rng(seed).integers(0, 2, (count, columns)).astype(float)


@pytest.mark.parametrize(("temperature", "expected"), [(0.07, 0.684787), (0.2, 0.586524), (1, 0.628965)])
def test_neighbours(temperature, expected):
    bank = np.array([[1.0, 0], [1, 1], [0, 1], [-1, 1]])
    labels, query = np.array([[0.0], [1], [1], [0]]), np.array([[1, 0.5]])
    found = neighbour_scores(bank, labels, query, 3, temperature, centre=False)
    assert found == pytest.approx(np.array([[expected]]), abs=1e-6)
    shifted = neighbour_scores(bank + 100, labels, query + 100, 3, temperature)
    assert shifted == pytest.approx(neighbour_scores(bank, labels, query, 3, temperature), abs=1e-9)


def test_neighbours_of_unknown_label_have_no_say():
    bank, query = np.eye(3), np.array([[1.0, 0.9, 0.1]])
    labels = np.array([[1.0, np.nan], [np.nan, np.nan], [0, 0]])
    assert neighbour_scores(bank, labels, query, 2, 1, centre=False).tolist() == [[1, 0.5]]


def test_attention_pooling():
    queries = torch.tensor([[1.0, 0.0]])
    keys = torch.tensor([[[1.0, 0], [0, 1], [1, 1]]])
    values = torch.tensor([[[1.0, 2], [3, 4], [5, 6]]])
    assert torch.allclose(attention_pool(queries, keys, values), torch.tensor([[[3.0, 4.0]]]), atol=1e-6)
    assert torch.allclose(
        attention_pool(queries, keys, torch.eye(3)[None]), torch.tensor([[[0.401112, 0.197776, 0.401112]]]), atol=1e-6
    )


def test_mean_auroc_takes_columns_with_both_values():
    generator = np.random.default_rng(0)
    labels, scores = labels_of(60, 3), generator.normal(size=(60, 3))
    labels[:5, 0] = np.nan
    labels[:, 2] = 1
    expected = [roc_auc_score(labels[5:, 0], scores[5:, 0]), roc_auc_score(labels[:, 1], scores[:, 1])]
    assert mean_auroc(scores, labels)[0] == pytest.approx(np.mean(expected))
    assert np.isnan(mean_auroc(scores, np.ones((60, 3)))[0])


@pytest.mark.parametrize("score", ["knn", "linear", "attentive"])
def test_a_planted_label_is_found_and_a_permuted_one_is_not(score, monkeypatch):
    monkeypatch.setattr("common.downstream.frozen._EPOCHS", 20)
    train, val, test = (features(labels_of(size, seed=seed), seed) for seed, size in enumerate((200, 100, 100)))
    choice = choose(score, train, val)
    assert mean_auroc(choice.predict(test), test.labels)[0] > 0.9
    assert choice.score == max(choice.tried.values())
    permuted = [part._replace(labels=labels_of(len(part.labels), seed=9 + i)) for i, part in enumerate((train, val))]
    found = mean_auroc(choose(score, *permuted).predict(test), labels_of(100, seed=20))[0]
    assert 0.3 < found < 0.7


def test_attention_finds_a_token_that_the_mean_hides(monkeypatch):
    monkeypatch.setattr("common.downstream.frozen._EPOCHS", 40)
    generator = np.random.default_rng(1)

    def case(label):
        """A token says the label, and the others take it back from the mean."""
        tokens = generator.normal(size=(6, 8)) / 4
        tokens[0, 1], tokens[0, 0] = 4, 3 * (2 * label - 1)
        tokens[1:, 0] -= tokens[:, 0].sum() / 5
        return tokens

    parts = []
    for seed, size in enumerate((300, 100)):
        labels = labels_of(size, seed=seed)
        tokens = np.stack([case(label) for label in labels[:, 0]]).astype(np.float16)
        parts.append(Features(tokens.astype(float).mean(1), tokens, labels, [], []))
    train, test = parts
    assert mean_auroc(attentive_scores(train, 1e-2)(test), test.labels)[0] > 0.95
    assert mean_auroc(logistic_scores(train, 1.0)(test), test.labels)[0] < 0.75


def test_the_same_head_every_time_and_no_global_random_number():
    train = features(labels_of(40))
    before = torch.get_rng_state()
    first, second = (attentive_scores(train, 1e-3)(train) for _ in range(2))
    assert (first == second).all()
    assert torch.equal(before, torch.get_rng_state())


def test_the_edge_of_a_grid_is_known():
    choice = choose("linear", features(labels_of(80)), features(labels_of(80, seed=1), 1))
    assert list(choice.tried) == list(PENALTIES)
    assert choice.at_edge == (choice.setting in (PENALTIES[0], PENALTIES[-1]))
