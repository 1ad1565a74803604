import pytest
import torch

from common.maskers.words import WordMasker

IDS = torch.tensor([[2, 50, 60, 61, 70, 80, 81, 82, 90, 0]])
CONTINUATION = torch.isin(IDS, torch.tensor([61, 81, 82]))
MASKABLE = IDS > 3


def test_numbers_by_hand():
    """R3 of the specification: 0.5 is not masked, and a continuation follows its word."""
    draws = torch.tensor([[0.3, 0.7, 0.49, 0.5, 0.1, 0, 0, 0, 0, 0]])
    hidden = WordMasker(0.5)(~CONTINUATION, MASKABLE, draws=draws)
    assert IDS.masked_fill(hidden, 3)[0].tolist() == [2, 3, 60, 61, 3, 80, 81, 82, 3, 0]


@pytest.mark.parametrize(("mask_last", "expected"), [(False, [2, 50, 3, 61]), (True, [2, 50, 3, 3])])
def test_the_last_position(mask_last, expected):
    ids, draws = torch.tensor([[2, 50, 60, 61]]), torch.tensor([[0.9, 0.1, 0.0, 0.0]])
    hidden = WordMasker(0.5, mask_last=mask_last)(ids != 61, ids > 3, draws=draws)
    assert ids.masked_fill(hidden, 3)[0].tolist() == expected


def slow_reference(starts, maskable, draws, ratio):
    hidden = torch.zeros_like(starts)
    for row in range(len(starts)):
        word, decision = 0, False
        for i in range(starts.shape[1]):
            if not maskable[row, i]:
                continue
            if starts[row, i] or word == 0:
                decision, word = bool(draws[row, word] < ratio), word + 1
            hidden[row, i] = decision
    return hidden


def test_equals_a_loop_over_tokens():
    generator = torch.Generator().manual_seed(0)
    starts = torch.rand(40, 30, generator=generator) < 0.6
    maskable = torch.arange(30) < torch.randint(1, 30, (40, 1), generator=generator)
    maskable[:, 0] = False
    starts[:, 1] = True
    draws = torch.rand(40, 30, generator=generator)
    for ratio in (0.0, 0.15, 0.5, 1.0):
        assert torch.equal(
            WordMasker(ratio)(starts, maskable, draws=draws), slow_reference(starts, maskable, draws, ratio)
        )


def test_half_of_the_tokens_is_hidden_and_units_differ():
    starts = torch.rand(200, 60, generator=torch.Generator().manual_seed(1)) < 0.7
    maskable = torch.ones_like(starts)
    for unit in ("word", "token"):
        hidden = WordMasker(0.5, unit)(starts, maskable, torch.Generator().manual_seed(2))
        assert hidden.float().mean() == pytest.approx(0.5, abs=0.02)
    assert (hidden[:, 1:] != hidden[:, :-1])[~starts[:, 1:]].any(), "tokens of one word are drawn apart"


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="ratio"):
        WordMasker(1.5)
    with pytest.raises(ValueError, match="unit"):
        WordMasker(unit="sentence")
