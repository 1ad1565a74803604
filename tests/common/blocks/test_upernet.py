import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.blocks.upernet import FeaturePyramid, SingleValueBatchNorm, UPerNet
from common.blocks.vit import VisionTransformer
from common.optim import param_groups


def encoder(depth=4, size=(32, 32), patch=8, **more):
    return VisionTransformer(3, size, patch, 16, depth, 2, class_token=True, **more)


def network(**more):
    return UPerNet(encoder(**more), 1, hidden_size=8, auxiliary_channels=6)


def test_feature_maps_are_in_image_order():
    """Without blocks, the feature at a place is the embedding of the patch there; the image is square on purpose."""
    net = network()
    net.encoder.blocks = nn.ModuleList([nn.Identity() for _ in range(4)])
    nn.init.zeros_(net.encoder.pos_embed)
    image = torch.randn(2, 3, 32, 32)
    embedding = net.encoder.patch_embed
    weight = embedding.proj.weight.reshape(16, 3, 8, 8)
    expected = F.conv2d(image, weight, embedding.proj.bias, stride=8)
    for features in net.feature_maps(image):
        assert torch.allclose(features, expected, atol=1e-5)


def test_feature_maps_follow_a_wide_image():
    net = network(size=(16, 32))
    assert [x.shape for x in net.feature_maps(torch.randn(1, 3, 16, 32))] == [(1, 16, 2, 4)] * 4
    assert net.eval()(torch.randn(1, 3, 16, 32))[0].shape == (1, 2, 16, 32)


@pytest.mark.parametrize(
    ("depth", "taps"), [(12, [4, 6, 8, 12]), (24, [8, 12, 16, 24]), (6, [2, 3, 4, 6]), (4, [1, 2, 3, 4])]
)
def test_features_come_from_the_papers_blocks(depth, taps):
    net = network(depth=depth).eval()
    assert net.taps == taps
    image = torch.randn(1, 3, 32, 32)
    hidden = net.encoder.encode_image(image, taps).hidden
    for features, tokens in zip(net.feature_maps(image), hidden, strict=True):
        assert torch.equal(features.flatten(2).mT, tokens[:, 1:])


def test_gray_stands_for_all_channels():
    net = network().eval()
    gray = torch.randn(2, 1, 32, 32)
    assert torch.equal(net(gray)[0], net(gray.repeat(1, 3, 1, 1))[0])


def test_the_neck_rescales_and_keeps_places():
    """With up-sampling that repeats each value, every level is the map itself at another scale."""
    neck = FeaturePyramid(2).eval()
    for module in neck.modules():
        if isinstance(module, nn.ConvTranspose2d):
            nn.init.zeros_(module.bias)
            module.weight.data = torch.eye(2)[:, :, None, None].repeat(1, 1, 2, 2)
    maps = [torch.randn(1, 2, 4, 6) for _ in range(4)]
    levels = neck(maps)
    assert [x.shape[2:] for x in levels] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    repeated = [
        x.repeat_interleave(scale, 2).repeat_interleave(scale, 3) for x, scale in zip(maps, (4, 2), strict=False)
    ]
    assert torch.allclose(levels[0], F.gelu(repeated[0]), atol=1e-4)  # batch norm's epsilon
    assert torch.equal(levels[1], repeated[1])
    assert torch.equal(levels[2], maps[2])
    assert torch.equal(levels[3], F.max_pool2d(maps[3], 2))


def test_training_adds_the_auxiliary_logits():
    net = network()
    image = torch.randn(2, 1, 32, 32)
    assert [x.shape for x in net.train()(image)] == [(2, 2, 32, 32)] * 2
    main = net.eval()(image)
    assert [x.shape for x in main] == [(2, 2, 32, 32)]
    assert main[0].dtype == torch.float32
    levels = net.neck(net.feature_maps(image))
    net.train()
    changed = [x + 1 if index == 2 else x for index, x in enumerate(levels)]
    same = [x if index == 2 else x + 1 for index, x in enumerate(levels)]
    net.auxiliary_head.classifier[0].p = 0.0
    assert torch.equal(net.auxiliary_head(levels), net.auxiliary_head(same))
    assert not torch.equal(net.auxiliary_head(levels), net.auxiliary_head(changed))


def test_every_weight_is_trained():
    net = network()
    sum(x.square().sum() for x in net(torch.randn(2, 1, 32, 32))).backward()
    assert [name for name, p in net.named_parameters() if p.grad is None] == []
    assert isinstance(net.encoder.norm, nn.Identity)


def test_fixed_positions_are_trained_too():
    net = UPerNet(encoder(pos_embed="sincos"), 1, hidden_size=8)
    assert net.encoder.pos_embed.requires_grad


def test_only_the_encoder_learns_more_slowly():
    wrapped = nn.Module()
    wrapped.network = network(depth=12)
    scales = {id(p): g["lr_scale"] for g in param_groups(wrapped, 0.65) for p in g["params"]}
    by_name = {name: scales[id(p)] for name, p in wrapped.network.named_parameters()}
    assert by_name["encoder.patch_embed.proj.weight"] == pytest.approx(0.65**13)
    assert by_name["encoder.blocks.11.attn.qkv.weight"] == pytest.approx(0.65)
    assert {value for name, value in by_name.items() if not name.startswith("encoder.")} == {1.0}


def test_a_batch_of_one_trains():
    net = network(size=(16, 16))  # the smallest grid: the last level has one value per channel as well
    outputs = net(torch.randn(1, 1, 16, 16))
    sum(x.square().sum() for x in outputs).backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


def test_batch_norm_is_the_usual_one_for_more_than_one_value():
    ours, usual = SingleValueBatchNorm(3), nn.BatchNorm2d(3)
    for x in (torch.randn(2, 3, 1, 1), torch.randn(1, 3, 1, 2)):
        assert torch.equal(ours(x), usual(x))
    assert torch.equal(ours.running_mean, usual.running_mean)
    single = torch.randn(1, 3, 1, 1)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        usual(single)
    before = ours.running_var.clone()
    result = ours(single)
    assert torch.equal(ours.running_var, before)
    assert torch.equal(result, ours.eval()(single))
    assert isinstance(nn.SyncBatchNorm.convert_sync_batchnorm(ours), nn.SyncBatchNorm)


def test_a_single_row_of_patches_is_refused():
    with pytest.raises(ValueError, match=r"two each way, got \(1, 4\)"):
        network(size=(8, 32))
