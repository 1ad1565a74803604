"""Masks by attention, by boxes and by a Dirichlet draw."""

import pytest
import torch

from common.maskers.attention import mask_by_attention
from common.maskers.boxes import box_mask
from common.maskers.dirichlet import DirichletMasker, dirichlet_counts
from common.randomness import KeyedGenerator

KEYS = torch.arange(6) * 7919


def chosen(mask):
    return set(mask.nonzero().flatten().tolist())


def test_attention_of_the_specification():
    attention = torch.tensor([[0.05, 0.30, 0.10, 0.02, 0.20, 0.08, 0.15, 0.10]])
    half = torch.tensor([0.5])
    assert chosen(mask_by_attention(attention, half)[0]) == {1, 2, 4, 6}
    assert chosen(mask_by_attention(attention, half, "low")[0]) == {0, 2, 3, 5}
    with pytest.raises(ValueError, match="'high' or 'low'"):
        mask_by_attention(attention, half, "hint")


@pytest.mark.parametrize("grid", [(8, 8), (4, 5, 6)])
def test_boxes_hide_exact_shares_in_blocks(grid):
    share = torch.tensor([0.0, 0.1, 0.3, 0.5, 0.7, 1.0])
    mask = box_mask(KeyedGenerator(KEYS, "blocks"), share, grid)
    positions = mask.shape[1]
    assert mask.sum(1).tolist() == [int(float(s) * positions + 1e-6) for s in share]
    alone = box_mask(KeyedGenerator(KEYS[2:3], "blocks"), share[2:3], grid)
    assert torch.equal(alone[0], mask[2]), "a sample's mask is its own, whatever the batch"
    # Neighbours of hidden positions are hidden far more often than chance has it.
    many = box_mask(KeyedGenerator(torch.arange(200), "blocks"), torch.full((200,), 0.3), grid).view(200, *grid)
    both = (many[:, 1:] & many[:, :-1]).float().mean() / many.float().mean()
    assert both > 0.5


def test_dirichlet_of_the_specification():
    p, available = torch.tensor([[0.5, 0.3, 0.2]]), torch.ones(1, 3, dtype=torch.bool)
    visible = torch.tensor([12])
    assert dirichlet_counts(p, visible, 8, available).tolist() == [[6, 4, 2]]
    assert dirichlet_counts(p, visible, 5, available).tolist() == [[5, 4, 3]]


def slow_counts(p, visible, positions, available):
    """One token at a time."""
    wanted = [float(x) * visible for x in p]
    counts = [int(w + 1e-9) for w in wanted]
    order = sorted((m for m in range(len(p)) if available[m]), key=lambda m: (counts[m] - wanted[m], m))
    for m in order[: visible - sum(counts)]:
        counts[m] += 1
    counts = [min(c, positions) for c in counts]
    while sum(counts) < visible:
        room = [m for m in range(len(p)) if available[m] and counts[m] < positions]
        counts[max(room, key=lambda m: (wanted[m] - counts[m], -m))] += 1
    return counts


def test_dirichlet_against_the_slow_form():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        available = torch.rand(4, 5, generator=generator) < 0.7
        available[:, 0] = True
        p = torch.rand(4, 5, generator=generator, dtype=torch.float64) * available
        p = p / p.sum(1, keepdim=True)
        visible = (available.sum(1) * 6 * 0.6).long().clamp(min=1)
        counts = dirichlet_counts(p, visible, 6, available)
        for row in range(4):
            assert counts[row].tolist() == slow_counts(p[row], int(visible[row]), 6, available[row].tolist())


def test_visible_tokens_come_from_acquired_modalities_alone():
    available = torch.ones(6, 4, dtype=torch.bool)
    available[1, 1:], available[2, 0] = False, False
    tokens = DirichletMasker(1 / 6)(KeyedGenerator(KEYS, "visible"), 36, available)
    assert (~tokens.mask).flatten(1).sum(1).tolist() == [24, 6, 18, 24, 24, 24]
    assert bool(tokens.mask[~available].all())
    assert torch.equal(tokens.real.sum(1), (~tokens.mask).flatten(1).sum(1))
    shown = torch.zeros(6, 144, dtype=torch.bool)
    for row in range(6):
        shown[row, tokens.keep[row][tokens.real[row]]] = True
    assert torch.equal(shown, ~tokens.mask.flatten(1))
    alone = DirichletMasker(1 / 6)(KeyedGenerator(KEYS[2:3], "visible"), 36, available[2:3])
    assert torch.equal(alone.mask[0], tokens.mask[2])
    with pytest.raises(ValueError, match="share"):
        DirichletMasker(0)
