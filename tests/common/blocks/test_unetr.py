import monai.networks.nets
import pytest
import torch

from common.blocks.unetr import UNETR
from common.blocks.vit import VisionTransformer
from common.weights.monai_keys import from_monai


def test_equals_monai_with_monais_skips():
    theirs = monai.networks.nets.UNETR(
        2, 3, (32, 32, 16), feature_size=4, hidden_size=24, mlp_dim=96, num_heads=3
    ).eval()
    encoder = VisionTransformer(2, (32, 32, 16), embed_dim=24, depth=12, num_heads=3)
    encoder.load_state_dict(from_monai(theirs.vit.state_dict()))
    ours = UNETR(encoder, 3, feature_size=4, skip_blocks=(4, 7, 10)).eval()
    rest = {key: value for key, value in theirs.state_dict().items() if not key.startswith("vit.")}
    assert not ours.load_state_dict(rest, strict=False).unexpected_keys
    x = torch.randn(1, 2, 32, 32, 16)
    assert torch.allclose(ours(x), theirs(x), atol=1e-4)
    papers = UNETR(encoder, 3, feature_size=4).eval()
    papers.load_state_dict(rest, strict=False)
    assert papers.skip_blocks == (3, 6, 9)
    assert not torch.allclose(papers(x), theirs(x), atol=1e-2)


def test_every_parameter_gets_a_gradient():
    """MONAI's own blocks hold parameters that nothing uses, which plain DDP refuses."""
    network = UNETR(VisionTransformer(1, (32, 32, 32), embed_dim=16, depth=4, num_heads=2), 2, feature_size=4)
    network(torch.randn(2, 1, 32, 32, 32)).square().mean().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []


def test_images_with_a_class_token():
    encoder = VisionTransformer(3, (32, 48), embed_dim=16, depth=4, num_heads=2, class_token=True)
    network = UNETR(encoder, 2, feature_size=4)
    out = network(torch.randn(2, 3, 32, 48))
    assert out.shape == (2, 2, 32, 48)
    out.square().mean().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []


def test_bad_encoders():
    with pytest.raises(ValueError, match="patches must be 16"):
        UNETR(VisionTransformer(1, (32, 32, 32), patch_size=8, embed_dim=16, depth=4, num_heads=2), 2)
    with pytest.raises(ValueError, match="three of 2 blocks"):
        UNETR(VisionTransformer(1, (32, 32, 32), embed_dim=16, depth=2, num_heads=2), 2)
