"""Contrast between two views of each sample, with every other sample of the batch as a negative."""

import torch
import torch.nn.functional as F
from torch import Tensor

from common.distributed import all_gather_cat, all_gather_rows, all_reduce_sum, rank, world_size
from common.runtime.precision import at_least_float32


def _check(temperature: float | Tensor) -> None:
    if not isinstance(temperature, Tensor) and temperature <= 0:
        raise ValueError(f"`temperature` must be positive, got {temperature}.")


def similarities(a: Tensor, b: Tensor) -> Tensor:
    """Return the cosine ``(B, B)`` of every row of ``a`` with every row of ``b``, both ``(B, D)``; float32 or float64.

    Raises:
        ValueError: the views are not two matrices of one shape.
    """
    if a.ndim != 2 or a.shape != b.shape:
        raise ValueError(f"The two views must be matrices of one shape, got {tuple(a.shape)} and {tuple(b.shape)}.")
    dtype = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    return F.normalize(a.to(dtype), dim=1) @ F.normalize(b.to(dtype), dim=1).T


def symmetric_info_nce(a: Tensor, b: Tensor, temperature: float | Tensor, sync: bool = True) -> Tensor:
    """Symmetric InfoNCE (van den Oord et al. 2018; both directions as in CLIP, Radford et al. 2021).

    Rows are L2-normalised; with ``s_ij = a_i . b_j / temperature`` it is the mean of the cross-entropies of the rows of
    ``s`` and of its columns, the diagonal being right. Rows of all ranks are gathered with their gradient, so that
    every rank holds the loss of the joined batch.

    Args:
        a: ``(B, D)``, one view of each sample.
        b: ``(B, D)``, the other view, in the same order.
        temperature: Above 0; a tensor where it is learned.
        sync: Whether rows of the other ranks, which must hold equally many, are negatives too.

    Returns:
        A scalar in float32 (float64 if an input is); 0 with a graph for a single sample, log B where all rows are
        equal.

    Raises:
        ValueError: shapes differ, or the temperature is not positive.
    """
    _check(temperature)
    with torch.autocast(a.device.type, enabled=False):
        if sync:
            a, b = all_gather_cat(a), all_gather_cat(b)
        logits = similarities(a, b) / temperature
        target = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def nt_xent(a: Tensor, b: Tensor, temperature: float, sync: bool = True) -> Tensor:
    """Normalised temperature-scaled cross-entropy (SimCLR, Chen et al. 2020, Eq. 1).

    Each of the 2 B rows is to find its other view among the 2 B - 1 other rows, by cosine. Rows of all ranks are
    gathered with their gradient, so that every rank holds the loss of the joined batch.

    Args:
        a: ``(B, D)``, one view of each sample.
        b: ``(B, D)``, the other view, in the same order.
        temperature: Above 0.
        sync: Whether rows of the other ranks, which must hold equally many, are negatives too.

    Returns:
        A scalar in float32 (float64 if an input is); log(2 B - 1) where all rows are equal.

    Raises:
        ValueError: shapes differ, or the temperature is not positive.
    """
    _check(temperature)
    with torch.autocast(a.device.type, enabled=False):
        if sync:
            a, b = all_gather_cat(a), all_gather_cat(b)
        if a.shape != b.shape:
            raise ValueError(f"The two views must be of one shape, got {tuple(a.shape)} and {tuple(b.shape)}.")
        both = torch.cat([a, b])
        logits = similarities(both, both) / temperature
        logits = logits.masked_fill(torch.eye(len(both), dtype=torch.bool, device=both.device), -torch.inf)
        target = torch.arange(len(both), device=both.device).roll(len(a))
        return F.cross_entropy(logits, target)


def query_key_info_nce(query: Tensor, key: Tensor, temperature: float, sync: bool = True) -> Tensor:
    """Contrast of queries with keys that get no gradient (MoCo v3, Chen, Xie and He 2021, Algorithm 1).

    It is ``2 T`` times the cross-entropy of ``q k^T / T``, rows L2-normalised, the diagonal being right.

    Args:
        query: ``(B, D)``, of one view, by the student.
        key: ``(B, D)``, of the other view, by the teacher.
        temperature: T, above 0.
        sync: Whether keys of the other ranks, which must hold equally many, are negatives too.

    Returns:
        A scalar in float32 (float64 stays), that of the joined batch on every rank; 2 T log B where all rows are equal.

    Raises:
        ValueError: shapes differ, or the temperature is not positive.
    """
    _check(temperature)
    if query.ndim != 2 or query.shape != key.shape:
        raise ValueError(f"Queries and keys must be of one shape, got {tuple(query.shape)} and {tuple(key.shape)}.")
    with torch.autocast(query.device.type, enabled=False):
        query, key = F.normalize(at_least_float32(query), dim=1), F.normalize(at_least_float32(key.detach()), dim=1)
        keys, first = (all_gather_rows(key), rank() * len(query)) if sync else (key, 0)
        target = torch.arange(first, first + len(query), device=query.device)
        total = F.cross_entropy(query @ keys.T / temperature, target, reduction="sum")
        total = all_reduce_sum(total) if sync else total
        return 2 * temperature * total / len(keys)


def cosine_regression(query: Tensor, key: Tensor, sync: bool = True) -> Tensor:
    """Mean of 2 - 2 cos(query, key), the keys without a gradient (BYOL, Grill et al. 2020, Eq. 2).

    Args:
        query: ``(B, D)``, of one view, by the student.
        key: ``(B, D)``, of the other view, by the teacher.
        sync: Whether the mean runs over the samples of all ranks, which must hold equally many.
    """
    with torch.autocast(query.device.type, enabled=False):
        cosine = F.cosine_similarity(at_least_float32(query), at_least_float32(key.detach()), dim=1)
        total = (2 - 2 * cosine).sum()
        return all_reduce_sum(total) / (len(query) * world_size()) if sync else total / len(query)


@torch.no_grad()
def retrieval_accuracy(a: Tensor, b: Tensor) -> Tensor:
    """Return the share of rows of ``a`` ``(B, D)`` whose nearest row of ``b`` by cosine is their own (top-1)."""
    nearest = similarities(a, b).argmax(1)
    return (nearest == torch.arange(len(a), device=a.device)).float().mean()
