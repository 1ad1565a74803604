import pytest
import torch
from monai.networks.nets import ViT

from common.blocks.vit import VisionTransformer
from common.weights.monai_keys import from_monai, monai_config, to_monai


def small(**settings):
    defaults = {"in_channels": 2, "image_size": (32, 32, 16), "embed_dim": 24, "depth": 3, "num_heads": 3}
    return VisionTransformer(**{**defaults, **settings})


def test_vit_b_has_the_parameters_of_the_specification():
    with torch.device("meta"):
        model = VisionTransformer(4, (128, 128, 128))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(98.0, abs=0.05)
    assert model.grid_size == (8, 8, 8)
    assert model.num_features == 768


def test_loads_strictly_into_monai_and_back_with_equal_features():
    ours = small()
    theirs = ViT(**monai_config(ours.config))
    theirs.load_state_dict(to_monai(ours.state_dict(), ours.config), strict=True)
    x = torch.randn(2, 2, 32, 32, 16)
    tokens, hidden = ours(x)
    monai_tokens, monai_hidden = theirs(x)
    assert torch.allclose(tokens, monai_tokens, atol=1e-4)
    for a, b in zip(hidden, monai_hidden, strict=True):
        assert torch.allclose(a, b, atol=1e-4)
    again = small()
    again.load_state_dict(from_monai(theirs.state_dict()), strict=True)
    assert torch.equal(again.forward_features(x), ours.forward_features(x))


@pytest.mark.parametrize("key", ["classification_head.0.weight", "norm1.weight", "blocks.0.norm.weight", "blocks.x"])
def test_foreign_keys_are_refused(key):
    with pytest.raises(ValueError, match="not a weight of MONAI"):
        from_monai({key: torch.zeros(1)})


@pytest.mark.parametrize("settings", [{"pos_embed": "sincos"}, {"class_token": True}])
def test_encoders_that_monai_lacks_are_refused(settings):
    ours = small(**settings)
    with pytest.raises(ValueError, match=r"learnable positions|no place for the weight 'cls_token'"):
        to_monai(ours.state_dict(), ours.config)


def test_taps_are_the_residual_stream():
    model, x = small(), torch.randn(1, 2, 32, 32, 16)
    output = model.encode_image(x, taps=(0, 2, 3))
    tokens, hidden = model(x)
    assert len(output.hidden) == 3
    assert torch.equal(output.hidden[1], hidden[1])
    assert torch.equal(model.norm(output.hidden[2]), tokens)
    assert torch.equal(output.hidden[0], model.embed(model.patch_embed.patchify(x)))


def test_dropped_patches_are_never_seen():
    model = small()
    patches = model.patch_embed.patchify(torch.randn(1, 2, 32, 32, 16))
    keep = torch.tensor([[2, 0]])
    changed = patches.clone()
    changed[:, [1, 3]] = 7
    assert torch.equal(model.embed(patches, keep), model.embed(changed, keep))
    assert model.embed(patches, keep).shape == (1, 2, 24)
    assert torch.allclose(model.embed(patches, keep), model.embed(patches)[:, [2, 0]], atol=1e-6)


def test_images_and_fixed_positions():
    model = small(image_size=(32, 48), pos_embed="sincos")
    assert model.forward_features(torch.randn(1, 2, 32, 48)).shape == (1, 6, 24)
    assert not model.pos_embed.requires_grad
    assert model.no_weight_decay() == {"pos_embed"}


def test_recomputation_changes_nothing():
    plain, x = small(), torch.randn(1, 2, 32, 32, 16)
    frugal = small(grad_checkpointing=True)
    frugal.load_state_dict(plain.state_dict())
    for model in (plain, frugal):
        model.train()
        model.forward_features(x).square().sum().backward()
    for a, b in zip(plain.parameters(), frugal.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-6)


def test_bad_arguments():
    with pytest.raises(ValueError, match="num_heads"):
        small(num_heads=5)
    with pytest.raises(ValueError, match="pos_embed"):
        small(pos_embed="rope")
