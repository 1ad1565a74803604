import pytest
import torch

from common.blocks.decoder import LinearDecoder, MAEDecoder
from common.maskers.random import RandomMasker


def test_linear_decoder_is_one_projection():
    decoder = LinearDecoder(8, (2, 2, 2), 5)
    assert [name for name, _ in decoder.named_parameters()] == ["proj.weight", "proj.bias"]
    x = torch.randn(2, 8, 8)
    assert torch.allclose(decoder(x), x @ decoder.proj.weight.T + decoder.proj.bias, atol=1e-6)
    with pytest.raises(ValueError, match="MAEDecoder"):
        decoder(x, torch.zeros(2, 8, dtype=torch.long))


def test_mae_decoder_puts_tokens_back_in_their_places():
    """A wrong inverse permutation would mix positions up: swap two visible tokens together with their ids."""
    decoder = MAEDecoder(8, (2, 2, 2), 5, decoder_dim=16, depth=1, num_heads=2)
    mask = RandomMasker(0.5)(2, 8)
    tokens = torch.randn(2, 4, 8)
    expected = decoder(tokens, mask.ids_restore)
    swap = torch.tensor([1, 0, 2, 3])
    order = torch.cat([mask.ids_keep[:, swap], torch.argsort(mask.ids_restore, 1)[:, 4:]], 1)
    assert torch.allclose(decoder(tokens[:, swap], torch.argsort(order, 1)), expected, atol=1e-5)
    assert expected.shape == (2, 8, 5)


def test_mae_decoder_without_dropping_sees_tokens_in_order():
    decoder = MAEDecoder(8, (2, 2, 2), 5, decoder_dim=16, depth=1, num_heads=2)
    tokens = torch.randn(1, 8, 8)
    identity = torch.arange(8)[None]
    assert torch.allclose(decoder(tokens), decoder(tokens, identity), atol=1e-6)
