import pytest
import timm.models.vision_transformer as timm_vit
import torch
from transformers import ViTConfig, ViTModel

from common.blocks.vit import VisionTransformer
from common.weights.timm_keys import from_timm, hf_config, timm_config, to_hf, to_timm


def encoder(**settings):
    defaults = {"in_channels": 3, "image_size": (32, 48), "embed_dim": 24, "depth": 2, "num_heads": 3}
    options = {"qkv_bias": True, "class_token": True, "norm_eps": 1e-6, "pos_embed": "sincos"}
    return VisionTransformer(**{**defaults, **options, **settings}).eval()


@pytest.mark.parametrize("class_token", [True, False])
def test_timm_gives_the_same_tokens_and_the_weights_come_back(class_token):
    ours, image = encoder(class_token=class_token), torch.randn(2, 3, 32, 48)
    theirs = timm_vit.VisionTransformer(**timm_config(ours.config)).eval()
    theirs.load_state_dict(to_timm(ours.state_dict(), ours.config), strict=True)
    tokens = ours.forward_features(image)
    assert torch.allclose(theirs.forward_features(image), tokens, atol=1e-5)
    assert torch.allclose(theirs(image), tokens[:, ours.num_prefix_tokens :].mean(1), atol=1e-5)
    again = encoder(class_token=class_token)
    again.load_state_dict(from_timm(theirs.state_dict(), class_token), strict=True)
    assert torch.allclose(again.forward_features(image), tokens, atol=1e-6)


def test_transformers_gives_the_same_tokens():
    ours, image = encoder(image_size=(32, 32)), torch.randn(2, 3, 32, 32)
    theirs = ViTModel(ViTConfig(**hf_config(ours.config)), add_pooling_layer=False).eval()
    theirs.load_state_dict(to_hf(ours.state_dict(), ours.config), strict=True)
    assert torch.allclose(theirs(image).last_hidden_state, ours.forward_features(image), atol=1e-5)


def test_a_learned_position_of_the_class_token_moves_into_the_token():
    theirs = timm_vit.VisionTransformer(img_size=32, embed_dim=24, depth=1, num_heads=3, num_classes=0).eval()
    ours, image = encoder(image_size=(32, 32), depth=1, pos_embed="learnable"), torch.randn(1, 3, 32, 32)
    ours.load_state_dict(from_timm({"model": theirs.state_dict()}), strict=True)
    assert theirs.pos_embed[:, 0].abs().max() > 0
    assert torch.allclose(ours.forward_features(image), theirs.forward_features(image), atol=1e-5)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="not a ViT of timm"):
        from_timm({"conv1.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="epsilon"):
        timm_config(encoder(norm_eps=1e-5).config)
    with pytest.raises(ValueError, match="class token"):
        hf_config(encoder(class_token=False).config)
