from functools import partial

import lightning.pytorch as pl
import pytest
import torch

from common.blocks.vit import VisionTransformer
from common.distributed import loss_and_gradient
from common.errors import CheckpointError
from common.losses.barlow_twins import token_barlow_twins
from common.losses.reconstruction import masked_mse
from common.maskers.hybrid import HybridMasker
from common.types import InputSpec
from experiments.e_mim.module import EMIMPretrain

CHANNELS = ("t1c", "t1n", "t2f")


def losses_of(step):
    return {name: term.value for name, term in step.terms.items() if term.weight is not None}


def make(**settings):
    encoder = partial(VisionTransformer, embed_dim=24, depth=2, num_heads=2)
    module = EMIMPretrain(encoder=encoder, taps=(1, 2), **settings)
    module.build(InputSpec(CHANNELS, (32, 32, 32)))
    return module


def batch_of(size=4, missing=False):
    modality_mask = torch.ones(size, 3, dtype=torch.bool)
    image = torch.rand(size, 3, 32, 32, 32)
    if missing:
        modality_mask[0, 1] = modality_mask[1, 0] = modality_mask[1, 2] = False
        image[~modality_mask] = 0
    keys = torch.arange(size) * 1000 + 17
    return {"image": image, "modality_mask": modality_mask, "key": keys, "subject_id": [str(i) for i in range(size)]}


def test_loss_is_the_papers():
    """Recompute Eqs. 1, 4, 8 and the weighted sum from the network's own tokens."""
    module, batch = make(barlow_twins_weight=0.3, reduction="sum"), batch_of()
    step = module.step(batch, sync=True)
    losses, mask = losses_of(step), module.draw_mask(batch)
    output = module.network(batch["image"], mask)
    error = (output.pred - module.network.patches(batch["image"])).square().mean(-1)
    assert losses["reconstruction"].item() == pytest.approx(error[mask.mask].mean().item(), rel=1e-5)
    pyramid = sum(
        token_barlow_twins(a, b, reduction="sum").item() for a, b in zip(output.clean, output.masked, strict=True)
    )
    assert losses["barlow_twins"].item() == pytest.approx(pyramid, rel=1e-5)
    total = losses["reconstruction"].item() + 0.3 * losses["barlow_twins"].item()
    assert step.loss().item() == pytest.approx(total, rel=1e-5)


def test_absent_modalities_are_neither_target_nor_input():
    module, batch = make(), batch_of(missing=True)
    expected = module.step(batch, sync=True).terms["reconstruction"].value
    changed = dict(batch, image=batch["image"] + 9 * ~batch["modality_mask"][:, :, None, None, None])
    assert torch.equal(module.step(changed, sync=True).terms["reconstruction"].value, expected) or torch.allclose(
        module.step(changed, sync=True).terms["reconstruction"].value, expected
    )
    scored = module.step(batch, sync=True).reconstruction.mask
    assert not scored[~batch["modality_mask"]].any()


def test_loss_on_all():
    module, batch = make(loss_on="all"), batch_of(missing=True)
    scored = batch["modality_mask"][:, :, None].expand(-1, -1, 8)
    output = module.reconstruct(batch)
    expected = masked_mse(output.pred, output.target, scored)
    module.train()
    assert module.step(batch, sync=True).terms["reconstruction"].value.item() == pytest.approx(
        expected.item(), rel=1e-5
    )


def test_without_a_pyramid_the_full_volume_is_never_encoded(monkeypatch):
    module, batch = make(barlow_twins_weight=0.0), batch_of()
    calls = []
    encode = VisionTransformer.encode
    monkeypatch.setattr(
        VisionTransformer, "encode", lambda self, x, taps=(): calls.append(len(x)) or encode(self, x, taps)
    )
    losses = losses_of(module.step(batch, sync=True))
    assert calls == [4]
    assert "barlow_twins" not in losses


def test_detached_branch_gets_no_gradient():
    """With the clean branch detached the pyramid still pulls on the masked one."""
    gradients = {}
    for detach in (False, True):
        module = make(detach_clean=detach)
        module.step(batch_of(), sync=True).terms["barlow_twins"].value.backward()
        gradients[detach] = module.network.encoder.blocks[0].mlp.fc1.weight.grad.clone()
    assert gradients[True].abs().sum() > 0
    assert not torch.allclose(gradients[True], gradients[False])


def test_a_batch_can_be_overfitted():
    module, batch = make(), batch_of(2)
    optimizer = torch.optim.AdamW(module.parameters(), lr=2e-3)
    losses = []
    for _ in range(60):
        loss = module.step(batch, sync=True).loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.4 * losses[0]


def test_the_same_seed_gives_the_same_network():
    first, second = make(), make()
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_masks_follow_keys_whatever_the_batch():
    module, batch = make(), batch_of()
    whole = module.draw_mask(batch).mask
    part = {name: value[2:] for name, value in batch.items()}
    assert torch.equal(whole[2:], module.draw_mask(part).mask)


@pytest.mark.parametrize(
    "settings",
    [
        {"correlation_axis": "feature"},
        {"reduction": "sum", "loss_on": "all", "barlow_twins_weight": 1.0},
        {"correlation_sum": "sample"},
        {"correlation_center": True},
        {"mask_fill": "learnable", "masker": HybridMasker(modal=False, patch=False), "barlow_twins_weight": 0.0},
        {"masker": HybridMasker(False, False, False)},
    ],
)
def test_variants_train(settings):
    module = make(**settings)
    loss = module.step(batch_of(missing=True), sync=True).loss()
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in module.parameters() if p.grad is not None)


def test_combinations_without_a_meaning():
    with pytest.raises(ValueError, match="correlation_sum='sample'"):
        make(correlation_sum="sample", correlation_axis="feature")
    with pytest.raises(ValueError, match="mask_fill='drop'"):
        make(mask_fill="drop")


def test_token_features_leave_air_out():
    module, batch = make(), batch_of(2)
    batch["image"][0, :, :16] = 0
    features = module.token_features(batch)
    assert list(features.features) == ["final", "tap1"]
    assert features.keep.sum(1).tolist() == [4, 8]


def test_the_foreground_is_every_position_with_tissue_in_some_modality():
    """The constant of the foreground is made of what is scored as such: ``_groups`` and ``reconstruction_groups``."""
    module, batch = make().eval(), batch_of(2)
    batch["image"][:, :, :16] = 0
    batch["image"][0, 2, 3, 20, 9] = 0.1
    patches = module.network.patches(batch["image"])
    wanted = torch.tensor([[bool((patches[b, :, n] != 0).any()) for n in range(8)] for b in range(2)])
    assert wanted.sum(1).tolist() == [5, 4]
    groups = module.reconstruction_groups(batch)
    assert torch.equal(groups["foreground"], wanted[:, None].expand(-1, 3, -1))
    output = module.reconstruct(batch)
    assert torch.equal(output.groups["foreground"], output.mask & groups["foreground"])


def test_panels_show_truth_where_it_was_visible():
    module, batch = make(), batch_of(2)
    panels = module.panels(batch, module.reconstruct(batch), 0)
    assert tuple(panels) == CHANNELS
    panel = panels["t1c"]
    assert panel.input.shape == (32, 32)
    assert (panel.prediction[~panel.hidden] == panel.input[~panel.hidden]).all()


def test_sizes_are_needed_without_data():
    module = EMIMPretrain()
    module.configure_model()  # as `load_from_checkpoint` does, whose checkpoint brings them later
    assert module.network is None
    with pytest.raises(CheckpointError, match="attach a data module"):
        _ = module.spec
    module.trainer = pl.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False)
    with pytest.raises(CheckpointError, match="attach a data module"):
        module.configure_model()


@pytest.mark.ddp
def test_two_ranks_equal_one(rank_pool):
    """The sum of masked error and pyramid, with ranks that hide different amounts."""
    n, d = 6, 5
    target, mask = torch.randn(4, n, d, dtype=torch.float64), torch.rand(4, n) < 0.5
    clean, hidden = torch.randn(4, n, d, dtype=torch.float64), torch.randn(4, n, d, dtype=torch.float64)
    weight = torch.randn(d, d, dtype=torch.float64)
    parts = [slice(0, 2), slice(2, 4)]
    for loss, tensors, projected in (
        (masked_mse, {"pred": hidden, "target": target, "mask": mask}, ["pred"]),
        (token_barlow_twins, {"a": clean, "b": hidden}, ["a", "b"]),
    ):
        whole, gradient = loss_and_gradient(loss, tensors, projected, weight)
        jobs = [(loss, {k: v[p] for k, v in tensors.items()}, projected, weight) for p in parts]
        for value, part_gradient in rank_pool.run(loss_and_gradient, jobs):
            assert value.item() == pytest.approx(whole.item(), rel=1e-10)
            assert torch.allclose(part_gradient, gradient, rtol=1e-9, atol=1e-12)
