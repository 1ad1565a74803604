"""Relations between the samples of a batch, before and after masking (masked relation modeling, Eqs. 8 to 13).

Letters: B samples of all ranks, b samples of this rank, d width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from common.distributed import all_gather_cat, all_reduce_sum, rank
from common.runtime.precision import at_least_float32

_EPS = 1e-8


def _unit_rows(x: Tensor, present: Tensor | None = None, center: bool = False, sync: bool = False) -> Tensor:
    """Return rows ``(b, d)`` as unit vectors, of all ranks with ``sync``; absent ones leave the centre."""
    x = at_least_float32(x)
    x = all_gather_cat(x) if sync else x
    if center:
        weight = torch.ones_like(x[:, :1]) if present is None else present[:, None].to(x.dtype)
        x = x - (x * weight).sum(0) / weight.sum().clamp(min=1)
    return x / x.norm(dim=1, keepdim=True).clamp(min=_EPS)


def sample_relations(a: Tensor, b: Tensor) -> Tensor:
    """Return the cosine of every pair of rows of ``(A, d)`` and ``(B, d)``, ``(A, B)``, in float32 (float64 stays)."""
    with torch.autocast(a.device.type, enabled=False):
        return _unit_rows(a) @ _unit_rows(b).T


def relation_matching(
    image: Tensor,
    genome: Tensor | None,
    image_masked: Tensor,
    genome_masked: Tensor | None,
    present: Tensor | None = None,
    center: bool = False,
    stop_gradient: bool = False,
    sync: bool = True,
) -> dict[str, Tensor]:
    """Compare relations between samples with and without masking (Eqs. 10 and 12).

    The vectors of all ranks are gathered with gradients; a rank relates its own samples to all, and the sums are
    joined, so that every rank holds the loss of the joined batch. Ranks must hold equally many samples.

    Args:
        image: ``(b, d)``, pooled features of the intact pass.
        genome: ``(b, d)``; None without genetics: self then has the factor 1 / B^2 and cross is 0.
        image_masked: ``(b, d)``, of the masked pass.
        genome_masked: ``(b, d)``, or None.
        present: bool ``(b,)``, whether a sample has genetics; one without is left out of every relation of the genome.
            None: all have.
        center: Whether each kind of vector loses its batch mean first, an ablation.
        stop_gradient: Whether the relations of the intact pass carry no gradient, an ablation.
        sync: Whether samples of all ranks are related.

    Returns:
        Scalars ``self`` and ``cross``, float32 (float64 stays).

    Raises:
        ValueError: shapes differ, or only one of the genome's arguments is None.
    """
    given = [x for x in (image, genome, image_masked, genome_masked) if x is not None]
    if len(given) == 3 or any(x.shape != image.shape for x in given) or image.ndim != 2:
        shapes = ", ".join(str(tuple(x.shape)) for x in given)
        raise ValueError(f"Two or four arguments of one shape (B, d) are needed, got {shapes}.")
    with torch.autocast(image.device.type, enabled=False):
        z, masked = (_unit_rows(x, None, center, sync) for x in (image, image_masked))
        mine = slice(rank() * len(image), (rank() + 1) * len(image)) if sync else slice(None)
        reduce = all_reduce_sum if sync else _unchanged

        def change(intact: Sequence[Tensor], hidden: Sequence[Tensor]) -> Tensor:
            """Return the changes of this rank's rows of relations, ``(b, B)``."""
            before, after = (rows[mine] @ others.T for rows, others in (intact, hidden))
            return ((before.detach() if stop_gradient else before) - after).square()

        own = change((z, z), (masked, masked)).sum() / len(z) ** 2
        if genome is None or genome_masked is None:
            return {"self": reduce(own), "cross": own.new_zeros(())}
        everywhere = present
        if present is not None and sync:
            everywhere = all_gather_cat(present.to(torch.uint8)).bool()
        g, g_masked = (_unit_rows(x, everywhere, center, sync) for x in (genome, genome_masked))
        among = change((g, g), (g_masked, g_masked))
        between = change((z, g), (masked, g_masked))
        if everywhere is None:
            everywhere = torch.ones(len(z), dtype=torch.bool, device=z.device)
        pairs = everywhere[mine, None] & everywhere
        count = everywhere.sum() ** 2
        # One modality alone has the factor of one alone.
        modalities = 1 + (count > 0).to(own.dtype)
        mean_of_pairs = [x.masked_fill(~pairs, 0).sum() / count.clamp(min=1) for x in (among, between)]
        joined = reduce(torch.stack([(own + mean_of_pairs[0]) / modalities, mean_of_pairs[1]]))
        return {"self": joined[0], "cross": joined[1]}


def _unchanged(x: Tensor) -> Tensor:
    return x
