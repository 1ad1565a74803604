from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml

from common.blocks.decoder import MAEDecoder
from common.blocks.patch_embed import normalise_patches, patchify_channels_last
from common.blocks.vit import VisionTransformer
from common.losses.reconstruction import masked_mse
from common.maskers.random import RandomMasker
from common.runtime.configs import read_config
from common.types import InputSpec, MaskOutput
from experiments import mrm_record
from experiments.mrm_record.model import MRM, ReportDecoder
from experiments.mrm_record.module import MRMPretrain

VOCABULARY, LENGTH = 30, 12


def report_decoder(**settings):
    return ReportDecoder(**{"vocab_size": VOCABULARY, "length": LENGTH, "dim": 16, "depth": 2, "num_heads": 2,
                            "mlp_dim": 32, "dropout": 0.0} | settings)  # fmt: skip


def network(report=None, sr_factor=2, **settings):
    """A network of 4 x 4 patches, for images of 32 x 32."""
    patch = 8 // sr_factor
    encoder = VisionTransformer(3, (32 // sr_factor,) * 2, patch, 16, 1, 2, pos_embed="sincos", class_token=True)
    decoder = MAEDecoder(16, encoder.grid_size, 3 * 8 * 8, 16, 1, 2, num_prefix_tokens=1)
    return MRM(encoder, decoder, report or report_decoder(), sr_factor, **settings)


def batch_of(lengths=(9, 6)):
    ids = torch.randint(4, VOCABULARY, (len(lengths), max(lengths)))
    ids[:, 0] = 2
    attention_mask = (torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]).long()
    ids *= attention_mask
    hidden = (torch.rand(ids.shape) < 0.5) & (attention_mask == 1)
    hidden[:, 0], hidden[:, 1], hidden[:, 2] = False, True, False
    return {
        "image": torch.randn(len(lengths), 1, 32, 32),
        "modality_mask": torch.ones(len(lengths), 2, dtype=torch.bool),
        "input_ids": ids.masked_fill(hidden, 3),
        "attention_mask": attention_mask,
        "labels": ids.masked_fill(~hidden, -100),
        "hidden_index": hidden.flatten().nonzero()[:, 0],
        "hidden_ids": ids[hidden],
    }


def mask_of(ratio=0.75, size=2):
    return RandomMasker(ratio)(size, 16)


def hidden_patches(mask):
    return torch.stack([row.nonzero()[:, 0] for row in mask.mask])


def test_patches_by_hand():
    """R1 of the specification: inside a patch by row, column, channel."""
    patches = patchify_channels_last(torch.arange(48).reshape(1, 3, 4, 4), (2, 2))[0].tolist()
    assert patches[0] == [0, 16, 32, 1, 17, 33, 4, 20, 36, 5, 21, 37]
    assert patches[1] == [2, 18, 34, 3, 19, 35, 6, 22, 38, 7, 23, 39]
    assert patches[3] == [10, 26, 42, 11, 27, 43, 14, 30, 46, 15, 31, 47]


def test_image_loss_by_hand():
    """R2 of the specification, and the loss of a network that predicts nothing."""
    patches = torch.tensor([[[0, 1, 2, 3], [4, 4, 4, 8], [1, 1, 1, 1]]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False]])
    zeros = torch.zeros_like(patches)
    assert masked_mse(zeros, patches, mask).item() == 15.75
    normalised = normalise_patches(patches)
    assert masked_mse(zeros, normalised, mask).item() == pytest.approx(0.749999681, abs=1e-9)
    assert normalised[0, 2].tolist() == [0, 0, 0, 0]
    random = normalise_patches(100 * torch.randn(1, 2, 3072, dtype=torch.float64))
    assert masked_mse(torch.zeros_like(random), random, mask[:, :2]).item() == pytest.approx(3071 / 3072, rel=1e-8)


@pytest.mark.parametrize(
    ("fusion", "expected"),
    [
        ("visible", [[11, 100], [2, 0], [10, 103], [0, 0]]),
        ("all", [[11, 100], [12, 100], [10, 103], [10, 100]]),
    ],
)
def test_hybrid_by_hand(fusion, expected):
    """R4 of the specification: position 1 is hidden, position 3 padding."""
    embedded = torch.tensor([[[1.0, 0], [2, 0], [0, 3], [0, 0]]])
    attention_mask, hidden = torch.tensor([[1, 1, 1, 0]]), torch.tensor([[False, True, False, False]])
    decoder = report_decoder(fusion=fusion)
    assert decoder.hybrid(embedded, torch.tensor([[10.0, 100]]), attention_mask, hidden)[0].tolist() == expected


@pytest.mark.parametrize("norm", ["patch", "unit", "dataset"])
def test_target_is_that_of_three_channels(norm):
    """Patches are normalised by the unbiased variance over all 3 x 8 x 8 values."""
    model, image = network(target_norm=norm, mean=0.4, std=0.3), torch.randn(1, 1, 32, 32, dtype=torch.float64)
    colours = image[0].expand(3, -1, -1)
    for index, patch in enumerate(model.target(image)[0]):
        row, column = divmod(index, 4)
        values = [colours[c, 8 * row + i, 8 * column + j] for i in range(8) for j in range(8) for c in range(3)]
        expected = torch.stack(values)
        if norm == "patch":
            expected = expected - expected.sum() / 192
            expected = expected / (expected.square().sum() / 191 + 1e-6).sqrt()
        elif norm == "unit":
            expected = expected * 0.3 + 0.4
        assert torch.allclose(patch, expected, atol=1e-12)


@pytest.mark.parametrize("norm", ["patch", "unit", "dataset"])
def test_pixels_undo_the_target(norm):
    model, image = network(target_norm=norm, mean=0.4, std=0.3), torch.randn(2, 1, 32, 32)
    image[0, :, :8, :8] = 1
    assert torch.allclose(model.pixels(model.target(image), image), image, atol=1e-4)


def cubic(distance, sharpness):
    """Keys' kernel."""
    x = abs(distance)
    if x <= 1:
        return (sharpness + 2) * x**3 - (sharpness + 3) * x**2 + 1
    return sharpness * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


@pytest.mark.parametrize("antialias", [True, False])
def test_low_resolution_is_bicubic_with_or_without_a_low_pass(antialias):
    """The low pass stretches the kernel by two; either way halves are sampled between two pixels."""
    model, image = network(antialias=antialias), torch.randn(1, 1, 32, 32)
    stretch, sharpness = (2, -0.5) if antialias else (1, -0.75)
    taps = torch.tensor([cubic((i + 0.5) / stretch, sharpness) for i in range(-4, 4)])
    kernel = torch.outer(taps, taps) / taps.sum() ** 2
    small = model.low_resolution(image)
    assert small.shape == (1, 3, 16, 16)
    expected = (kernel * image[0, 0, 7:15, 17:25]).sum()
    assert small[0, :, 5, 10].tolist() == pytest.approx([expected.item()] * 3, abs=1e-5)


def test_averaging_before_projecting_changes_nothing():
    model, tokens = network(), torch.randn(2, 5, 16)
    expected = model.to_report(tokens)[:, 1:].mean(1)
    vector = model.image_vector(tokens, torch.tensor([True, False]))
    assert torch.allclose(vector[0], expected[0], atol=1e-6)
    assert vector[1].abs().sum() == 0


def test_gmp_takes_the_largest():
    model, tokens = network(pool="gmp"), torch.randn(2, 5, 16)
    tokens[:, 0] = 100
    largest = torch.stack([torch.stack([row[1:, e].sort().values[-1] for e in range(16)]) for row in tokens])
    assert torch.allclose(model.image_vector(tokens, torch.ones(2)), model.to_report(largest), atol=1e-6)


def test_predicting_hidden_patches_only_equals_predicting_all():
    model, batch, mask = network(), batch_of(), mask_of()
    index = hidden_patches(mask)
    part, whole = model(batch, mask, index), model(batch, mask)
    assert whole.pred.shape == (2, 16, 192)
    rows = torch.arange(2)[:, None]
    assert torch.allclose(part.pred, whole.pred[rows, index], atol=1e-6)
    assert torch.equal(part.target, whole.target[rows, index])


@pytest.mark.parametrize(("sr_factor", "border"), [(1, 0), (2, 3)])
def test_hidden_pixels_do_not_reach_the_encoder(sr_factor, border):
    """Halving reads three pixels over the edge of a patch, so at twice the resolution the middle alone is hidden."""
    model, batch, mask = network(sr_factor=sr_factor), batch_of(), mask_of()
    middle = torch.zeros(1, 1, 8, 8)
    middle[..., border : 8 - border, border : 8 - border] = 1
    where = model.spread(mask.mask.float()) * middle.repeat(1, 1, 4, 4)
    tokens = model.encode(batch["image"], mask)
    assert torch.equal(model.encode(batch["image"] + 9 * where, mask), tokens)
    seen = model.spread((~mask.mask).float()) * middle.repeat(1, 1, 4, 4)
    assert not torch.allclose(model.encode(batch["image"] + 9 * seen, mask), tokens)


def test_order_of_visible_patches_does_not_matter():
    model, batch, mask = network(), batch_of(), mask_of()
    order = torch.cat([mask.ids_keep.flip(1), hidden_patches(mask)], dim=1)
    other = MaskOutput(mask.mask, mask.ids_keep.flip(1), order.argsort(1))
    first, second = model(batch, mask), model(batch, other)
    assert torch.allclose(first.pred, second.pred, atol=1e-5)
    assert torch.allclose(first.logits, second.logits, atol=1e-5)


def test_the_report_trains_the_image_encoder():
    model, batch, mask = network(), batch_of(), mask_of()
    gradients = []
    for present in (True, False):
        model.zero_grad()
        batch["modality_mask"][:, 0] = present
        F.cross_entropy(model(batch, mask).logits, batch["hidden_ids"]).backward()
        gradients.append(model.encoder.patch_embed.proj.weight.grad.abs().sum().item())
    assert gradients[0] > 0
    assert gradients[1] == 0


def test_the_output_table_is_the_input_table():
    for tie in (True, False):
        decoder = report_decoder(tie_embeddings=tie)
        tables = decoder.head.decoder.weight, decoder.bert.embeddings.word_embeddings.weight
        assert (tables[0].data_ptr() == tables[1].data_ptr()) == tie
        assert sum(p.shape == (VOCABULARY, 16) for p in decoder.parameters()) == (1 if tie else 2)


def test_the_papers_head_is_one_layer():
    """Appendix A.2: what the table and its bias give of a token, and nothing between."""
    decoder, tokens = report_decoder(head="linear", tie_embeddings=False), torch.randn(3, 16)
    assert {name for name, _ in decoder.head.named_parameters()} == {"bias", "decoder.weight"}
    expected = F.linear(tokens, decoder.head.decoder.weight, decoder.head.decoder.bias)
    assert torch.equal(decoder.head(tokens), expected)
    path = Path(mrm_record.__file__).parent / "configs/paper.yaml"
    settings = yaml.safe_load(path.read_text())["model"]["init_args"]["report"]["init_args"]
    assert settings == {"head": "linear", "tie_embeddings": False}


def test_fixed_positions_are_not_trained():
    weight = report_decoder(positions="sincos").bert.embeddings.position_embeddings.weight
    assert not weight.requires_grad
    assert weight[1, 0].item() == pytest.approx(0.841471, abs=1e-6)
    assert report_decoder().bert.embeddings.position_embeddings.weight.requires_grad


def test_the_truth_does_not_reach_the_logits():
    model, batch, mask = network(text_to_image=True), batch_of(), mask_of()
    changed = torch.where(batch["labels"] == -100, -100, (batch["labels"] + 5) % VOCABULARY)
    other = batch | {"labels": changed, "hidden_ids": changed.flatten()[batch["hidden_index"]]}
    first, second = model(batch, mask), model(other, mask)
    assert torch.equal(first.logits, second.logits)
    assert torch.equal(first.pred, second.pred)


def test_padding_does_not_reach_the_logits():
    model, batch, mask = network(text_to_image=True), batch_of(), mask_of()
    short = batch["input_ids"].shape[1]
    wider = {name: F.pad(batch[name], (0, 3)) for name in ("input_ids", "attention_mask")}
    wider["labels"] = F.pad(batch["labels"], (0, 3), value=-100)
    rows, columns = batch["hidden_index"] // short, batch["hidden_index"] % short
    wider["hidden_index"] = rows * (short + 3) + columns
    first, second = model(batch, mask), model(batch | wider, mask)
    assert torch.allclose(first.logits, second.logits, atol=1e-5)
    assert torch.allclose(first.pred, second.pred, atol=1e-5)


@pytest.mark.parametrize(("attend", "alone"), [("own", True), ("all", False)])
def test_attending_to_oneself_leaves_other_words_out(attend, alone):
    model, batch = network(report_decoder(attend=attend)), batch_of()
    vector, changed = torch.randn(2, 16), batch["input_ids"].clone()
    visible = (batch["labels"] == -100) & (batch["attention_mask"] == 1)
    changed[visible] = 4 + (changed[visible] + 7) % (VOCABULARY - 4)
    first, second = (model.report_logits(batch | {"input_ids": ids}, vector) for ids in (batch["input_ids"], changed))
    assert torch.allclose(first, second, atol=1e-6) == alone


@pytest.mark.parametrize("tie", [True, False])
def test_report_decoding_starts_at_chance(tie):
    decoder = report_decoder(vocab_size=2000, dim=48, tie_embeddings=tie)
    ids = torch.randint(4, 2000, (4, LENGTH))
    logits = decoder(decoder.embed(ids), torch.ones_like(ids), torch.arange(ids.numel()))
    loss = F.cross_entropy(logits, torch.randint(4, 2000, (ids.numel(),)))
    assert loss.item() == pytest.approx(torch.log(torch.tensor(2000.0)).item(), abs=0.5)


def test_words_for_the_image_are_the_mean_of_the_visible_ones():
    model, batch = network(text_to_image=True), batch_of()
    embedded = model.report.embed(batch["input_ids"])
    for row in range(2):
        shown = [
            embedded[row, t]
            for t in range(embedded.shape[1])
            if batch["attention_mask"][row, t] and batch["labels"][row, t] == -100
        ]
        assert torch.allclose(model.visible_words(batch, embedded)[row], torch.stack(shown).mean(0), atol=1e-6)
    ids = batch["input_ids"].clone()
    ids[0, 2] = 4 + ids[0, 2] % 2
    mask = mask_of()
    first, second = model(batch, mask).pred, model(batch | {"input_ids": ids}, mask).pred
    assert not torch.allclose(first[0], second[0], atol=1e-6)
    assert torch.equal(first[1], second[1])


def test_an_encoder_without_class_token_is_refused():
    encoder = VisionTransformer(3, (16, 16), 4, 16, 1, 2)
    with pytest.raises(ValueError, match="class_token"):
        MRM(encoder, MAEDecoder(16, (4, 4), 192, 16, 1, 2), report_decoder())


@pytest.mark.parametrize(("tie", "low", "high"), [(True, 139.55, 139.65), (False, 151.1, 151.3)])
def test_the_published_size(tie, low, high):
    """Section 4 of the specification; the published code's further 0.15 M are a pooler that nothing uses."""
    path = Path(mrm_record.__file__).parent / "configs/pretrain.yaml"
    settings = read_config(path)["model"]["init_args"]
    arguments = {name: settings[name]["init_args"] for name in ("encoder", "decoder", "report")}
    module = MRMPretrain(
        encoder=partial(VisionTransformer, **arguments["encoder"]),
        decoder=partial(MAEDecoder, **arguments["decoder"]),
        report=partial(ReportDecoder, **arguments["report"] | {"tie_embeddings": tie}),
        sr_factor=settings["sr_factor"],
    )
    spec = InputSpec(("red", "green", "blue"), (448, 448), vocabulary={"size": 30000, "length": 100})
    with torch.device("meta"):
        model = module.build_network(spec)
    millions = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    assert low < millions < high
    assert sum(p.numel() for p in model.encoder.parameters() if p.requires_grad) / 1e6 == pytest.approx(85.65, abs=0.01)
    assert sum(p.numel() for p in model.decoder.parameters() if p.requires_grad) / 1e6 == pytest.approx(31.31, abs=0.01)
