"""Barlow Twins between two views' tokens (E-MIM Eqs. 4 and 8; Zbontar et al. 2021).

Letters: B batch, N token positions, D width.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from common.distributed import all_gather_cat, all_reduce_sum, all_reduce_together, rank, world_size
from common.runtime.precision import at_least_float32

_EPS_POSITION = 1e-6
_EPS_FEATURE = 1e-5


def _position_rows(x: Tensor, center: bool, sync: bool) -> Tensor:
    """Lay out ``(B, N, D)`` as ``(N, B D)``, optionally centred over batch and features of all ranks."""
    rows = x.transpose(0, 1).flatten(1)
    if not center:
        return rows
    total, count = rows.sum(1, keepdim=True), torch.full_like(rows[:, :1], rows.shape[1])
    if sync:
        total, count = all_reduce_sum(total), all_reduce_sum(count)
    return rows - total / count


def _standardised_columns(x: Tensor, sync: bool) -> tuple[Tensor, Tensor]:
    """Standardise the columns of ``(B N, D)`` with the biased std over all ranks; also return the number of rows."""
    rows = x.flatten(0, 1)
    count = torch.full((), rows.shape[0], dtype=rows.dtype, device=rows.device)
    if sync:
        count = all_reduce_sum(count)
    mean = rows.sum(0)
    mean = (all_reduce_sum(mean) if sync else mean) / count
    centred = rows - mean
    variance = centred.square().sum(0)
    variance = (all_reduce_sum(variance) if sync else variance) / count
    return centred / torch.sqrt(variance + _EPS_FEATURE), count


def cross_correlation(
    a: Tensor, b: Tensor, axis: Literal["position", "feature"] = "position", center: bool = False, sync: bool = True
) -> Tensor:
    """Correlate the tokens of two views.

    Args:
        a: ``(B, N, D)``, the rows of the result.
        b: ``(B, N, D)``, its columns.
        axis: ``"position"`` is Eq. 4: N x N over token positions, sums over batch **and** features, not centred.
            ``"feature"`` is the classical form: D x D, columns standardised over all tokens with the biased std.
        center: Subtract each position's mean first; only for ``"position"``.
        sync: Whether to sum over ranks; gradients pass through.

    Returns:
        ``(N, N)`` or ``(D, D)``, float32 (float64 stays).
    """
    with torch.autocast(a.device.type, enabled=False):
        a, b = at_least_float32(a), at_least_float32(b)
        if axis == "feature":
            (rows_a, count), (rows_b, _) = _standardised_columns(a, sync), _standardised_columns(b, sync)
            product = rows_a.T @ rows_b
            return (all_reduce_sum(product) if sync else product) / count
        rows_a, rows_b = _position_rows(a, center, sync), _position_rows(b, center, sync)
        sums = _position_sums(rows_a, rows_b)
        return _correlation_of_sums(*(all_reduce_together(*sums) if sync else sums))


def _position_sums(rows_a: Tensor, rows_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the correlation of positions is made of, summed over features: products and squared norms."""
    return rows_a @ rows_b.T, rows_a.square().sum(1), rows_b.square().sum(1)


def _correlation_of_sums(product: Tensor, norm_a: Tensor, norm_b: Tensor) -> Tensor:
    # The root of 0 has an infinite slope: a dead token must not turn every gradient into NaN.
    norm_a, norm_b = (norm.clamp(min=_EPS_POSITION**2).sqrt() for norm in (norm_a, norm_b))
    return product / (norm_a[:, None] * norm_b[None, :] + _EPS_POSITION)


def _combine(on: Tensor, off: Tensor, n: int, reduction: Literal["mean", "sum"], weight: float) -> Tensor:
    if reduction == "sum":
        return on + weight * off
    return on / n + weight * off / max(n * (n - 1), 1)


def correlation_to_identity(
    correlation: Tensor, reduction: Literal["mean", "sum"] = "mean", off_diagonal_weight: float = 1.0
) -> Tensor:
    """Squared distance of a correlation matrix from the identity (Eq. 8).

    Args:
        correlation: ``(..., n, n)``.
        reduction: ``"sum"`` is Eq. 8 as printed; ``"mean"`` divides the diagonal term by n and the off-diagonal term
            by n (n - 1), so that neither grows with the number of tokens.
        off_diagonal_weight: Factor of the off-diagonal term.

    Returns:
        A scalar, or ``(...)`` for leading dimensions.
    """
    diagonal = correlation.diagonal(dim1=-2, dim2=-1)
    on = (1 - diagonal).square().sum(-1)
    off = correlation.square().sum((-2, -1)) - diagonal.square().sum(-1)
    return _combine(on, off.clamp(min=0), correlation.shape[-1], reduction, off_diagonal_weight)


def _position_loss_by_gram(
    a: Tensor, b: Tensor, reduction: Literal["mean", "sum"], weight: float, center: bool, sync: bool
) -> Tensor:
    """Position form where N exceeds the features of all ranks: the N x N matrix is never formed.

    ``||A B^T||_F^2 = tr((A^T A)(B^T B))`` with the rows of A and B normalised.
    """
    rows_a, rows_b = _position_rows(a, center, sync), _position_rows(b, center, sync)
    if sync:
        rows_a, rows_b = all_gather_cat(rows_a, dim=1), all_gather_cat(rows_b, dim=1)
    # The epsilon of Eq. 4's denominator sits on the product of the norms; with it on each norm the two forms
    # agree to its square root of relative round-off only, so zero rows are guarded and others left exact.
    rows_a = rows_a / rows_a.norm(dim=1, keepdim=True).clamp(min=_EPS_POSITION)
    rows_b = rows_b / rows_b.norm(dim=1, keepdim=True).clamp(min=_EPS_POSITION)
    diagonal = (rows_a * rows_b).sum(1)
    own = slice(rank() * a.shape[0] * a.shape[2], (rank() + 1) * a.shape[0] * a.shape[2]) if sync else slice(None)
    square = ((rows_a[:, own].T @ rows_a) * (rows_b[:, own].T @ rows_b)).sum()
    square = all_reduce_sum(square) if sync else square
    off = (square - diagonal.square().sum()).clamp(min=0)
    return _combine((1 - diagonal).square().sum(), off, len(diagonal), reduction, weight)


def _gram_is_smaller(a: Tensor, sync: bool) -> bool:
    batch, positions, width = a.shape
    return positions > batch * width * (world_size() if sync else 1)


def position_pyramid(
    levels: Sequence[tuple[Tensor, Tensor]],
    reduction: Literal["mean", "sum"] = "mean",
    off_diagonal_weight: float = 1.0,
    beside: Sequence[Tensor] = (),
) -> tuple[list[Tensor], list[Tensor]] | None:
    """Return :func:`token_barlow_twins` by position, uncentred, of several levels over all ranks in one exchange.

    Args:
        levels: Tokens ``(B, N, D)`` of the full and of the masked input.
        reduction: See :func:`correlation_to_identity`.
        off_diagonal_weight: Factor of the off-diagonal term.
        beside: Further tensors to be summed over ranks in the same exchange.

    Returns:
        The loss of each level, and the sums of the further tensors; None where a level has fewer features than
        positions, for which another form is cheaper.
    """
    if any(_gram_is_smaller(a, sync=True) for a, _ in levels):
        return None
    with torch.autocast(levels[0][0].device.type, enabled=False):
        rows = [[_position_rows(at_least_float32(x), False, False) for x in level] for level in levels]
        sums = [part for a, b in rows for part in _position_sums(a, b)]
        joined = all_reduce_together(*sums, *(x.to(sums[0].dtype) for x in beside))
        losses = [
            correlation_to_identity(_correlation_of_sums(*joined[i : i + 3]), reduction, off_diagonal_weight)
            for i in range(0, len(sums), 3)
        ]
    return losses, joined[len(sums) :]


def token_barlow_twins(
    a: Tensor,
    b: Tensor,
    axis: Literal["position", "feature"] = "position",
    reduction: Literal["mean", "sum"] = "mean",
    off_diagonal_weight: float = 1.0,
    center: bool = False,
    sync: bool = True,
) -> Tensor:
    """Barlow Twins loss between the tokens of two views (E-MIM Eqs. 4 and 8).

    Args:
        a: ``(B, N, D)``, tokens of the full input.
        b: ``(B, N, D)``, tokens of the masked input.
        axis: ``"position"`` as the paper: correlations between token positions, summed over batch and features.
            ``"feature"``: correlations between features over all tokens, the quantity that effective rank measures.
        reduction: ``"sum"`` or ``"mean"``, see :func:`correlation_to_identity`.
        off_diagonal_weight: Factor of the off-diagonal term.
        center: Subtract each position's mean before correlating (position form only).
        sync: Whether the sums run over all ranks.

    Returns:
        A scalar in float32 (float64 stays).

    Raises:
        ValueError: the shapes differ, or ``axis`` or ``reduction`` is unknown.
    """
    if a.shape != b.shape or a.ndim != 3:
        raise ValueError(f"`a` and `b` must both be (B, N, D), got {tuple(a.shape)} and {tuple(b.shape)}.")
    if axis not in ("position", "feature") or reduction not in ("mean", "sum"):
        raise ValueError(
            f"`axis` must be 'position' or 'feature' and `reduction` 'mean' or 'sum', got {axis!r} and {reduction!r}."
        )
    if axis == "position" and _gram_is_smaller(a, sync):
        with torch.autocast(a.device.type, enabled=False):
            return _position_loss_by_gram(
                at_least_float32(a), at_least_float32(b), reduction, off_diagonal_weight, center, sync
            )
    correlation = cross_correlation(a, b, axis, center, sync)
    return correlation_to_identity(correlation, reduction, off_diagonal_weight)


def sample_barlow_twins(
    a: Tensor,
    b: Tensor,
    reduction: Literal["mean", "sum"] = "mean",
    off_diagonal_weight: float = 1.0,
    sync: bool = True,
) -> Tensor:
    """Position form with one matrix per sample, the losses averaged over samples (option of Eq. 4: sum over D only).

    Args:
        a: ``(B, N, D)``.
        b: ``(B, N, D)``.
        reduction: See :func:`correlation_to_identity`.
        off_diagonal_weight: Factor of the off-diagonal term.
        sync: Whether the mean runs over the samples of all ranks.
    """
    with torch.autocast(a.device.type, enabled=False):
        a, b = at_least_float32(a), at_least_float32(b)
        norms = a.norm(dim=2)[:, :, None] * b.norm(dim=2)[:, None, :]
        losses = correlation_to_identity(
            a @ b.transpose(1, 2) / (norms + _EPS_POSITION), reduction, off_diagonal_weight
        )
        total, count = losses.sum(), torch.full((), len(losses), dtype=losses.dtype, device=losses.device)
        if sync:
            total, count = all_reduce_sum(total), all_reduce_sum(count)
        return total / count
