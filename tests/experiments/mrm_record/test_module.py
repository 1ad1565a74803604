import math
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F

from common.blocks.decoder import MAEDecoder
from common.blocks.vit import VisionTransformer
from common.errors import UserError
from common.maskers.random import RandomMasker
from common.optim import WarmupCosine
from common.types import InputSpec
from experiments.mrm_record.model import ReportDecoder
from experiments.mrm_record.module import MRMPretrain

VOCABULARY = {"size": 40, "length": 12, "fingerprint": "x"}


def losses_of(step):
    return {name: term.value for name, term in step.terms.items() if term.weight is not None}


def make(report=None, **settings):
    """A network of 4 x 4 patches without dropout, for images of 32 x 32."""
    encoder = {"patch_size": 8 // settings.get("sr_factor", 2), "embed_dim": 16, "depth": 1, "num_heads": 2}
    words = {"dim": 16, "depth": 1, "num_heads": 2, "mlp_dim": 32, "dropout": 0.0}
    spec = {name: settings.pop(name) for name in InputSpec._fields if name in settings}
    module = MRMPretrain(
        **{
            "encoder": partial(VisionTransformer, **encoder, qkv_bias=True, pos_embed="sincos", class_token=True),
            "decoder": partial(MAEDecoder, decoder_dim=16, depth=1, num_heads=2, num_prefix_tokens=1),
            "report": partial(ReportDecoder, **words | (report or {})),
        }
        | settings
    )
    size = {"channels": ("red", "green", "blue"), "image_size": (32, 32), "vocabulary": VOCABULARY}
    module.build(InputSpec(**size | spec))
    return module


def batch_of(lengths=(9, 6, 4)):
    ids = torch.randint(4, VOCABULARY["size"], (len(lengths), max(lengths)))
    ids[:, 0] = 2
    attention_mask = (torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]).long()
    ids *= attention_mask
    hidden = (torch.rand(ids.shape) < 0.5) & (attention_mask == 1)
    hidden[:, :1], hidden[:, 1:2] = False, True
    texts = {
        "input_ids": ids.masked_fill(hidden, 3),
        "attention_mask": attention_mask,
        "labels": ids.masked_fill(~hidden, -100),
    }
    return with_positions({
        "image": torch.randn(len(lengths), 1, 32, 32),
        "modality_mask": torch.ones(len(lengths), 2, dtype=torch.bool),
        "key": torch.arange(len(lengths)) * 1000 + 17,
        "subject_id": [str(i) for i in range(len(lengths))],
        **texts,
    })  # fmt: skip


def with_positions(batch, full=False):
    """List the hidden positions, once the texts are no wider than the longest, unless they are padded in full."""
    width = batch["labels"].shape[1] if full else int(batch["attention_mask"].sum(1).max())
    batch = batch | {name: batch[name][:, :width] for name in ("input_ids", "attention_mask", "labels")}
    labels = batch["labels"].flatten()
    return batch | {"hidden_index": (labels != -100).nonzero()[:, 0], "hidden_ids": labels[labels != -100]}


def part_of(batch, rows, full=False):
    part = {name: value[rows] for name, value in batch.items() if not name.startswith("hidden")}
    return with_positions(part, full)


def padded(batch):
    """Pad the texts to the length that the network was made for."""
    rest = (0, VOCABULARY["length"] - batch["labels"].shape[1])
    values = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return with_positions(batch | {name: F.pad(batch[name], rest, value=v) for name, v in values.items()}, full=True)


def without_words(batch):
    return with_positions(batch | {"labels": torch.full_like(batch["labels"], -100)})


def gradient(module, batch):
    module.zero_grad()
    module.step(batch, sync=True).loss().backward()
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.requires_grad])


def test_loss_is_the_papers():
    """Recompute Eqs. 1 to 3 patch by patch and word by word."""
    module, batch = make(mlm_weight=0.5, mim_weight=3.0), batch_of()
    output, mask = module.step(batch, sync=True), module.draw_mask(batch).mask
    network = module.network(batch, module.draw_mask(batch))
    errors = [
        (network.pred[b, i] - network.target[b, i]).square().mean() for b in range(3) for i in range(16) if mask[b, i]
    ]
    likelihoods, position = [], 0
    for b in range(3):
        for t in range(9):
            if batch["labels"][b, t] != -100:
                likelihoods.append(-network.logits[position].log_softmax(0)[batch["labels"][b, t]])
                position += 1
    image, report = torch.stack(errors).mean().item(), torch.stack(likelihoods).mean().item()
    assert output.terms["reconstruction"].value.item() == pytest.approx(image, rel=1e-5)
    assert output.terms["report"].value.item() == pytest.approx(report, rel=1e-5)
    assert output.loss().item() == pytest.approx(3 * image + 0.5 * report, rel=1e-5)
    assert {name: float(term.count) for name, term in output.terms.items()} == {
        "reconstruction": 36,
        "report": position,
    }


@pytest.mark.parametrize(("scope", "expected"), [("masked", 0.581575), ("real", 0.849815), ("all", 0.983935)])
def test_scopes_by_hand(scope, expected, monkeypatch):
    """R5 of the specification; its first position is the class token, its last padding."""
    module = make(mlm_scope=scope, vocabulary=VOCABULARY | {"length": 4})
    logits = torch.tensor([[0, 0, 0, 0], [math.log(3), 0, 0, 0], [0, 0, math.log(5), 0], [0, 0, 0, 0]])
    monkeypatch.setattr(module.network.report, "forward", lambda hybrid, attention_mask, index: logits[index])
    batch = batch_of((4,)) | {
        "input_ids": torch.tensor([[2, 3, 3, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0]]),
        "labels": torch.tensor([[-100, 0, 2, -100]]),
        "hidden_index": torch.tensor([1, 2]),
        "hidden_ids": torch.tensor([0, 2]),
    }
    output = module.step(batch, sync=True)
    assert output.terms["report"].value.item() == pytest.approx(expected, abs=1e-6)
    assert output.terms["report"].count == {"masked": 2, "real": 3, "all": 4}[scope]


def test_the_ablation_without_super_resolution():
    """Specification 2.8: what the encoder sees at factor 2 is the target at factor 1."""
    settings = {"encoder": partial(VisionTransformer, patch_size=16, embed_dim=16, depth=1, num_heads=2,
                                   class_token=True)}  # fmt: skip
    for factor, side, values in ((2, 448, 3072), (1, 224, 768)):
        network = make(sr_factor=factor, image_size=[side, side], **settings).network
        image = torch.randn(1, 1, side, side)
        assert network.low_resolution(image).shape == (1, 3, 224, 224)
        assert network.encoder.grid_size == (14, 14)
        assert network.target(image).shape == (1, 196, values)


def test_learning_rates_of_the_specification():
    """R6; the warm-up counts the step that is taken, so it is one step ahead of the specification's."""
    schedule, per_epoch = WarmupCosine(0.2), 10
    for epoch, rate in ((0.5, 1.875e-6), (20, 7.5e-5), (40, 1.5e-4)):
        assert 1.5e-4 * schedule.factor(int(epoch * per_epoch) - 1, 200 * per_epoch) == pytest.approx(rate, rel=1e-6)
    for epoch, rate in ((40, 1.5e-4), (80, 1.280330e-4), (120, 7.5e-5), (160, 2.196699e-5), (200, 0)):
        assert 1.5e-4 * schedule.factor(epoch * per_epoch, 200 * per_epoch) == pytest.approx(rate, rel=1e-6, abs=1e-12)
    finetune = WarmupCosine(50 / 3000)
    for step, rate in ((1, 6e-4), (25, 0.015), (50, 0.03)):
        assert 3e-2 * finetune.factor(step - 1, 3000) == pytest.approx(rate, rel=1e-9)
    for step, rate in ((1525, 0.015), (3000, 0)):
        assert 3e-2 * finetune.factor(step, 3000) == pytest.approx(rate, rel=1e-9, abs=1e-12)


def test_training_predicts_hidden_patches_only_and_loses_the_same():
    module, batch = make(), batch_of()
    training = module.step(batch, sync=True)
    module.eval()
    validation = module.step(batch, sync=False)
    assert training.reconstruction.pred.shape[1] == 12
    assert validation.reconstruction.pred.shape[1] == 16
    for name, loss in losses_of(training).items():
        assert validation.terms[name].value.item() == pytest.approx(loss.item(), rel=1e-5), name
        assert float(validation.terms[name].count) == float(training.terms[name].count)


@pytest.mark.parametrize("training", [True, False])
def test_all_patches_are_scored_where_none_is_hidden(training):
    module, batch = make(masker=RandomMasker(0.0)).train(training), batch_of()
    output = module.network(batch, module.draw_mask(batch))
    step = module.step(batch, sync=False)
    expected = (output.pred - output.target).square().mean()
    assert step.terms["reconstruction"].value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert step.terms["reconstruction"].count.item() == 48


@pytest.mark.parametrize(("ratio", "said"), [(0.0, True), (0.75, False)])
def test_a_run_says_that_nothing_is_hidden(ratio, said, capsys):
    """Specification 2.5."""
    module = make(masker=RandomMasker(ratio))
    module.trainer = pl.Trainer(logger=False, enable_checkpointing=False)
    module.on_fit_start()
    assert ("hides no patch" in capsys.readouterr().out) == said


@pytest.mark.parametrize("masker", [RandomMasker(0.75), RandomMasker(0.0)])
@pytest.mark.parametrize("text_to_image", [False, True])
def test_an_absent_image_has_no_part_in_anything(masker, text_to_image):
    module, batch = make(masker=masker, text_to_image=text_to_image), batch_of()
    batch["modality_mask"][1, 0] = False
    changed = batch | {"image": batch["image"] + 9 * ~batch["modality_mask"][:, :1, None, None]}
    losses, others = (losses_of(module.step(each, sync=True)) for each in (batch, changed))
    assert losses == others
    assert torch.equal(gradient(module, batch), gradient(module, changed))
    rest = module.step(part_of(batch, slice(0, 3, 2)), sync=True).terms["reconstruction"].value
    assert losses["reconstruction"].item() == pytest.approx(rest.item(), rel=1e-5)
    assert not module.reconstruct(batch).mask[1].any()
    assert not module.reconstruction_target(batch)[1][1].any()
    assert not module.token_features(batch).keep[1].any()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"text_to_image": True, "pool": "gmp"},
        {"masker": RandomMasker(0.0), "sr_factor": 1},
        {"report": {"tie_embeddings": False, "positions": "sincos"}, "mlm_scope": "real"},
        {
            "report": {"fusion": "all"},
            "mlm_scope": "all",
            "antialias": False,
            "target_norm": "dataset",
            "vocabulary": VOCABULARY | {"length": 9},
        },
        {"report": {"attend": "own"}, "mim_weight": 0.0, "target_norm": "unit"},
    ],
)
def test_every_parameter_is_used(settings):
    """Also where a rank meets no image or no word: DDP would wait for gradients that never come."""
    module, batch = make(**settings), batch_of()
    blind = batch | {"modality_mask": torch.zeros(3, 2, dtype=torch.bool)}
    for each in (batch, blind, without_words(batch)):
        module.zero_grad()
        loss = module.step(each, sync=True).loss()
        loss.backward()
        assert torch.isfinite(loss)
        for name, parameter in module.named_parameters():
            assert not parameter.requires_grad or parameter.grad is not None, name
            assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name


def test_nothing_is_idle_by_default():
    """Each gradient differs from 0, but the keys' bias, which softmax does not see."""
    module = make()
    gradient(module, batch_of())
    idle = {name for name, p in module.named_parameters() if p.requires_grad and not p.grad.abs().max() > 1e-9}
    assert all(name.endswith("key.bias") for name in idle), idle


def test_a_batch_can_be_overfitted():
    module, batch = make(), batch_of((6, 4))
    optimizer = torch.optim.AdamW(module.parameters(), lr=5e-3)
    history = []
    for _ in range(40):
        step = module.step(batch, sync=True)
        losses = losses_of(step)
        optimizer.zero_grad()
        step.loss().backward()
        optimizer.step()
        history.append({name: loss.item() for name, loss in losses.items()})
    assert history[-1]["report"] < 0.2 * history[0]["report"]
    assert history[-1]["reconstruction"] < 0.8 * history[0]["reconstruction"]


def test_hidden_words_know_their_samples_and_their_image():
    module, batch = make().eval(), batch_of()
    batch["control_image"] = torch.randn_like(batch["image"])
    own, other, none = (module.hidden_tokens(batch, name) for name in ("image", "control_image", "none"))
    rows, columns = (batch["labels"] != -100).nonzero(as_tuple=True)
    assert torch.equal(own.sample, rows)
    assert torch.equal(own.targets, batch["labels"][rows, columns])
    loss = F.cross_entropy(own.logits, own.targets)
    assert loss.item() == pytest.approx(module.step(batch, sync=False).terms["report"].value.item(), rel=1e-5)
    swapped = module.hidden_tokens(batch | {"image": batch["control_image"]})
    assert torch.equal(swapped.logits, other.logits)
    assert not torch.allclose(own.logits, other.logits)
    absent = torch.tensor([[False, True]] * 3)
    assert torch.equal(module.hidden_tokens(batch | {"modality_mask": absent}).logits, none.logits)


def test_panels_show_truth_where_it_was_visible():
    module, batch = make().eval(), batch_of()
    batch["modality_mask"][1, 0] = False
    output = module.reconstruct(batch)
    panels = module.panels(batch, output, 0)
    assert [panel.input.shape for panel in panels.values()] == [(32, 32), (16, 16)]
    for panel in panels.values():
        assert panel.hidden.mean() == 0.75
        assert (panel.prediction[~panel.hidden] == panel.input[~panel.hidden]).all()
        assert not (panel.prediction[panel.hidden] == panel.input[panel.hidden]).any()
    assert module.panels(batch, output, 1) == {}


def test_settings_without_a_meaning():
    with pytest.raises(ValueError, match="nothing to train on"):
        make(mlm_weight=0, mim_weight=0)
    with pytest.raises(UserError, match="multiple of sr_factor 2"):
        make(image_size=[33, 32])


def test_scoring_padding_needs_all_of_it():
    """Else the mean would hang on the longest text of the batch."""
    module, batch = make(mlm_scope="all"), batch_of()
    with pytest.raises(UserError, match=r"all 12 positions of a text, but .* to 9: set data\.text\.pad_to_length"):
        module.step(batch, sync=True)
    assert module.step(padded(batch), sync=True).terms["report"].count == 36


def loss_and_gradient(state, batch, scope="masked"):
    module = make(mlm_scope=scope).double()
    module.load_state_dict(state)
    step = module.step(batch, sync=True)
    losses = losses_of(step)
    assert {loss.dtype for loss in losses.values()} == {torch.float64}  # so that ranks can be held to 1e-10
    step.loss().backward()
    parts = [p.grad.flatten() for p in module.parameters() if p.requires_grad]
    return {name: loss.item() for name, loss in losses.items()}, torch.cat(parts)


@pytest.mark.ddp
@pytest.mark.parametrize("case", ["uneven", "no words on one rank", "no images on one rank", "all scored"])
def test_two_ranks_equal_one(rank_pool, case):
    batch = batch_of((11, 10, 3, 2))
    batch["image"] = batch["image"].double()
    if case == "no words on one rank":
        batch["labels"][2:] = -100
    elif case == "no images on one rank":
        batch["modality_mask"][:2, 0] = False
    scope = "all" if case == "all scored" else "masked"
    batch = padded(batch) if scope == "all" else with_positions(batch)
    state = make().double().state_dict()
    whole, whole_gradient = loss_and_gradient(state, batch, scope)
    parts = [part_of(batch, rows, scope == "all") for rows in (slice(0, 2), slice(2, 4))]
    assert len(parts[0]["hidden_ids"]) != len(parts[1]["hidden_ids"])
    results = rank_pool.run(loss_and_gradient, [(state, part, scope) for part in parts])
    for losses, _ in results:
        assert losses == pytest.approx(whole, rel=1e-10)
    # The gradient of a reduced sum reaches every rank as often as there are ranks, which DDP's mean divides by.
    assert torch.allclose((results[0][1] + results[1][1]) / 2, whole_gradient, rtol=1e-8, atol=1e-12)
