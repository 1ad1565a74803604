import itertools

import pytest
import torch

import common.maskers.hybrid
from common.maskers.hybrid import HybridMasker
from common.randomness import KeyedGenerator


def slow_reference(noise_m, noise_p, available, modal, position, patch, ratio, k):
    """Specification section 2.2 in loops over samples, modalities and positions."""
    batch, modalities = noise_m.shape
    n = noise_p.shape[1]
    mask = torch.zeros(batch, modalities, n, dtype=torch.bool)
    for b in range(batch):
        present = [m for m in range(modalities) if available[b, m]]
        mask[b, [m for m in range(modalities) if m not in present]] = True
        order = sorted(present, key=lambda m: float(noise_m[b, m]))
        single = len(present) == 1
        rest = order
        if modal and len(present) >= 2:
            mask[b, order[0]] = True
            rest = order[1:]
        taken = len(order) - len(rest)
        kb = min(k, len(rest) - 1) if patch and rest else 0
        r = ratio
        if r is None:
            r = (0.75 * len(present) - taken - kb) / max(len(present) - taken - kb, 1)
        if single and (modal or patch):
            r = 0.75
        positions = sorted(range(n), key=lambda i: float(noise_p[b, i]))
        hidden = round(min(max(r, 0), 1) * n) if position else 0
        for i in positions[:hidden]:
            mask[b, :, i] = True
        for j, i in enumerate(positions[hidden:]):
            for t in range(kb):
                mask[b, rest[(j * kb + t) % len(rest)], i] = True
    return mask


@pytest.mark.parametrize(("modal", "position", "patch"), list(itertools.product([True, False], repeat=3)))
@pytest.mark.parametrize(("ratio", "k"), [(None, 1), (0.4, 1), (0.25, 2)])
def test_equals_slow_reference(modal, position, patch, ratio, k):
    keys = torch.arange(6)
    available = torch.tensor(
        [[1, 1, 1, 1], [1, 0, 1, 1], [0, 1, 1, 0], [0, 0, 1, 0], [1, 1, 1, 1], [1, 1, 1, 0]]
    ).bool()
    masker = HybridMasker(modal, position, patch, ratio, None if k == 1 else k)
    mask = masker(6, (3, 3, 3), 4, available, KeyedGenerator(keys)).mask
    generator = KeyedGenerator(keys)
    noise = generator.rand((6, 4)), generator.rand((6, 27))
    assert torch.equal(mask, slow_reference(*noise, available, modal, position, patch, ratio, k))


def test_worked_example(monkeypatch):
    """R1: m = 2, positions {1, 3, 4, 6}, patch picks 0 to mod 0, 2 to mod 1, 5 to mod 3, 7 to mod 0."""
    noise = iter([
        torch.tensor([[0.2, 0.3, 0.1, 0.4]]),
        torch.tensor([[0.5, 0.1, 0.6, 0.2, 0.3, 0.7, 0.4, 0.8]]),
    ])  # fmt: skip
    monkeypatch.setattr(common.maskers.hybrid, "uniform", lambda *_: next(noise))
    mask = HybridMasker()(1, 8, 4).mask[0].int().tolist()
    assert mask == [
        [1, 1, 0, 1, 1, 0, 1, 1],
        [0, 1, 1, 1, 1, 0, 1, 0],
        [1, 1, 1, 1, 1, 1, 1, 1],
        [0, 1, 0, 1, 1, 1, 1, 0],
    ]


@pytest.mark.parametrize(
    ("modalities", "ratio", "k", "fraction"),
    [
        (4, 0.5, 1, 0.75),
        (4, 0.25, 1, 0.625),
        (4, 0.5, 2, 0.875),
        (3, 0.5, 1, 0.833333),
        (3, 0.25, 1, 0.75),
        (2, 0.5, 0, 0.75),
    ],
)
def test_fractions(modalities, ratio, k, fraction):
    """R2."""
    mask = HybridMasker(position_ratio=ratio, hidden_per_position=k)(5, 960, modalities).mask
    assert mask.float().mean((1, 2)).tolist() == pytest.approx([fraction] * 5, abs=1e-3)


@pytest.mark.parametrize("modalities", [1, 2, 3, 4, 5])
def test_default_hides_three_quarters_of_what_was_acquired(modalities):
    mask = HybridMasker()(4, (8, 8, 8), modalities).mask
    assert mask.float().mean((1, 2)).tolist() == pytest.approx([0.75] * 4, abs=2e-3)


def test_structure_of_any_draw():
    mask = HybridMasker(hidden_per_position=2)(50, 100, 4, generator=torch.Generator().manual_seed(1)).mask
    per_position = mask.sum(1)
    for sample, counts in zip(mask, per_position, strict=True):
        full_rows = sample.all(1).nonzero().flatten()
        assert len(full_rows) == 1
        assert set(counts.tolist()) <= {3, 4}
        partial = sample[:, counts == 3]
        shares = [int(partial[m].sum()) for m in range(4) if m != int(full_rows)]
        assert max(shares) - min(shares) <= 1


def test_absent_modalities_are_hidden_and_the_rest_keeps_its_share():
    available = torch.tensor([[True, True, True, True], [True, False, True, True], [False, False, True, False]])
    mask = HybridMasker()(3, 512, 4, available).mask
    assert mask[~available].all()
    for sample, present in zip(mask, available, strict=True):
        assert float(sample[present].float().mean()) == pytest.approx(0.75, abs=2e-3)


def test_position_alone_is_mae():
    output = HybridMasker(modal=False, patch=False)(3, 64, 4)
    assert torch.equal(output.mask[:, :1].expand_as(output.mask), output.mask)
    assert output.ids_keep.shape == (3, 16)
    assert not output.mask[:, 0].gather(1, output.ids_keep).any()
    assert torch.equal(output.ids_restore >= 16, output.mask[:, 0])


def test_all_off_hides_nothing():
    assert not HybridMasker(False, False, False)(2, 8, 4).mask.any()


def test_hiding_is_equally_likely_everywhere():
    """Fig. 2's premise: the chance of being hidden is the same for every (modality, position)."""
    share = HybridMasker()(6000, 8, 4, generator=torch.Generator().manual_seed(0)).mask.float().mean(0)
    assert float((share - 0.75).abs().max()) < 0.03


def test_switching_a_step_off_leaves_the_other_draws():
    keys = torch.arange(4)
    both = HybridMasker(patch=False, position_ratio=0.5)(4, 64, 3, generator=KeyedGenerator(keys)).mask
    alone = HybridMasker(False, True, False, position_ratio=0.5)(4, 64, 3, generator=KeyedGenerator(keys)).mask
    assert (both & alone).sum() == alone.sum()


def test_bad_arguments():
    with pytest.raises(ValueError, match="position_ratio"):
        HybridMasker(position_ratio=1.5)
    with pytest.raises(ValueError, match="at most 2"):
        HybridMasker(hidden_per_position=3)(1, 8, 4)
