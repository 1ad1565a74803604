import pytest
import torch

from common.maskers.relation import mask_top_relations, removed_relations

ROW = torch.tensor([0.4, 0.3, 0.2, 0.1])[None, None, None]
TIES = torch.tensor([0.25, 0.1, 0.25, 0.4])[None, None, None]
UNIFORM = torch.full((1, 1, 1, 4), 0.25)


def kept(row, ratio, **settings):
    return (row * mask_top_relations(row, ratio, **settings)).flatten().tolist()


@pytest.mark.parametrize("rule", ["threshold", "rank"])
@pytest.mark.parametrize("real", [None, torch.ones(1, 4, dtype=torch.bool)])
@pytest.mark.parametrize(("ratio", "removed"), [(0, 0), (0.25, 1), (0.5, 2), (0.75, 3), (0.9, 3)])
def test_row_rule_by_hand(ratio, removed, rule, real):
    """Case 1 of the specification."""
    expected = [0.0] * removed + [0.4, 0.3, 0.2, 0.1][removed:]
    assert kept(ROW, ratio, tie_rule=rule, key_mask=real) == pytest.approx(expected)


@pytest.mark.parametrize("real", [None, torch.ones(1, 4, dtype=torch.bool)])
def test_ties_by_both_rules(real):
    assert kept(TIES, 0.5, key_mask=real) == pytest.approx([0, 0.1, 0, 0])
    assert kept(TIES, 0.5, key_mask=real, tie_rule="rank") == pytest.approx([0, 0.1, 0.25, 0])
    assert kept(UNIFORM, 0.5, key_mask=real) == [0, 0, 0, 0]
    assert kept(UNIFORM, 0.5, key_mask=real, tie_rule="rank") == [0, 0, 0.25, 0.25]


@pytest.mark.parametrize(
    ("keys", "table"),
    [
        (3, {0.25: 0, 0.5: 1, 0.75: 2}),
        (16, {0.25: 4, 0.5: 8, 0.75: 12}),
        (144, {0.5: 72, 0.75: 108, 0.9: 129}),
        (196, {0.5: 98, 0.75: 147, 0.9: 176}),
        (197, {0.1: 19, 0.25: 49, 0.5: 98, 0.75: 147, 0.9: 177}),
        (1, {0.75: 0}),
        (100, {0.29: 29, 0.57: 57}),
    ],
)
def test_floor_table(keys, table):
    scores = torch.randn(1, 2, 3, keys)
    for ratio, removed in table.items():
        assert removed_relations(ratio, keys) == removed
        for rule in ("threshold", "rank"):
            for real in (None, torch.ones(1, keys, dtype=torch.bool)):
                assert ((~mask_top_relations(scores, ratio, real, rule)).sum(-1) == removed).all()


@pytest.mark.parametrize("rule", ["threshold", "rank"])
def test_padded_keys_do_not_count_and_are_never_kept(rule):
    scores = torch.randn(3, 2, 5, 9)
    real = torch.tensor([[True] * 9, [True] * 4 + [False] * 5, [False] * 8 + [True]])
    keep = mask_top_relations(scores, 0.75, real, rule)
    assert not keep[~real[:, None, None].expand_as(keep)].any()
    assert torch.equal(keep[1, ..., :4], mask_top_relations(scores[1:2, ..., :4], 0.75, tie_rule=rule)[0])
    assert keep.sum(-1)[:, 0, 0].tolist() == [3, 1, 1]
    nothing = mask_top_relations(scores, 0.75, torch.zeros(3, 9, dtype=torch.bool), rule)
    assert not nothing.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("rule", ["threshold", "rank"])
def test_every_precision_is_sorted_as_it_is(dtype, rule):
    scores = torch.randn(2, 3, 7, 11).to(dtype)
    real = torch.arange(11).expand(2, 11) < torch.tensor([[11], [6]])
    for mask in (None, real):
        assert torch.equal(
            mask_top_relations(scores, 0.5, mask, rule), mask_top_relations(scores.double(), 0.5, mask, rule)
        )


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.75, 0.9])
def test_equals_a_slow_reference_row_by_row(ratio):
    scores = torch.randn(2, 3, 7, 11).round(decimals=1)
    for rule in ("threshold", "rank"):
        keep = mask_top_relations(scores, ratio, tie_rule=rule)
        k = int(ratio * 11)
        for row, result in zip(scores.reshape(-1, 11).tolist(), keep.reshape(-1, 11).tolist(), strict=True):
            order = sorted(range(11), key=lambda column: (-row[column], column))
            limit = row[order[k - 1]]
            gone = set(order[:k]) if rule == "rank" else {column for column in range(11) if row[column] >= limit}
            assert result == [column not in gone for column in range(11)]


def test_rows_and_heads_are_masked_each_by_itself():
    scores = torch.randn(2, 3, 4, 8)
    moved = scores.clone()
    moved[1, 2, 3] += 10 * torch.arange(8)
    changed = mask_top_relations(scores, 0.5) != mask_top_relations(moved, 0.5)
    changed[1, 2, 3] = False
    assert not changed.any()


@pytest.mark.parametrize("ratio", [1.0, -0.1])
def test_a_ratio_out_of_range_is_refused(ratio):
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        mask_top_relations(ROW, ratio)
    with pytest.raises(ValueError, match="tie_rule"):
        mask_top_relations(ROW, 0.5, tie_rule="first")
