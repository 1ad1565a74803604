"""Networks of masked relation modeling, at toy size."""

from functools import partial

import pytest
import timm.models.vision_transformer as timm_vit
import torch

from common.blocks.vit import VisionTransformer
from common.maskers.random import RandomMasker
from common.weights.timm_keys import timm_config, to_timm
from experiments.mrm_genetics.model import (
    FusedDecoder,
    Genetics,
    GenomeEncoder,
    GenomeHeads,
    GenomeKeys,
    RelationConfig,
    RelationNetwork,
    SegmentTokenizer,
    Tokens,
    cut_segments,
)

SIZES = {"snp": 23, "pgs": 5}
SEGMENTS = {"snp": 4, "pgs": 2}
VIT = {"patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2, "qkv_bias": True, "pos_embed": "sincos",
       "class_token": True, "norm_eps": 1e-6}  # fmt: skip


def make(genome=True, **settings):
    torch.manual_seed(0)
    encoder = VisionTransformer(3, [32, 32], **VIT)
    genes = GenomeEncoder(SIZES, 16, 2, SEGMENTS, depth=3, dropout=0.0) if genome else None
    small = {"decoder_dim": 12, "depth": 2, "num_heads": 2}
    tokens = genes.tokens.num_tokens if genes else 0
    decoder = FusedDecoder(16, (4, 4), 1, tokens, "image", False, **small)
    other = FusedDecoder(16, (4, 4), 1, tokens, "genome", False, **small) if genome else None
    return RelationNetwork(encoder, genes, decoder, other, **settings)


def inputs(batch=3, present=None):
    return torch.randn(batch, 3, 32, 32), Genetics(torch.randn(batch, 28), present)


@pytest.mark.parametrize(
    ("features", "wanted", "expected"),
    [
        (7854, 64, (64, 123)),
        (481, 16, (16, 31)),
        (18574, 64, (64, 291)),
        (80, 16, (16, 5)),
        (3, 16, (3, 1)),
        (9, 6, (5, 2)),
    ],
)
def test_segments(features, wanted, expected):
    cut = cut_segments(features, wanted)
    assert (cut.tokens, cut.size) == expected
    assert cut.tokens * cut.size >= features > (cut.tokens - 1) * cut.size


def test_parameter_counts_are_those_of_the_specification():
    with torch.device("meta"):
        sizes = {"snp": 7854, "pgs": 481, "burden": 18574}
        genome = GenomeEncoder(sizes, 768, 12)
        image = FusedDecoder(768, (14, 14), 1, 144, "image", False)
        other = FusedDecoder(768, (14, 14), 1, 144, "genome", False, depth=2)
        heads = GenomeHeads(genome.tokens.cuts, 512)
        encoder = VisionTransformer(3, [224, 224], qkv_bias=True, pos_embed="sincos", class_token=True)

    def count(module):
        return sum(p.numel() for p in module.parameters())

    assert genome.tokens.num_tokens == 144
    assert count(genome.tokens) == 20_840_448 + 1_771_776 + 112_896
    assert count(genome) - count(genome.tokens) == 28_353_024
    assert count(heads) == 13_846_896
    places = 341 * 512 + 2 * 512
    assert count(image) + 512 * 768 + 768 == 26_007_808 + places
    assert count(other) == 6_699_520 + places
    assert sum(p.numel() for p in encoder.parameters() if p.requires_grad) == 85_647_360


def test_each_segment_has_a_layer_of_its_own():
    tokenizer = SegmentTokenizer(SIZES, SEGMENTS, 8, dropout=0.0)
    values = torch.randn(2, 28)
    tokens = tokenizer(values)
    assert tokens.shape == (2, 6, 8)
    for feature, token in ((0, 0), (5, 0), (6, 1), (22, 3), (23, 4), (27, 5)):
        moved = values.clone()
        moved[:, feature] += 1
        changed = (tokenizer(moved) - tokens).abs().amax((0, 2)) > 1e-7
        assert changed.tolist() == [index == token for index in range(6)]
    assert tokenizer.real_tokens(torch.tensor([[True, False]])).tolist() == [[True] * 4 + [False] * 2]


def test_segment_layers_keep_their_inputs_scale():
    tokenizer = SegmentTokenizer({"snp": 6400}, {"snp": 64}, 128, dropout=0.0)
    tokens = tokenizer(torch.randn(64, 6400)) - tokenizer.pos_embed - tokenizer.kind_embed
    assert abs(tokens.mean()) < 0.05
    assert abs(tokens.std() - 1) < 0.1


def slow_masked(network, image, genetics):
    """The masked pass, sample by sample and head by head, from the equations."""

    def attend(q, k, v, ratio):
        scores = q @ k.T / q.shape[1] ** 0.5
        weights = scores.softmax(-1)
        for row in weights:
            order = sorted(range(len(row)), key=lambda column: -float(row[column]))
            row[order[: int(ratio * len(row))]] = 0
        return weights @ v

    def block_of(block, x, q, k, v, ratio):
        heads = [attend(q[h], k[h], v[h], ratio) for h in range(len(q))]
        x = x + block.attn.proj(torch.cat(heads, dim=1))
        return x + block.mlp(block.norm2(x))

    def split(block, x):
        return [part[0] for part in block.attn.heads(block.norm1(x)[None])]

    results = []
    images = network.encoder.embed(network.encoder.patch_embed.patchify(image))
    genes = network.genome.tokens(genetics.values)
    for x, g in zip(images, genes, strict=True):
        first, other = network.encoder.blocks[0], network.genome.blocks[0]
        x, g = (block_of(first, x, *split(first, x), network.tau_image),
                block_of(other, g, *split(other, g), network.tau_genome))  # fmt: skip
        second, other = network.encoder.blocks[1], network.genome.blocks[1]
        (q, k, v), (qg, kg, vg) = split(second, x), split(other, g)
        x, g = (block_of(second, x, q, kg, vg, network.tau_image),
                block_of(other, g, qg, k, v, network.tau_genome))  # fmt: skip
        x, g = network.encoder.blocks[2](x[None]), network.genome.blocks[2](g[None])
        results.append((network.encoder.norm(x), network.genome.norm(g)))
    return [torch.cat(parts) for parts in zip(*results, strict=True)]


@torch.no_grad()
def test_passes_equal_the_equations_and_the_plain_encoder():
    network, (image, genetics) = make(), inputs()
    tokens = (
        network.encoder.embed(network.encoder.patch_embed.patchify(image)),
        network.genome.tokens(genetics.values),
    )
    intact, masked = network.passes(Tokens(*tokens), GenomeKeys(), True)
    assert torch.allclose(intact.image, network.encoder.forward_features(image), atol=1e-5)
    genes = tokens[1]
    for block in network.genome.blocks:
        genes = block(genes)
    assert torch.allclose(intact.genome, network.genome.norm(genes), atol=1e-5)
    for ours, slow in zip(masked, slow_masked(network, image, genetics), strict=True):
        assert torch.allclose(ours, slow, atol=1e-5)
    alone = network.passes(Tokens(*tokens), GenomeKeys(), False)
    assert alone[0] is None
    assert torch.allclose(alone[1].image, masked.image, atol=1e-5)


def test_exported_encoder_is_a_plain_vit_of_timm():
    network, (image, _) = make(), inputs()
    encoder = network.encoder
    theirs = timm_vit.VisionTransformer(**timm_config(encoder.config))
    theirs.load_state_dict(to_timm(encoder.state_dict(), encoder.config), strict=True)
    assert torch.allclose(theirs.forward_features(image), encoder.forward_features(image), atol=1e-5)


def test_zeroed_fractions_and_shapes():
    record = {}
    network, (image, genetics) = make(tau_image=0.75, tau_genome=0.5), inputs()
    output = network(image, genetics, record=record)
    assert output.image.shape == (3, 16, 192)
    assert output.genome.shape == (3, 28)
    assert {name: tuple(r.keep.shape[-2:]) for name, r in record.items()} == {
        "image_self": (17, 17), "genome_self": (6, 6), "image_cross": (17, 6), "genome_cross": (6, 17)}  # fmt: skip
    removed = {name: int((~r.keep).sum(-1).unique()) for name, r in record.items()}
    assert removed == {"image_self": 12, "genome_self": 3, "image_cross": 4, "genome_cross": 8}
    record = {}
    make(genome=False)(image, record=record)
    assert {name: int((~r.keep).sum(-1).unique()) for name, r in record.items()} == {
        "image_self": 12, "image_self_second": 12}  # fmt: skip
    record = {}
    make(tau_image=0.0, tau_genome=0.0)(image, genetics, record=record)
    assert all(r.keep.all() for r in record.values())


@torch.no_grad()
def test_absent_genetics_have_no_part_in_anything():
    """D21: partly absent tokens are no keys; without any genetics a sample takes the path of images alone."""
    present = torch.tensor([[True, True], [True, False], [False, False]])
    network, (image, genetics) = make().eval(), inputs(present=present)
    alone = RelationNetwork(network.encoder, None, None, None)  # the same encoder, for images alone
    blank = genetics.values * torch.cat([present[:, :1].expand(-1, 23), present[:, 1:].expand(-1, 5)], 1)
    one = network(image, genetics)
    two = network(image, Genetics(blank + 0, present))
    assert torch.allclose(one.image, two.image, atol=1e-5)
    assert torch.allclose(one.pooled[1][:2], two.pooled[1][:2], atol=1e-5)
    whole = network(image[:1], Genetics(genetics.values[:1], None))
    assert torch.allclose(one.image[:1], whole.image, atol=1e-5)
    assert torch.allclose(one.genome[:1], whole.genome, atol=1e-5)
    tokens = Tokens(network.encoder.embed(network.encoder.patch_embed.patchify(image[2:])), None)
    masked = alone.passes(tokens, GenomeKeys(), False).masked.image
    pooled = network(image[2:], Genetics(genetics.values[2:], present[2:])).pooled[2]
    assert torch.allclose(masked[:, 1:].mean(1), pooled, atol=1e-5)


@pytest.mark.parametrize("genome", [True, False])
@pytest.mark.parametrize("cross_params", ["shared", "dedicated"])
@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_every_parameter_is_used(genome, cross_params, pool):
    network, (image, genetics) = make(genome, relations=RelationConfig(cross_params), pool=pool), inputs()
    output = network(image, genetics if genome else None)
    total = output.image.square().mean() + sum(x.sin().mean() for x in output.pooled if x is not None)
    total = total + (output.genome.square().mean() if genome else 0)
    total.backward()
    for name, parameter in network.named_parameters():
        assert not parameter.requires_grad or parameter.grad is not None, name
    assert (network.cross is not None) == (genome and cross_params == "dedicated")


def test_without_the_residual_pixels_reach_no_prediction():
    """D3: then the image's tokens after the cross block are mixtures of genome values alone."""
    image, genetics = inputs()
    other, differences = torch.randn_like(image), []
    for residual in (True, False):
        network = make(relations=RelationConfig(masked_residual=residual), tau_image=0.0, tau_genome=0.0).eval()
        differences.append((network(image, genetics).image - network(other, genetics).image).abs().mean())
    assert differences[1] < 0.5 * differences[0]


def test_settings_that_do_not_fit():
    with pytest.raises(ValueError, match="at least 2"):
        GenomeEncoder(SIZES, 16, 2, depth=1)
    with pytest.raises(ValueError, match="two blocks"):
        RelationNetwork(VisionTransformer(3, [16, 16], 8, 16, 1, 2), None, None, None)
    with pytest.raises(ValueError, match="class token"):
        RelationNetwork(VisionTransformer(3, [16, 16], 8, 16, 2, 2), None, None, None, pool="cls")


def test_hidden_patches_get_the_mask_token():
    decoder = partial(FusedDecoder, decoder_dim=12, depth=2, num_heads=2)
    encoder = VisionTransformer(3, [32, 32], **VIT)
    network = RelationNetwork(encoder, None, decoder(16, (4, 4), 1, 0, "image", True), None, tau_image=0.0)
    image = torch.randn(2, 3, 32, 32)
    mask = RandomMasker(0.75)(2, 16)
    moved = image.clone()
    hidden = network.encoder.patch_embed.unpatchify(mask.mask[..., None].float().expand(-1, -1, 192)) > 0
    moved[hidden] += 1
    assert torch.allclose(network(image, mask=mask, intact=False).image, network(moved, mask=mask, intact=False).image)
    assert network(image, mask=mask, intact=False).image.shape == (2, 16, 192)
