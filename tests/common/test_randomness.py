import pytest
import torch

from common.randomness import KeyedGenerator, numpy_generator, seed_step, stable_hash, uniform


def test_stable_hash_is_the_same_everywhere():
    # A literal: another machine, process or Python version must give it too.
    assert stable_hash("mask", 3407, 2, "BraTS-GLI-00001-000", 1) == 3766310712164264511
    assert stable_hash(1, 23) != stable_hash(12, 3)
    assert 0 <= stable_hash("x") < 2**63


def test_a_row_depends_on_its_key_alone():
    keys = torch.tensor([11, 22, 33])
    whole = KeyedGenerator(keys).rand((3, 5, 7))
    alone = KeyedGenerator(keys[1:2]).rand((1, 5, 7))
    assert torch.equal(whole[1:2], alone)


def test_successive_draws_differ_and_repeat():
    first, second = KeyedGenerator(torch.tensor([5])), KeyedGenerator(torch.tensor([5]))
    a, b = first.rand((1, 100)), first.rand((1, 100))
    assert not torch.equal(a, b)
    assert torch.equal(second.rand((1, 100)), a)
    assert torch.equal(second.rand((1, 100)), b)


def test_numbers_are_uniform_and_uncorrelated_between_neighbouring_keys():
    x = KeyedGenerator(torch.arange(200)).rand((200, 500)).double()
    assert float(x.min()) >= 0
    assert float(x.max()) < 1
    assert abs(float(x.mean()) - 0.5) < 0.005
    assert abs(float(x.var()) - 1 / 12) < 0.001
    assert abs(float(torch.corrcoef(x[:2])[0, 1])) < 0.15
    counts = torch.histc(x.float(), bins=20, min=0, max=1)
    assert float((counts - counts.mean()).abs().max()) < 5 * float(counts.mean().sqrt())


def test_numbers_for_another_purpose_are_independent():
    keys = torch.arange(4000) * 7919 + 3
    draws = [KeyedGenerator(keys, *purpose).rand((4000, 20)) for purpose in ((), ("words",), ("pairs",))]
    both = torch.corrcoef(torch.cat(draws, dim=1).T) - torch.eye(60)
    assert both.abs().max() < 0.1
    assert torch.equal(draws[1], KeyedGenerator(keys, "words").rand((4000, 20)))


def test_uniform_takes_any_source():
    assert torch.equal(
        uniform((2, 3), torch.Generator().manual_seed(1)), torch.rand(2, 3, generator=torch.Generator().manual_seed(1))
    )
    assert uniform((2, 3)).shape == (2, 3)
    with pytest.raises(ValueError, match="one row per key"):
        uniform((3, 3), KeyedGenerator(torch.tensor([1, 2])))


def test_keys_must_be_whole_numbers():
    with pytest.raises(ValueError, match="1-D int64"):
        KeyedGenerator(torch.tensor([1.0]))


def test_dropout_is_tied_to_the_step():
    def draw(*parts: int) -> torch.Tensor:
        seed_step(*parts)
        return torch.nn.functional.dropout(torch.ones(1000))

    assert torch.equal(draw(1, 5, 0, 0), draw(1, 5, 0, 0))
    assert not torch.equal(draw(1, 5, 0, 0), draw(1, 6, 0, 0))
    assert not torch.equal(draw(1, 5, 0, 0), draw(1, 5, 0, 1))


def test_numpy_generator_has_no_history():
    assert numpy_generator("a", 1).random() == numpy_generator("a", 1).random()
