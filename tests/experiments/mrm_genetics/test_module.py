from functools import partial

import pytest
import torch

from common.blocks.vit import VisionTransformer
from common.errors import UserError
from common.losses.relation import sample_relations
from common.maskers.random import RandomMasker
from common.types import InputSpec
from experiments.mrm_genetics.callbacks import attention_figure, relations_figure
from experiments.mrm_genetics.model import FusedDecoder, GenomeEncoder, RelationConfig, RelationOutput
from experiments.mrm_genetics.module import MatchingConfig, RelationPretrain

GENOME = {"snp": 23, "pgs": 5}
VIT = {"patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2, "qkv_bias": True, "pos_embed": "sincos",
       "class_token": True, "norm_eps": 1e-6}  # fmt: skip


def losses_of(step):
    return {name: term.value for name, term in step.terms.items() if term.weight is not None}


def make(genome=GENOME, **settings):
    """A network of 4 x 4 patches and 6 tokens of a genome, without dropout, for images of 32 x 32."""
    small = {"decoder_dim": 16, "depth": 1, "num_heads": 2}
    module = RelationPretrain(
        **{
            "encoder": partial(VisionTransformer, **VIT),
            "genome_encoder": partial(GenomeEncoder, segments={"snp": 4, "pgs": 2}, depth=2, dropout=0.0),
            "decoder": partial(FusedDecoder, **small),
            "genome_decoder": partial(FusedDecoder, **small),
        }
        | settings
    )
    module.build(InputSpec(("red", "green", "blue"), (32, 32), genome=genome or {}))
    return module


def batch_of(size=4, genome=GENOME, absent=()):
    batch = {
        "image": torch.randn(size, 3, 32, 32),
        "key": torch.arange(size) * 1000 + 17,
        "subject_id": [str(i) for i in range(size)],
        "modality_mask": torch.ones(size, 3 if genome else 1, dtype=torch.bool),
        "complete": not absent,
    }
    if genome:
        batch |= {"genome": torch.randn(size, 28), "genome_observed": torch.rand(size, 28) > 0.1}
        for sample, kind in absent:
            batch["modality_mask"][sample, 1 + kind] = False
            columns = slice(0, 23) if kind == 0 else slice(23, 28)
            batch["genome"][sample, columns], batch["genome_observed"][sample, columns] = 0, False
    return batch


def test_total_loss_by_hand(monkeypatch):
    """Case 6 of the specification, with the vectors of case 4."""
    module = make(genome={"snp": 3})
    vectors = ([[3, 4], [1, 0]], [[0, 2], [1, 1]], [[4, 3], [0, 1]], [[0, 1], [2, 0]])
    pooled = tuple(torch.tensor(rows, dtype=torch.float64) for rows in vectors)
    image = torch.tensor([[[1.0, 0], [3, 6]]] * 2)
    output = RelationOutput(image, torch.tensor([[0.0, 0, 2], [2, 3, 1]]), pooled)
    monkeypatch.setattr(module.network, "forward", lambda *args, **settings: output)
    monkeypatch.setattr(module, "target", lambda image: torch.tensor([[[1.0, 2], [3, 4]]] * 2))
    batch = batch_of(2) | {
        "genome": torch.tensor([[0.0, 1, 2], [2, 0, 1]]),
        "genome_observed": torch.tensor([[True, True, True], [True, True, False]]),
    }
    step = module.step(batch, sync=True)
    assert {name: loss.item() for name, loss in losses_of(step).items()} == pytest.approx(
        {"image": 2.0, "genome": 2.0, "self": 0.125, "cross": 0.3940202025}
    )
    assert step.loss().item() == pytest.approx(4.5190202025)
    whole = batch | {"genome_observed": torch.ones(2, 3, dtype=torch.bool)}
    assert module.step(whole, sync=True).loss().item() == pytest.approx(4.1856868692)


def test_loss_is_the_papers():
    """Recompute Eqs. 7 to 14 value by value from what the network returns."""
    module, batch = make(match_weight=3.0).eval(), batch_of()
    step = module.step(batch, sync=True)
    output = module.network(batch["image"], module.genetics(batch))
    image = (output.image - module.network.encoder.patch_embed.patchify(batch["image"])).square().mean()
    assert step.terms["image"].value.item() == pytest.approx(image.item(), rel=1e-5)
    seen = batch["genome_observed"]
    genome = (output.genome - batch["genome"])[seen].square().mean()
    assert step.terms["genome"].value.item() == pytest.approx(genome.item(), rel=1e-5)
    z, g, zm, gm = output.pooled
    own = sum((sample_relations(a, a) - sample_relations(b, b)).square().sum() for a, b in ((z, zm), (g, gm))) / 32
    cross = (sample_relations(z, g) - sample_relations(zm, gm)).square().sum() / 16
    assert step.terms["self"].value.item() == pytest.approx(own.item(), rel=1e-4)
    assert step.terms["cross"].value.item() == pytest.approx(cross.item(), rel=1e-4)
    total = image + genome + 3 * (own + cross)
    assert step.loss().item() == pytest.approx(total.item(), rel=1e-5)
    assert float(step.terms["image"].count) == 64
    assert float(step.terms["genome"].count) == seen.sum()


def test_images_alone():
    module, batch = make(genome=None), batch_of(genome=None)
    step = module.step(batch, sync=True)
    assert step.terms.keys() == {"image", "self"}
    z, _, zm, _ = module.network(batch["image"]).pooled
    own = (sample_relations(z, z) - sample_relations(zm, zm)).square().mean()
    assert step.terms["self"].value.item() == pytest.approx(own.item(), rel=1e-5)
    without = make(genome=None, match_weight=0.0).step(batch, sync=True)
    assert without.terms.keys() == {"image"}


def gradients(module, batch):
    module.zero_grad()
    module.step(batch, sync=True).loss().backward()
    return {name: p.grad for name, p in module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("genome", "settings"),
    [
        (GENOME, {}),
        (GENOME, {"match_weight": 0.0}),
        (GENOME, {"tau_image": 0.0, "tau_genome": 0.0, "relations": RelationConfig("dedicated")}),
        (
            GENOME,
            {
                "relations": RelationConfig(tie_rule="rank", renormalize=True),
                "matching": MatchingConfig(center=True),
                "norm_pix_loss": True,
            },
        ),
        (GENOME, {"matching": MatchingConfig("cls", stop_gradient=True)}),
        (None, {}),
        (None, {"match_weight": 0.0}),
        (None, {"match_weight": 0.0, "tau_image": 0.0, "masker": RandomMasker(0.75)}),
    ],
)
def test_every_parameter_is_used(genome, settings):
    """Also where nobody in a batch has genetics: DDP would wait for gradients that never come."""
    module = make(genome, **settings)
    cases = [batch_of(genome=genome)]
    if genome:
        cases += [batch_of(absent=[(0, 0), (1, 1)]), batch_of(absent=[(i, k) for i in range(4) for k in (0, 1)])]
    for batch in cases:
        for name, gradient in gradients(module, batch).items():
            assert gradient is not None, name
            assert torch.isfinite(gradient).all(), name


def test_absent_genetics_change_nothing_by_their_values():
    module, batch = make(), batch_of(absent=[(1, 0), (2, 0), (2, 1)])
    changed = {**batch, "genome": torch.where(batch["modality_mask"][:, 1:].repeat_interleave(
        torch.tensor([23, 5]), dim=1), batch["genome"], torch.full((4, 28), 9.0))}  # fmt: skip
    one, two = (losses_of(module.step(each, sync=True)) for each in (batch, changed))
    for name, loss in one.items():
        assert loss.item() == pytest.approx(two[name].item(), rel=1e-5), name
    first, second = gradients(module, batch), gradients(module, changed)
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)


def test_masking_is_active_in_validation_and_off_in_features():
    module, batch = make(genome=None), batch_of(genome=None)
    assert module.train().step(batch, True).terms["image"].value.item() == pytest.approx(
        module.eval().step(batch, False).terms["image"].value.item(), rel=1e-6
    )
    features = module.token_features(batch).features["final"]
    assert torch.allclose(features, module.network.encoder.forward_features(batch["image"])[:, 1:])


def test_a_batch_can_be_overfitted():
    module, batch = make(), batch_of()
    optimizer = torch.optim.AdamW(module.parameters(), lr=5e-3)
    history = []
    for _ in range(60):
        step = module.step(batch, sync=True)
        losses = losses_of(step)
        optimizer.zero_grad()
        step.loss().backward()
        optimizer.step()
        history.append({name: loss.item() for name, loss in losses.items()})
    assert history[-1]["image"] < 0.8 * history[0]["image"]
    assert history[-1]["genome"] < 0.5 * history[0]["genome"]


def test_hidden_patches_are_all_that_masked_autoencoding_scores():
    module = make(genome=None, match_weight=0.0, tau_image=0.0, masker=RandomMasker(0.75))
    batch = batch_of(genome=None)
    output = module.reconstruct(batch)
    assert output.mask.sum(1).tolist() == [12] * 4
    moved = batch["image"] + 9 * module.network.encoder.patch_embed.unpatchify(
        output.mask[..., None].float().expand(-1, -1, 192)
    )
    assert torch.allclose(module.reconstruct(batch | {"image": moved}).pred, output.pred, atol=1e-5)
    panel = module.panels(batch, output, 0)["image"]
    assert panel.hidden.mean() == 0.75
    assert (panel.prediction[~panel.hidden] == panel.input[~panel.hidden]).all()


def test_panels_compare_all_where_nothing_is_hidden():
    for settings in ({}, {"norm_pix_loss": True}):
        module, batch = make(**settings), batch_of()
        panel = module.panels(batch, module.reconstruct(batch), 1)["image"]
        assert panel.input.shape == (32, 32, 3)
        assert panel.scored.all()
        assert not panel.hidden.any()
        assert 0 <= panel.prediction.min() <= panel.prediction.max() <= 1


def test_figures_draw():
    vectors = {name: torch.randn(5, 4) for name in ("image", "genome", "image_masked", "genome_masked")}
    assert len(relations_figure(vectors).axes) == 12
    rows = [("a", torch.rand(8, 8, 3), torch.rand(2, 2), torch.rand(2, 2))] * 2
    assert len(attention_figure(rows).axes) == 6


def test_settings_without_a_meaning():
    with pytest.raises(ValueError, match=r"tau_image .* \[0, 1\)"):
        make(tau_image=1.0)
    with pytest.raises(UserError, match="images alone"):
        make(masker=RandomMasker(0.75))


def loss_and_gradient(state, batch, settings):
    module = make(**settings).double()
    module.load_state_dict(state)
    step = module.step(batch, sync=True)
    losses = losses_of(step)
    assert {loss.dtype for loss in losses.values()} == {torch.float64}  # so that ranks can be held to 1e-9
    step.loss().backward()
    parts = [p.grad.flatten() for p in module.parameters() if p.requires_grad]
    return {name: loss.item() for name, loss in losses.items()}, torch.cat(parts)


def part_of(batch, rows):
    """Also one rank that is complete beside one that is not."""
    part = {name: value[rows] for name, value in batch.items() if name != "complete"}
    return part | {"complete": bool(part["modality_mask"].all())}


@pytest.mark.ddp
@pytest.mark.parametrize(
    ("genome", "absent"), [(True, ()), (True, ((0, 0), (1, 0), (1, 1))), (True, ((2, 0), (3, 1))), (False, ())]
)
def test_two_ranks_equal_one(rank_pool, genome, absent):
    settings = {} if genome else {"genome": None}
    batch = batch_of(genome=GENOME if genome else None, absent=absent)
    batch = {
        name: value.double() if getattr(value, "is_floating_point", bool)() else value for name, value in batch.items()
    }
    state = make(**settings).double().state_dict()
    whole, whole_gradient = loss_and_gradient(state, batch, settings)
    parts = [part_of(batch, slice(0, 2)), part_of(batch, slice(2, 4))]
    results = rank_pool.run(loss_and_gradient, [(state, part, settings) for part in parts])
    for losses, _ in results:
        assert losses == pytest.approx(whole, rel=1e-9)
    mean = torch.stack([gradient for _, gradient in results]).mean(0)
    assert torch.allclose(mean, whole_gradient, rtol=1e-8, atol=1e-12)
