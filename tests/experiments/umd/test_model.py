import math
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from transformers import CLIPVisionConfig, CLIPVisionModel, RobertaConfig, RobertaModel

from common.blocks.decoder import MAEDecoder
from common.blocks.patch_embed import normalise_patches, patchify_channels_last
from common.callbacks.finite_check import FiniteCheck
from common.errors import CheckpointError, UserError
from common.losses.reconstruction import masked_mse
from common.losses.text import masked_cross_entropy
from common.maskers.random import RandomMasker
from common.module import StepOutput, Term
from common.randomness import KeyedGenerator
from common.types import InputSpec
from experiments.umd.encoder import UMDEncoder
from experiments.umd.module import UMDPretrain
from experiments.umd.objective import total_weights
from experiments.umd.pairs import matching_pairs, shown_pairs
from experiments.umd.pretrain_network import FeatureConfig
from experiments.umd.towers import TextTower, TowerConfig, VisionTower, load_text, load_vision, resized_positions

FEATURES = ("positions", "target", "text_padding", "teacher_decay")
VOCABULARY = {"size": 40, "length": 12, "fingerprint": "x", "pad_id": 0}
TINY = {
    "patch_size": 8, "vision": TowerConfig(16, 1, 2), "text": TowerConfig(16, 1, 2),
    "max_positions": 20, "dim": 16, "fusion_depth": 2, "fusion_heads": 2, "dropout": 0.0,
}  # fmt: skip


def losses_of(step):
    return {name: term.value for name, term in step.terms.items() if term.weight is not None}


def make(encoder=None, **settings):
    """4 x 4 patches of 8 pixels, no dropout."""
    spec = {name: settings.pop(name) for name in InputSpec._fields if name in settings}
    module = UMDPretrain(
        **{
            "encoder": partial(UMDEncoder, **TINY | (encoder or {})),
            "decoder": partial(MAEDecoder, decoder_dim=12, depth=1, num_heads=2, num_prefix_tokens=1, quick_gelu=True),
            "features": FeatureConfig(8, 8, **{name: settings.pop(name) for name in FEATURES if name in settings}),
        }
        | settings
    )
    size = {"channels": ("red", "green", "blue"), "image_size": (32, 32), "vocabulary": VOCABULARY}
    module.build(InputSpec(**size | spec))
    return module


def batch_of(lengths=(9, 6, 4, 7), seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, VOCABULARY["size"], (len(lengths), max(lengths)), generator=generator)
    ids[:, 0] = 2
    attention_mask = (torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]).long()
    ids *= attention_mask
    hidden = (torch.rand(ids.shape, generator=generator) < 0.4) & (attention_mask == 1)
    hidden[:, :1], hidden[:, 1:2] = False, True
    count = len(lengths)
    return with_positions(
        {
            "image": torch.randn(count, 3, 32, 32, generator=generator),
            "modality_mask": torch.ones(count, 2, dtype=torch.bool),
            "key": torch.arange(count) * 1000 + 17,
            "image_key": torch.arange(count),
            "subject_id": [str(i) for i in range(count)],
            "input_ids": ids.masked_fill(hidden, 3),
            "attention_mask": attention_mask,
            "labels": ids.masked_fill(~hidden, -100),
        }
    )


def with_positions(batch):
    width = int(batch["attention_mask"].sum(1).max())
    batch = batch | {name: batch[name][:, :width] for name in ("input_ids", "attention_mask", "labels")}
    labels = batch["labels"].flatten()
    return batch | {"hidden_index": (labels != -100).nonzero()[:, 0], "hidden_ids": labels[labels != -100]}


def part_of(batch, rows):
    return with_positions({name: value[rows] for name, value in batch.items() if not name.startswith("hidden")})


def gradient_of(module, loss, prefix):
    module.zero_grad()
    loss.backward(retain_graph=True)
    parts = [p.grad for name, p in module.named_parameters() if name.startswith(prefix) and p.grad is not None]
    return float(torch.stack([part.norm() for part in parts]).norm()) if parts else 0.0


def test_patches_of_the_specification():
    """R1: targets standardised with the unbiased variance; a prediction of 0 costs 11/12."""
    image = torch.arange(48.0, dtype=torch.float64).reshape(1, 3, 4, 4)
    patches = patchify_channels_last(image, (2, 2))
    assert patches[0, 0].tolist() == [0, 16, 32, 1, 17, 33, 4, 20, 36, 5, 21, 37]
    assert patches[0, 3].tolist() == [10, 26, 42, 11, 27, 43, 14, 30, 46, 15, 31, 47]
    assert patches[0, 0].var().item() == pytest.approx(190.818182)
    target = normalise_patches(patches)
    assert target[0, 0, :3].tolist() == pytest.approx([-1.339251, -0.180980, 0.977291], abs=1e-6)
    mask = torch.tensor([[True, False, True, True]])
    assert masked_mse(torch.zeros_like(target), target, mask).item() == pytest.approx(0.91666666, abs=1e-7)
    shifted = target + torch.tensor([1.0, 5, 2, 0]).reshape(1, 4, 1)
    assert masked_mse(shifted, target, mask).item() == pytest.approx(5 / 3)


def test_words_of_the_specification():
    """R2."""
    logits = torch.tensor([[2.0, 0, 0], [0, 0, 3], [0, 0, 0]])
    loss = masked_cross_entropy(logits, torch.tensor([0, 2, 1]))
    assert loss.item() == pytest.approx(0.4776933, abs=1e-6)
    assert masked_cross_entropy(logits[:0], torch.tensor([], dtype=torch.long)).item() == 0


@pytest.mark.parametrize(("alpha", "total"), [(0.5, 2.40), (0.2, 3.06)])
def test_total_of_the_specification(alpha, total):
    """R5."""
    weights = total_weights(alpha, None)
    values = {"mim": 0.8, "mlm": 2.0, "feature_image": 0.2, "feature_text": 0.4, "itm": 0.7}
    terms = {name: Term(torch.tensor(value), 1, weights[name]) for name, value in values.items()}
    assert StepOutput(terms, None).loss().item() == pytest.approx(total)
    assert total_weights(0.5, {"itm": 0})["itm"] == 0
    with pytest.raises(ValueError, match="alpha"):
        total_weights(2.0, None)
    with pytest.raises(ValueError, match="names 'pixels'"):
        total_weights(0.5, {"pixels": 1.0})


def test_counts_of_visible_patches():
    """R9."""
    assert [RandomMasker(0.75).num_visible(n) for n in (196, 324, 361, 576)] == [49, 81, 90, 144]


def test_step_is_the_papers():
    """Recompute Eqs. 1, 2 and 4 sample by sample from the networks' outputs."""
    module, batch = make().eval(), batch_of()
    network, mask = module.network, module.draw_mask(batch)
    output = module.step(batch, sync=False)
    fused = network.student(batch, mask)
    truth = torch.where(batch["labels"] == -100, batch["input_ids"], batch["labels"])
    seen = network.teacher.module["encoder"](batch["image"], truth, batch["attention_mask"])
    image, text, patches = [], [], []
    for b in range(4):
        own = [0, *(mask.ids_keep[b] + 1).tolist()]
        for place, index in enumerate(own):
            target = network.teacher.module["image"](seen.image[b, index])
            pred = network.project_image(fused.image[b, place])
            image.append((pred - F.layer_norm(target, (8,), eps=1e-6)).square().mean())
        for t in range(int(batch["attention_mask"][b].sum())):
            target = network.teacher.module["text"](seen.text[b, t])
            text.append((network.project_text(fused.text[b, t]) - F.layer_norm(target, (8,), eps=1e-6)).square().mean())
        pred = network.decoder(fused.image[b : b + 1], mask.ids_restore[b : b + 1])[0]
        target = network.patch_target(batch["image"][b : b + 1])[0]
        patches += [(pred[i] - target[i]).square().mean() for i in range(16) if mask.mask[b, i]]
    for name, terms in (("feature_image", image), ("feature_text", text), ("mim", patches)):
        assert output.terms[name].value.item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-4), name
    assert float(output.terms["feature_image"].count) == 4 * 5
    assert float(output.terms["mim"].count) == 4 * 12


@pytest.mark.parametrize(
    ("positions", "target", "learns"),
    [("visible", "ema_ln", True), ("masked_decoder", "ema_ln", True), ("upstream", "paper", False)],
)
def test_feature_losses_reach_the_student(positions, target, learns):
    """7-C1: in the published form the student's vision encoder gets no gradient at all."""
    module, batch = make(positions=positions, target=target), batch_of()
    losses = losses_of(module.step(batch, sync=False))
    gradient = gradient_of(module, losses["feature_image"], "network.encoder.vision.")
    assert (gradient > 1e-6) == learns
    assert gradient == 0 or learns
    assert gradient_of(module, losses["feature_text"], "network.encoder.text.") > 1e-6


def test_visible_gather_of_the_specification():
    """R3: the teacher's class token, then its tokens at the kept places."""
    from common.types import MaskOutput

    network = make().network
    target = torch.tensor([[[10.0, 10], [1, 1], [2, 2], [3, 3], [4, 4]]])
    mask = MaskOutput(torch.tensor([[False, True, False, True]]), torch.tensor([[2, 0]]), None)
    network.project_image = torch.nn.Identity()
    features = network.image_features(type("F", (), {"image": torch.zeros(1, 3, 2)}), mask, target, None, None)
    assert features.target.tolist() == [[[10, 10], [3, 3], [1, 1]]]


@pytest.mark.parametrize("settings", [
    {}, {"positions": "masked_decoder"}, {"positions": "upstream", "target": "paper"},
    {"target": "stopgrad", "mim_layer": 1, "text_padding": True}, {"weights": {"itm": 0}},
    {"alpha": 0.0}, {"encoder": {"pool": "cls"}}, {"weights": {"mlm": 0, "mim": 0}},
])  # fmt: skip
def test_every_trained_parameter_is_used(settings):
    """Also where a rank meets no hidden word: DDP would wait for gradients that never come."""
    module, batch = make(**settings), batch_of()
    for each in (batch, with_positions(batch | {"labels": torch.full_like(batch["labels"], -100)})):
        module.zero_grad()
        loss = module.step(each, sync=False).loss()
        loss.backward()
        assert torch.isfinite(loss)
        idle = [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]
        assert not idle


def test_teacher_begins_as_a_copy_and_sees_everything():
    module, batch = make(encoder={"dropout": 0.1}).train(), batch_of()
    network = module.network
    assert float(network.teacher.distance(network.averaged())) == 0
    assert not network.teacher.module["encoder"].training
    ids = torch.where(batch["labels"] == -100, batch["input_ids"], batch["labels"])
    for once, again in zip(*(network.teacher_features(batch, ids) for _ in range(2)), strict=True):
        assert torch.equal(once, again)


def test_who_keeps_the_image_says_nothing_about_hidden_patches():
    keys = torch.arange(1000) * 7919 + 3
    label = matching_pairs(keys, torch.arange(1000)).label.double()
    patches = RandomMasker(0.75)(1000, 16, generator=KeyedGenerator(keys)).mask.double()
    assert torch.corrcoef(torch.cat([label[:, None], patches], dim=1).T)[0, 1:].abs().max() < 0.15


def test_pairs_are_a_derangement():
    keys = torch.arange(9) * 31 + 5
    pairs = matching_pairs(keys, torch.arange(9))
    assert int(pairs.label.sum()) == 4
    own = pairs.image == torch.arange(9)
    assert torch.equal(own, pairs.label == 1)
    assert sorted(pairs.image.tolist()) == list(range(9)), "negatives rotate among themselves"
    assert pairs.valid.all()
    assert not torch.equal(pairs.label, matching_pairs(keys + 1, torch.arange(9)).label)


def test_pairs_avoid_the_same_image():
    for seed in range(20):
        images = torch.tensor([0, 0, 0, 1, 1, 2])
        pairs = matching_pairs(torch.arange(6) + 100 * seed, images)
        negative = pairs.label == 0
        assert (images[pairs.image] != images)[negative].all()
        assert pairs.valid.all()
    same = matching_pairs(torch.arange(4), torch.zeros(4, dtype=torch.long))
    assert torch.equal(same.valid, same.label == 1)


@pytest.mark.parametrize(("count", "positives"), [(1, 1), (2, 1), (3, 1), (4, 2)])
def test_pairs_of_small_batches(count, positives):
    pairs = matching_pairs(torch.arange(count) * 7, torch.arange(count))
    assert int(pairs.label.sum()) == positives
    assert pairs.valid.all()


def test_loaded_negatives_are_shown():
    module, batch = make(itm_negatives="dataset"), batch_of()
    with pytest.raises(UserError, match="negative_images"):
        module.step(batch, sync=False)
    batch["negative_image"] = batch["image"] + 100
    pairs, shown = shown_pairs(batch, loaded=True, sync=False)
    assert torch.equal(shown[pairs.label == 1], batch["image"][pairs.label == 1])
    assert torch.equal(shown[pairs.label == 0], batch["negative_image"][pairs.label == 0])


def test_a_batch_can_be_overfitted():
    module, batch = make(), batch_of()
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=5e-3)
    history = []
    for _ in range(40):
        step = module.step(batch, sync=False)
        losses = losses_of(step)
        optimizer.zero_grad()
        step.loss().backward()
        optimizer.step()
        module.network.update_teacher()
        history.append({name: loss.item() for name, loss in losses.items()})
    assert history[-1]["mlm"] < 0.4 * history[0]["mlm"]
    assert history[-1]["mim"] < 0.9 * history[0]["mim"]
    assert history[-1]["itm"] < 0.8 * history[0]["itm"]


def test_towers_are_those_of_transformers():
    """The parts called one by one, with all patches, give what the library gives (text with padding too)."""
    vision = VisionTower([32, 32], 8, 16, 2, 2).eval()
    image = torch.randn(2, 3, 32, 32)
    theirs = vision.clip(image).last_hidden_state
    assert torch.allclose(vision(image), vision.clip.post_layernorm(theirs), atol=1e-5)
    text = TextTower(30, 1, 16, 2, 2, 20, 0.0).eval()
    ids = torch.tensor([[0, 5, 6, 2], [0, 7, 2, 1]])
    mask = (ids != 1).long()
    theirs = text.roberta(ids, attention_mask=mask).last_hidden_state
    assert torch.allclose(text(ids, mask)[mask == 1], theirs[mask == 1], atol=1e-5)
    assert text.longest == 18


def test_dropped_patches_are_never_seen():
    vision = VisionTower([32, 32], 8, 16, 2, 2).eval()
    image, keep = torch.randn(1, 3, 32, 32), torch.tensor([[5, 0, 10]])
    other = image.clone()
    other[:, :, 24:] += 3.0
    assert torch.equal(vision(image, keep), vision(other, keep))
    assert vision(image, keep).shape == (1, 4, 16)


def test_positions_are_resampled_once():
    table = torch.randn(1 + 16, 6)
    wider = resized_positions(table, 1 + 64)
    assert torch.equal(wider[0], table[0])
    grid = table[1:].T.reshape(1, 6, 4, 4)
    by_hand = F.interpolate(grid, (8, 8), mode="bicubic", align_corners=False)[0].flatten(1).T
    assert torch.allclose(wider[1:], by_hand, atol=1e-6)
    with pytest.raises(CheckpointError, match="no squares"):
        resized_positions(table, 1 + 15)


def test_weights_of_transformers_are_taken(tmp_path):
    clip = CLIPVisionModel(CLIPVisionConfig(hidden_size=16, intermediate_size=64, num_hidden_layers=3,
                                            num_attention_heads=2, image_size=16, patch_size=8))  # fmt: skip
    clip.save_pretrained(tmp_path / "clip")
    tower = VisionTower([32, 32], 8, 16, 2, 2)
    load_vision(tower, str(tmp_path / "clip"))
    state, theirs = tower.clip.state_dict(), clip.state_dict()
    assert torch.equal(state["encoder.layers.1.mlp.fc1.weight"], theirs["encoder.layers.1.mlp.fc1.weight"])
    assert len(state["embeddings.position_embedding.weight"]) == 17
    with pytest.raises(UserError, match="patch_size 8"):
        load_vision(VisionTower([32, 32], 16, 16, 2, 2), str(tmp_path / "clip"))
    with pytest.raises(CheckpointError, match="holds no weights"):
        load_vision(tower, str(tmp_path / "nothing"))
    sizes = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    RobertaModel(RobertaConfig(vocab_size=30, max_position_embeddings=20, **sizes)).save_pretrained(tmp_path / "text")
    load_text(TextTower(30, 1, 16, 1, 2, 20, 0.0), str(tmp_path / "text"))
    with pytest.raises(UserError, match="30 tokens"):
        load_text(TextTower(31, 1, 16, 1, 2, 20, 0.0), str(tmp_path / "text"))


def test_sizes_that_do_not_fit():
    for size, words in (([314, 314], "304 or 320"), ([32, 64], "square")):
        with pytest.raises(ValueError, match=words):
            VisionTower(size, 16, 16, 1, 2)
    with pytest.raises(UserError, match="20 is more than the 19 positions"):
        make(vocabulary=VOCABULARY | {"length": 20})
    with pytest.raises(ValueError, match="3 channels"):
        UMDEncoder([32, 32], 40, in_channels=1, **TINY)
    with pytest.raises(UserError, match="mim_layer"):
        make(mim_layer=2)


def test_of_an_image_alone_only_the_vision_tower_learns():
    """DDP waits for the gradient of whatever is to be trained."""
    encoder = UMDEncoder([32, 32], 40, 0, **TINY)
    encoder.train_image_alone()
    encoder.forward_features(torch.randn(2, 3, 32, 32)).sum().backward()
    trained = [name for name, p in encoder.named_parameters() if p.requires_grad]
    assert trained
    assert all(name.startswith("vision.") for name in trained)
    assert all(encoder.get_parameter(name).grad is not None for name in trained)


def test_pooling():
    encoder = UMDEncoder([32, 32], 40, 0, **TINY).eval()
    batch = batch_of()
    fused = encoder(batch["image"], batch["input_ids"], batch["attention_mask"])
    text, image = encoder.pool(fused, batch["attention_mask"])
    mean = torch.stack([fused.text[b, :n].mean(0) for b, n in enumerate((9, 6, 4, 7))])
    assert torch.allclose(text, torch.tanh(encoder.text_pooler(mean)), atol=1e-6)
    assert torch.allclose(image, torch.tanh(encoder.image_pooler(fused.image.mean(1))), atol=1e-6)
    assert encoder.forward_features(batch["image"][:, :1]).shape == (4, 17, 16)


def test_modalities_share_nothing_and_leave_out_what_belongs_to_neither():
    encoder = UMDEncoder([32, 32], 40, 0, **TINY)
    groups = {name: {id(p) for p in group} for name, group in encoder.modality_parameters().items()}
    assert not groups["image"] & groups["text"]
    names = {name for name, p in encoder.named_parameters() if id(p) not in groups["image"] | groups["text"]}
    assert names == {"type_embedding.weight", "text_pooler.weight", "text_pooler.bias", "image_pooler.weight",
                     "image_pooler.bias"}  # fmt: skip


def loss_and_gradient(state, batch):
    module = make().double()
    module.load_state_dict(state)
    step = module.step(batch, sync=True)
    losses = losses_of(step)
    assert {loss.dtype for loss in losses.values()} == {torch.float64}  # so that ranks can be held to 1e-10
    step.loss().backward()
    parts = [p.grad.flatten() for p in module.parameters() if p.requires_grad]
    return {name: loss.item() for name, loss in losses.items()}, torch.cat(parts)


@pytest.mark.ddp
@pytest.mark.parametrize("case", ["uneven", "no words on one rank", "same image twice"])
def test_two_ranks_equal_one(rank_pool, case):
    """All five losses; the negatives of matching come from the whole batch."""
    batch = batch_of((11, 10, 3, 2))
    batch["image"] = batch["image"].double()
    if case == "no words on one rank":
        batch["labels"][2:] = -100
    elif case == "same image twice":
        batch["image_key"][3] = batch["image_key"][0]
    batch = with_positions(batch)
    state = make().double().state_dict()
    whole, whole_gradient = loss_and_gradient(state, batch)
    parts = [part_of(batch, slice(0, 2)), part_of(batch, slice(2, 4))]
    results = rank_pool.run(loss_and_gradient, [(state, part) for part in parts])
    for losses, _ in results:
        assert losses == pytest.approx(whole, rel=1e-10)
    assert torch.allclose((results[0][1] + results[1][1]) / 2, whole_gradient, rtol=1e-8, atol=1e-12)


def test_feature_weights_of_zero_leave_the_teacher_out():
    module = make(alpha=0.0)
    assert module.network.teacher is None
    assert "feature_image" not in module.step(batch_of(), sync=False).terms
    assert math.isfinite(module.step(batch_of(), sync=False).terms["itm"].value.item())


def trained(batches, forgiven):
    """Train on batches in order, at a learning rate that does not depend on how many there are."""
    module = make(teacher_decay=0.9)
    module.configure_optimizers = lambda: torch.optim.AdamW(module.parameter_groups(), lr=1e-2, fused=True)
    module.log_dict = lambda *args, **kwargs: None
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, logger=False, callbacks=[FiniteCheck(10, forgiven)],
                         enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return module.state_dict(), trainer.optimizers[0].state_dict()["state"]


def test_a_step_that_is_not_finite_leaves_the_teacher_where_it_is():
    """Weights, teacher and optimiser are those of a run that never met the batch, bit by bit."""
    batches = [batch_of(seed=seed) for seed in range(4)]
    bad = batch_of(seed=9)
    bad["image"][0] = math.nan
    with_it, moments = trained([*batches[:2], bad, *batches[2:]], forgiven=1)
    without, expected = trained(batches, forgiven=0)
    begin = trained([], forgiven=0)[0]
    for key, value in without.items():
        assert torch.equal(with_it[key], value), key
    for index, state in expected.items():
        assert all(torch.equal(torch.as_tensor(moments[index][name]), torch.as_tensor(value))
                   for name, value in state.items())  # fmt: skip
    moved = [key for key in without if key.startswith("network.teacher.") and not torch.equal(without[key], begin[key])]
    assert len(moved) > 10
