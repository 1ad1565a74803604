"""What the features of a frozen encoder say of labels: nearest neighbours, logistic regression, attention pooling.

Letters: S cases, N tokens, E features per token, K columns of labels, Q queries. Labels are 1, 0 or NaN (unknown); each
column is a question of its own, so that classes, grades (reached or not) and findings are scored alike.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from common.metrics import weighted_auroc
from common.randomness import numpy_generator, stable_hash

Array = NDArray[np.float64]

#: What is tried on validation patients, the same for every encoder.
NEIGHBOURS = (5, 10, 20, 50)
PENALTIES = tuple(float(penalty) for penalty in np.logspace(-6, 6, 13))
LEARNING_RATES = (1e-2, 1e-3, 1e-4)
_TEMPERATURE = 0.07
_EPOCHS, _BATCH, _QUERIES = 100, 64, 4


class Features(NamedTuple):
    """The encoded cases of one split.

    Attributes:
        pooled: ``(S, E)``, mean over the tokens of patches.
        tokens: ``(S, N, E)``, half precision; on disk where it is a memory map.
        labels: ``(S, K)``.
        names: Of the cases.
        patients: Whose each is.
    """

    pooled: Array
    tokens: NDArray[np.float16]
    labels: Array
    names: list[str]
    patients: list[str]


class Choice(NamedTuple):
    """What was chosen on validation patients.

    Attributes:
        setting: The chosen value.
        score: Its validation score.
        tried: Every value and its score.
        predict: Scores cases, ``(S, K)``.
    """

    setting: float
    score: float
    tried: dict[float, float]
    predict: Callable[[Features], Array]

    @property
    def at_edge(self) -> bool:
        """Whether the best value is the first or last that was tried, so that a better one may lie beyond."""
        return len(self.tried) > 1 and self.setting in (min(self.tried), max(self.tried))


def mean_auroc(scores: Array, labels: Array, counts: NDArray[np.int64] | None = None) -> Array:
    """Return the mean AUROC over the columns in which both values occur; NaN where there is none.

    Args:
        scores: ``(S, K)``.
        labels: ``(S, K)``; cases of unknown label do not count in that column.
        counts: ``(draws, S)``, how often each case counts; None counts each once.

    Returns:
        ``(draws,)``.
    """
    counts = np.ones((1, len(labels)), dtype=np.int64) if counts is None else counts
    columns = []
    for score, label in zip(scores.T, labels.T, strict=True):
        known = ~np.isnan(label)
        if len(np.unique(label[known])) == 2:
            columns.append(weighted_auroc(score[known], label[known], counts[:, known]))
    return np.mean(columns, axis=0) if columns else np.full(len(counts), np.nan)


def neighbour_scores(
    bank: Array, labels: Array, queries: Array, k: int, temperature: float = _TEMPERATURE, centre: bool = True
) -> Array:
    """Return the share of the k nearest cases' weight that has each label, by cosine (as DINO's ``eval_knn.py``).

    Args:
        bank: ``(S, E)`` features of training cases.
        labels: ``(S, K)`` of these; unknown ones have no say.
        queries: ``(R, E)``.
        k: Neighbours.
        temperature: A neighbour of similarity s weighs exp(s / temperature).
        centre: Whether the mean of the bank is subtracted first, as features of ViTs all point one way.

    Returns:
        ``(R, K)``; one half where no neighbour's label is known.
    """
    shift = bank.mean(0) if centre else 0.0
    unit = [rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
            for rows in (bank - shift, queries - shift)]  # fmt: skip
    similarity = unit[1] @ unit[0].T
    nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    weight = np.exp((np.take_along_axis(similarity, nearest, 1) - 1) / temperature)[:, :, None]
    found = labels[nearest]
    known = ~np.isnan(found)
    total = (weight * known).sum(1)
    share = (weight * np.where(known, found, 0)).sum(1)
    return np.where(total > 0, share / np.where(total > 0, total, 1), 0.5)


def logistic_scores(train: Features, penalty: float) -> Callable[[Features], Array]:
    """Fit one logistic regression per column to standardised features, and return what scores cases.

    Args:
        train: Training cases.
        penalty: Weight of the squared norm.
    """
    scaler = StandardScaler().fit(train.pooled)
    standardised = scaler.transform(train.pooled)
    models: list[LogisticRegression | None] = []
    for label in train.labels.T:
        known = ~np.isnan(label)
        if len(np.unique(label[known])) < 2:
            models.append(None)
            continue
        with warnings.catch_warnings():
            # Under a weak penalty separable classes have no best weights: validation judges where it stopped.
            warnings.simplefilter("ignore", ConvergenceWarning)
            model = LogisticRegression(C=1 / penalty, max_iter=1000).fit(standardised[known], label[known])
        models.append(model)

    def score(cases: Features) -> Array:
        values = scaler.transform(cases.pooled)
        columns = [np.full(len(values), 0.5) if model is None else model.decision_function(values) for model in models]
        return np.stack(columns, axis=1)

    return score


def attention_pool(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Return, for each query ``(Q, E)``, the mean of values ``(B, N, E)`` weighted by softmax(q k / sqrt(E))."""
    weight = torch.einsum("qe,bne->bqn", queries, keys) / math.sqrt(queries.shape[-1])
    return weight.softmax(-1) @ values


class AttentiveHead(nn.Module):
    """Learned queries over frozen tokens, their means joined, batch norm, one linear layer (arXiv 2506.10178).

    Args:
        features: E.
        columns: K.
        queries: Q.
    """

    def __init__(self, features: int, columns: int, queries: int = _QUERIES) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.empty(queries, features).normal_(std=0.02))
        self.norm = nn.BatchNorm1d(queries * features)
        self.linear = nn.Linear(queries * features, columns)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits ``(B, K)`` of tokens ``(B, N, E)``."""
        return self.linear(self.norm(attention_pool(self.queries, tokens, tokens).flatten(1)))


def attentive_scores(train: Features, learning_rate: float, seed: int = 0) -> Callable[[Features], Array]:
    """Train an attentive head with AdamW for 100 epochs, and return what scores cases.

    Args:
        train: Training cases.
        learning_rate: Of AdamW.
        seed: Of initial queries and order.
    """
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    with torch.random.fork_rng():
        torch.manual_seed(stable_hash("attentive head", seed))
        head = AttentiveHead(train.tokens.shape[2], train.labels.shape[1]).to(device)
    orders = numpy_generator("attentive order", seed)
    optimizer = torch.optim.AdamW(head.parameters(), learning_rate)
    labels = torch.from_numpy(train.labels).float()
    size = min(_BATCH, len(labels))
    for _ in range(_EPOCHS):
        order = orders.permutation(len(labels))
        for start in range(0, len(order) - size + 1, size):
            rows = order[start : start + size]
            target = labels[rows].to(device)
            known = ~target.isnan()
            tokens = torch.from_numpy(train.tokens[rows]).to(device).float()
            loss = F.binary_cross_entropy_with_logits(
                head(tokens), target.nan_to_num(), weight=known.float(), reduction="sum"
            ) / known.sum().clamp(min=1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    head.eval()

    @torch.no_grad()
    def score(cases: Features) -> Array:
        parts = [head(torch.from_numpy(np.array(cases.tokens[start : start + _BATCH])).to(device).float())
                 for start in range(0, len(cases.tokens), _BATCH)]  # fmt: skip
        return torch.cat(parts).double().cpu().numpy()

    return score


def _nearest(train: Features, k: float) -> Callable[[Features], Array]:
    count = max(1, min(int(k), len(train.pooled) // 2))
    return lambda cases: neighbour_scores(train.pooled, train.labels, cases.pooled, count)


#: How features are scored: the values that are tried, and what fits one.
SCORES: dict[str, tuple[Sequence[float], Callable[[Features, float], Callable[[Features], Array]]]] = {
    "attentive": (LEARNING_RATES, attentive_scores),
    "linear": (PENALTIES, logistic_scores),
    "knn": (NEIGHBOURS, _nearest),
}


def choose(score: str, train: Features, val: Features) -> Choice:
    """Fit every setting of a score to training cases and choose one by the mean AUROC of validation cases.

    Of equal ones the first counts. No test case is seen.
    """
    settings, fit = SCORES[score]
    fitted = {setting: fit(train, setting) for setting in settings}
    tried = {setting: float(mean_auroc(predict(val), val.labels)[0]) for setting, predict in fitted.items()}
    best = max(tried, key=lambda setting: -math.inf if math.isnan(tried[setting]) else tried[setting])
    return Choice(best, tried[best], tried, fitted[best])
