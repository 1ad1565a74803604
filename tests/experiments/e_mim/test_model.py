import pytest
import torch

from common.blocks.decoder import LinearDecoder, MAEDecoder
from common.blocks.vit import VisionTransformer
from common.maskers.hybrid import HybridMasker
from common.types import MaskOutput
from experiments.e_mim.model import EMIM


def network(mask_fill="zero", decoder=LinearDecoder, **settings):
    encoder = VisionTransformer(3, (32, 32, 32), embed_dim=24, depth=2, num_heads=2)
    head = decoder(24, encoder.grid_size, encoder.patch_embed.proj.in_features, **settings)
    return EMIM(encoder, head, (1, 2), mask_fill)


@pytest.fixture
def image():
    return torch.rand(2, 3, 32, 32, 32)


@pytest.fixture
def mask():
    return HybridMasker()(2, (2, 2, 2), 3, generator=torch.Generator().manual_seed(0))


def test_patches_and_volumes_are_inverse(image):
    model = network()
    assert model.patches(image).shape == (2, 3, 8, 4096)
    assert torch.equal(model.volume(model.patches(image)), image)
    assert torch.equal(model.patches(image)[1, 2, 0].reshape(16, 16, 16), image[1, 2, :16, :16, :16])


def test_prediction_and_target_correspond(image, mask):
    """Upstream's decoder tokens are modality-major, its target position-major."""
    model = network()
    output = model(image, mask)
    assert torch.equal(output.target, model.patches(image))
    bias = torch.arange(3 * 4096, dtype=torch.float32)
    with torch.no_grad():
        model.decoder.proj.weight.zero_()
        model.decoder.proj.bias.copy_(bias)
    pred = model(image, mask).pred
    assert torch.equal(pred[0, 1, 5], bias[4096:8192])


def test_hidden_voxels_do_not_reach_the_prediction(image, mask):
    model = network()
    changed = image + 5 * model.volume(mask.mask[..., None].expand(-1, -1, -1, 4096).float())
    assert torch.equal(model(image, mask, "off").pred, model(changed, mask, "off").pred)
    assert not torch.equal(model(image, mask).clean[0], model(changed, mask).clean[0])


def test_filling_equals_zeroing_voxels(image, mask):
    model = network()
    hidden = model.volume(mask.mask[..., None].expand(-1, -1, -1, 4096).float()).bool()
    zeroed = model.encoder.encode_image(image.masked_fill(hidden, 0), (1, 2))
    for a, b in zip(model(image, mask).masked, zeroed.hidden, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_learned_fill_adds_one_embedding_per_hidden_modality(image, mask):
    model = network("learnable")
    flat = model.encoder.patch_embed.patchify(image)
    masked = flat.unflatten(2, (3, -1)).masked_fill(mask.mask.transpose(1, 2)[..., None], 0).flatten(2)
    expected = model.encoder.embed(masked)
    for b in range(2):
        for c in range(3):
            for i in range(8):
                if mask.mask[b, c, i]:
                    expected[b, i] = expected[b, i] + model.mask_embed[c]
    assert torch.allclose(model(image, mask).masked[0], model.encoder.encode(expected, (1,)).hidden[0], atol=1e-5)
    model(image, mask).pred.sum().backward()
    assert model.mask_embed.grad.abs().sum() > 0


def test_one_pass_for_both_branches_equals_two(image, mask):
    model = network()
    stacked, separate = model(image, mask, "train"), model(image, mask, "detach")
    for a, b in zip(stacked.clean + stacked.masked, separate.clean + separate.masked, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    assert torch.allclose(stacked.pred, separate.pred, atol=1e-5)
    assert stacked.clean[0].requires_grad
    assert not separate.clean[0].requires_grad
    assert model(image, mask, "off").clean == []


def test_dropped_positions_are_never_computed(image):
    model = network("drop", MAEDecoder, decoder_dim=16, depth=1, num_heads=2)
    mask = HybridMasker(modal=False, patch=False)(2, (2, 2, 2), 3)
    output = model(image, mask, "off")
    assert output.masked[0].shape == (2, 2, 24)
    assert output.pred.shape == (2, 3, 8, 4096)


def test_any_mask_can_score_an_encoder_that_drops(image, mask):
    """Partly visible positions are encoded with their hidden modalities at zero; nothing hidden leaks."""
    model = network("drop", MAEDecoder, decoder_dim=16, depth=1, num_heads=2)
    ragged = mask.mask.clone()
    ragged[0, :, :7] = True
    ragged = MaskOutput(ragged)
    hidden = ragged.mask[..., None].expand(-1, -1, -1, 4096).float()
    pred = model(image, ragged, "off").pred
    assert pred.shape == (2, 3, 8, 4096)
    assert torch.equal(pred, model(image + 5 * model.volume(hidden), ragged, "off").pred)


def test_taps_must_exist():
    encoder = VisionTransformer(1, (16, 16, 16), embed_dim=8, depth=2, num_heads=2)
    with pytest.raises(ValueError, match=r"`taps` must lie in 0..2, got \[3\]"):
        EMIM(encoder, LinearDecoder(8, (1, 1, 1), 4096), (3,))
