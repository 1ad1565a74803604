import pytest
import torch

from common.maskers.bert import BertMasker
from common.randomness import KeyedGenerator


def words(lengths, width):
    """One text whose words have these lengths, the class token before them and padding behind."""
    starts = [True] + [index == 0 for length in lengths for index in range(length)]
    pad = width - len(starts)
    maskable = [False] + [True] * (len(starts) - 1) + [False] * pad
    return torch.tensor([starts + [True] * pad]), torch.tensor([maskable])


def keys(count):
    return KeyedGenerator(torch.arange(count) * 7919 + 3)


@pytest.mark.parametrize(("tokens", "budget"), [(1, 1), (3, 1), (10, 2), (20, 3), (31, 5)])
def test_budget_of_single_tokens(tokens, budget):
    starts, maskable = words([1] * tokens, 40)
    for unit in ("word", "token"):
        hidden = BertMasker(unit=unit)(starts.expand(50, -1), maskable.expand(50, -1), keys(50))
        assert hidden.sum(1).tolist() == [budget] * 50
        assert not (hidden & ~maskable).any()


def test_words_stay_whole_and_within_the_budget():
    lengths = [3, 1, 2, 5, 1, 1, 4, 3]
    starts, maskable = words(lengths, 24)
    hidden = BertMasker(0.3)(starts.expand(200, -1), maskable.expand(200, -1), keys(200))
    place, counts = 1, hidden.sum(1)
    for length in lengths:
        inside = hidden[:, place : place + length].sum(1)
        assert set(inside.tolist()) <= {0, length}
        place += length
    assert counts.max() == 6
    assert counts.float().mean() > 5.5
    assert hidden.any(0)[maskable[0]].all(), "every word has its turn"


def test_a_long_word_is_taken_where_nothing_fits():
    starts, maskable = words([4], 6)
    assert BertMasker()(starts, maskable, keys(1)).tolist() == [[False, True, True, True, True, False]]


def test_nothing_to_hide():
    starts, maskable = words([], 4)
    assert not BertMasker()(starts, maskable, keys(1)).any()
    starts, maskable = words([1, 1], 4)
    assert not BertMasker(0.0)(starts, maskable, keys(1)).any()


def test_what_hidden_tokens_become():
    ids = torch.full((400, 30), 17)
    hidden = torch.ones_like(ids, dtype=torch.bool)
    hidden[:, 0] = False
    seen = BertMasker().corrupt(ids, hidden, 3, 1000, keys(400))
    assert (seen[:, 0] == 17).all()
    inner = seen[:, 1:]
    assert (inner == 3).double().mean().item() == pytest.approx(0.8, abs=0.015)
    assert (inner == 17).double().mean().item() == pytest.approx(0.1, abs=0.01)
    assert inner.max() < 1000


def test_rows_hang_on_their_keys_alone():
    starts, maskable = words([2, 1, 3, 1, 1], 12)
    whole = BertMasker(0.4)(starts.expand(6, -1), maskable.expand(6, -1), KeyedGenerator(torch.arange(6)))
    part = BertMasker(0.4)(starts.expand(2, -1), maskable.expand(2, -1), KeyedGenerator(torch.arange(4, 6)))
    assert torch.equal(whole[4:], part)


def test_refusals():
    for settings in ({"ratio": 2.0}, {"unit": "letter"}, {"replaced": (0.9, 0.2)}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            BertMasker(**settings)
