"""Contrast between two views of each sample, with every other sample of the batch as a negative."""

import torch
import torch.nn.functional as F
from torch import Tensor

from common.distributed import all_gather_cat, all_reduce_sum, feature_shard, world_size


def similarities(a: Tensor, b: Tensor) -> Tensor:
    """Return the cosine ``(B, B)`` of every row of ``a`` with every row of ``b``, both ``(B, D)``; float32 or float64.

    Raises:
        ValueError: the views are not two matrices of one shape.
    """
    if a.ndim != 2 or a.shape != b.shape:
        raise ValueError(f"The two views must be matrices of one shape, got {tuple(a.shape)} and {tuple(b.shape)}.")
    dtype = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    return F.normalize(a.to(dtype), dim=1) @ F.normalize(b.to(dtype), dim=1).T


def shards_features(rows: int, features: int) -> bool:
    """Whether exchanging features moves fewer values than gathering rows: ``2 b D + B^2 < W b D``."""
    world = world_size()
    return 2 * rows * features + (world * rows) ** 2 < world * rows * features


def sharded_similarities(a: Tensor, b: Tensor) -> Tensor:
    """Return :func:`similarities` ``(B, B)`` of the rows of all ranks, of which each multiplies some features.

    Args:
        a: ``(b, D)``, this rank's rows.
        b: ``(b, D)``, likewise.
    """
    dtype = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    shard_a, shard_b = (feature_shard(F.normalize(x.to(dtype), dim=1)) for x in (a, b))
    return all_reduce_sum(shard_a @ shard_b.T)


def symmetric_info_nce(a: Tensor, b: Tensor, temperature: float, sync: bool = True) -> Tensor:
    """Symmetric InfoNCE (van den Oord et al. 2018; both directions as in CLIP, Radford et al. 2021).

    Rows are L2-normalised; with ``s_ij = a_i . b_j / temperature`` it is the mean of the cross-entropies of the rows of
    ``s`` and of its columns, the diagonal being right. Rows of all ranks are joined with their gradient, so that every
    rank holds the loss of the joined batch: gathered, or where there are more features than that pays for, multiplied
    by the rank that holds the features.

    Args:
        a: ``(B, D)``, one view of each sample.
        b: ``(B, D)``, the other view, in the same order.
        temperature: Above 0.
        sync: Whether rows of the other ranks, which must hold equally many, are negatives too.

    Returns:
        A scalar in float32 (float64 if an input is); 0 with a graph for a single sample, log B where all rows are
        equal.

    Raises:
        ValueError: shapes differ, or the temperature is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"`temperature` must be positive, got {temperature}.")
    with torch.autocast(a.device.type, enabled=False):
        if sync and shards_features(len(a), a.shape[1]):
            logits = sharded_similarities(a, b) / temperature
        else:
            if sync:
                a, b = all_gather_cat(a), all_gather_cat(b)
            logits = similarities(a, b) / temperature
        target = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


@torch.no_grad()
def retrieval_accuracy(a: Tensor, b: Tensor) -> Tensor:
    """Return the share of rows of ``a`` ``(B, D)`` whose nearest row of ``b`` by cosine is their own (top-1)."""
    nearest = similarities(a, b).argmax(1)
    return (nearest == torch.arange(len(a), device=a.device)).float().mean()
