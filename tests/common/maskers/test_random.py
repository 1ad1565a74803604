import pytest
import torch

from common.maskers.random import RandomMasker
from common.randomness import KeyedGenerator


@pytest.mark.parametrize(("ratio", "tokens", "visible"), [(0.75, 196, 49), (0.75, 8, 2), (0.6, 10, 4), (0.0, 5, 5)])
def test_counts(ratio, tokens, visible):
    output = RandomMasker(ratio)(3, tokens)
    assert output.mask.shape == (3, tokens)
    assert (~output.mask).sum(1).tolist() == [visible] * 3
    assert output.ids_keep.shape == (3, visible)


def test_indices_undo_each_other():
    output = RandomMasker(0.5)(4, 16, generator=torch.Generator().manual_seed(3))
    assert not output.mask.gather(1, output.ids_keep).any()
    order = torch.cat([output.ids_keep, torch.zeros(4, 8, dtype=torch.long)], 1)
    restored = order.gather(1, output.ids_restore)
    assert torch.equal(restored[~output.mask], torch.arange(16).expand(4, 16)[~output.mask])


def test_every_token_is_hidden_equally_often():
    mask = RandomMasker(0.75)(4000, 16, generator=torch.Generator().manual_seed(0)).mask
    share = mask.float().mean(0)
    assert float((share - 0.75).abs().max()) < 0.03


def test_rows_follow_their_keys():
    masker, keys = RandomMasker(0.5), torch.tensor([7, 8, 9])
    whole = masker(3, 20, generator=KeyedGenerator(keys)).mask
    assert torch.equal(whole[2:], masker(1, 20, generator=KeyedGenerator(keys[2:])).mask)


def test_bad_ratio():
    with pytest.raises(ValueError, match="mask_ratio"):
        RandomMasker(1.0)
    with pytest.raises(ValueError, match="leaves none"):
        RandomMasker(0.9)(1, 4)
