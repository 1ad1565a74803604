import math
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from common.blocks.template_bank import TemplateBank
from common.blocks.uniformer import UniFormer3D
from common.callbacks.finite_check import FiniteCheck
from common.maskers.voxel_blocks import blocks_to_voxels
from common.module import StepOutput, Term
from common.runtime.configs import find_config, read_config
from common.types import InputSpec
from experiments.brainmvp.model import Views
from experiments.brainmvp.module import BrainMVPPretrain

CHANNELS = ["flair", "t1", "t1c", "t2"]
TINY = partial(UniFormer3D, embed_dims=(8, 8, 16, 16), depths=(1, 1, 1, 1), head_dim=8)


def losses_of(step):
    return {name: term.value for name, term in step.terms.items() if term.weight is not None}


def make(**settings):
    settings = {
        "encoder": TINY,
        "template_shape": (24, 24, 24),
    } | settings
    spec = {name: settings.pop(name) for name in InputSpec._fields if name in settings}
    module = BrainMVPPretrain(**settings)
    module.build(InputSpec(**{"channels": CHANNELS, "image_size": (16, 16, 16)} | spec))
    return module


def batch_of(size=3, unpaired=()):
    generator = torch.Generator().manual_seed(5)
    paired = torch.ones(size, dtype=torch.bool)
    paired[list(unpaired)] = False
    image, partner = (torch.rand(size, 1, 16, 16, 16, generator=generator) for _ in range(2))
    return {
        "image": image,
        "partner": partner * paired[:, None, None, None, None],
        "paired": paired,
        "modality": torch.arange(size) % 4,
        "partner_modality": (torch.arange(size) + paired.long()) % 4,
        "place": [(index % 4, index, 2, 3) for index in range(size)],
        "key": torch.arange(size) * 1000 + 17,
        "subject_id": [str(i) for i in range(size)],
    }


class Fixed(torch.nn.Module):
    """A network with given predictions, to check the assembly of the losses."""

    def __init__(self, cross, template):
        super().__init__()
        self.given = cross, template
        self.templates = TemplateBank(4, (24, 24, 24))

    def forward(self, cross, template):
        return Views(*(x.reshape(1, 1, 4, 1, 1) for x in self.given), torch.ones(1, 3), torch.ones(1, 3))


@pytest.mark.parametrize(("weights", "expected"), [({}, 2.25), ({"template_weight": 10.0}, 13.5)])
def test_the_specifications_assembly(weights, expected):
    module = make(**weights, block_size=1, mask_ratio=0.5)
    module.network = Fixed(torch.tensor([0.0, 2, 2, 4]), torch.tensor([1.0, 1, 3, 6]))
    image = torch.tensor([1.0, 2, 3, 4]).reshape(1, 1, 4, 1, 1)
    batch = batch_of(1) | {"image": image, "partner": image}
    step = module.step(batch, sync=True)
    losses = losses_of(step)
    assert losses["template"].item() == pytest.approx(1.25)
    assert losses["cross_modal"].item() == pytest.approx(0.5)
    assert losses["contrastive"].item() == 0.0
    assert StepOutput(
        step.terms | {"contrastive": Term(torch.tensor(0.5), 1, 1.0)}, None
    ).loss().item() == pytest.approx(expected)


def test_views_hold_what_they_should():
    module, batch = make(), batch_of(unpaired=[1])
    with torch.no_grad():
        module.network.templates.weight.uniform_()
        module.network.templates.extremes[:, 1] = 1
    inputs = module._inputs(batch)
    cross, template = (blocks_to_voxels(mask, (2, 2, 2), 8) for mask in module._hidden_blocks(batch))
    view = module.network.templates.view(batch["place"], (16, 16, 16))
    assert torch.equal(inputs.template, torch.where(template, view, batch["image"]))
    filled = torch.where(batch["paired"][:, None, None, None, None], batch["partner"], view)
    assert torch.equal(inputs.cross, torch.where(cross, filled, batch["image"]))
    assert not torch.equal(cross, template)
    assert cross.float().mean().item() == 0.875


def test_a_study_with_one_sequence_trains_what_it_can():
    module = make()
    step = module.step(batch_of(unpaired=[0, 1, 2]), True)
    whole, part = losses_of(module.step(batch_of(), True)), losses_of(step)
    assert part["cross_modal"].item() == 0
    assert part["template"].item() == pytest.approx(whole["template"].item(), rel=0.5)
    assert part["contrastive"].item() > 0
    step.loss().backward()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters() if p.grad is not None)


def test_gradients_reach_the_templates_that_were_looked_at_alone():
    module, batch = make(), batch_of(2)
    module.train()
    module.step(batch, sync=True).loss().backward()
    bank = module.network.templates
    assert [entry.place for entry in bank._seen] == batch["place"]
    bank.step(1e-3, [16, 16, 16])
    changed = (bank.weight != 0).flatten(1).any(1)
    assert changed.tolist() == [True, True, False, False]
    assert bank.weight.abs().max() <= 1.001e-3
    module.eval()
    module.step(batch, sync=False)
    assert not bank._seen


@pytest.mark.parametrize(
    ("progress", "terms", "same_fill"),
    [(0.1, {"cross_modal", "template"}, True), (0.5, {"cross_modal", "template"}, False),
     (0.7, {"cross_modal", "template", "contrastive"}, False)],
)  # fmt: skip
def test_phases(monkeypatch, progress, terms, same_fill):
    module, batch = make(template_warmup=0.2), batch_of()
    monkeypatch.setattr(BrainMVPPretrain, "progress", progress)
    module.train()
    assert losses_of(module.step(batch, sync=True)).keys() == terms
    inputs = module._inputs(batch, track=True)
    hidden = inputs.hidden
    assert torch.equal(inputs.cross[hidden], torch.zeros_like(inputs.cross[hidden])) == same_fill
    module.eval()
    assert "contrastive" in module.step(batch, sync=False).terms


def test_the_warm_up_of_the_public_code_ends_with_epoch_300():
    overlay = read_config(find_config("experiments/brainmvp/configs/upstream.yaml"))
    share = overlay["model"]["init_args"]["template_warmup"]
    assert [epoch for epoch in range(1500) if epoch / 1500 < share] == list(range(301))


@pytest.mark.parametrize("fill", ["cross", "template", "zero"])
def test_fills(fill):
    module, batch = make(fill=fill), batch_of(unpaired=[0])
    output = module.step(batch, sync=True)
    assert output.reconstruction is not None
    inputs = module._inputs(batch)
    assert inputs.scored.tolist() == [False, True, True]
    zero = bool((inputs.cross[inputs.hidden] == 0).all())
    assert zero == (fill != "cross")  # a fresh template is 0


def test_reconstruction_lies_with_its_sequence():
    module, batch = make().eval(), batch_of(unpaired=[2])
    batch["lesion"] = torch.zeros(3, 1, 16, 16, 16, dtype=torch.bool)
    batch["lesion"][:, :, :3] = True
    output = module.reconstruct(batch)
    assert output.pred.shape == output.target.shape == (3, 4, 4096, 1)
    assert torch.equal(output.target[1, 1, :, 0], batch["image"][1].flatten())
    assert output.mask.sum((1, 2)).tolist() == [3584, 3584, 0]
    assert not output.mask[1, 0].any()
    assert 0 < output.groups["lesion"].sum() < output.mask.sum()
    assert torch.equal(output.unchanged[1, 1, :, 0], module._inputs(batch).cross[1].flatten())
    hidden = output.mask[1, 1]
    assert torch.equal(output.unchanged[1, 1, hidden, 0], batch["partner"][1].flatten()[hidden])
    target, valid = module.reconstruction_target(
        {"image": torch.rand(2, 4, 16, 16, 16), "modality_mask": torch.ones(2, 4, dtype=torch.bool)}
    )
    assert target.shape == (2, 4, 4096, 1)
    assert valid.shape == (2, 4, 4096)
    image = torch.rand(2, 4, 16, 16, 16) - 0.5
    assert torch.equal(module.reconstruction_groups({"image": image})["foreground"], image.flatten(2) > 0)


def test_another_input_in_the_same_places():
    module, batch = make().eval(), batch_of(unpaired=[2])
    other = batch_of()
    batch |= {f"control_{name}": other[name].flip(0) for name in ("image", "partner", "paired")}
    own, control = module.reconstruct(batch), module.reconstruct(batch, "control_image")
    assert torch.equal(own.mask, control.mask)
    assert torch.equal(own.target, control.target)
    assert not torch.equal(own.pred, control.pred)


def test_a_batch_can_be_overfitted():
    module, batch = make(contrastive_weight=0.1), batch_of(2)
    optimizer = torch.optim.AdamW((p for p in module.parameters() if p.requires_grad), lr=3e-3)
    losses = []
    for _ in range(40):
        loss = module.step(batch, sync=True).loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        module.network.templates.step(3e-3, [16, 16, 16])
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_panels_and_features():
    module, batch = make().eval(), batch_of(2)
    panels = module.panels(batch, module.reconstruct(batch), 1)
    (panel,) = panels.values()
    assert list(panels) == ["t1"]
    assert "t1 filled with t1c" in panel.title
    assert (panel.prediction[~panel.hidden] == panel.input[~panel.hidden]).all()
    assert (panel.filled[~panel.hidden] == panel.input[~panel.hidden]).all()
    assert (panel.filled[panel.hidden] != panel.input[panel.hidden]).all()
    batch["image"][0] = 0
    features = module.token_features(batch)
    assert features.features["final"].shape == (2, 1, 16)
    assert features.keep.tolist() == [[False], [True]]


def test_what_it_refuses():
    with pytest.raises(ValueError, match="multiple of the block size 8"):
        make(image_size=[20, 16, 16])
    with pytest.raises(ValueError, match="contrastive_start"):
        make(contrastive_start=1000)
    with pytest.raises(ValueError, match="temperature"):
        make(temperature=0)
    assert math.isclose(make().progress, 1.0)


def trained(batches, forgiven):
    """Train on batches in order, at a learning rate that does not depend on how many there are."""
    module = make(contrastive_start=0)
    module.configure_optimizers = lambda: torch.optim.AdamW(module.parameter_groups(), lr=1e-2, fused=True)
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, logger=False, callbacks=[FiniteCheck(10, forgiven)],
                         enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return module.state_dict(), trainer.optimizers[0].state_dict()["state"]


@pytest.mark.parametrize("part", ["image", "partner"])
def test_a_step_that_is_not_finite_leaves_the_templates_where_they_are(part):
    """Weights, templates, their moments and the optimiser are those of a run that never met the batch, bit by bit."""
    batches = [batch_of(size) for size in (2, 3, 4)]
    bad = batch_of(3)
    bad[part] = bad[part].clone().index_fill_(0, torch.tensor([1]), math.nan)
    with_it, moments = trained([*batches[:2], bad, *batches[2:]], forgiven=1)
    without, expected = trained(batches, forgiven=0)
    assert without["network.templates.weight"].any()
    for key, value in without.items():
        assert torch.equal(with_it[key], value), key
    for index, state in expected.items():
        assert all(torch.equal(torch.as_tensor(moments[index][name]), torch.as_tensor(value))
                   for name, value in state.items())  # fmt: skip
