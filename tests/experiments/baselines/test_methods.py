"""Methods by themselves: a step on pictures and volumes, what depends on what, and what never may."""

import copy
import math

import pytest
import torch

from common.blocks.modality_vit import ModalityTransformer
from common.blocks.vit import VisionTransformer
from common.distributed import all_reduce_sum
from common.errors import CheckpointError, UserError
from common.types import InputSpec
from experiments.baselines.heads import PrototypeHead, light_decoder
from experiments.baselines.masked import MaskedPretrain, MultiMAEPretrain
from experiments.baselines.teacher import HiddenConfig, TeacherConfig, TeacherPretrain, prototype_information
from experiments.baselines.views import TwoViewPretrain

SPECS = {2: InputSpec(("R", "G", "B"), (32, 32)), 3: InputSpec(("t1", "t1c", "t2", "flair"), (32, 32, 32))}
TWO_VIEWS = ["simclr", "vicreg", "barlow"]
TEACHERS = ["mocov3", "byol", "dino", "ibot", "attmask"]


def small(cls=VisionTransformer, **more):
    def make(channels, size):
        return cls(channels, size, patch_size=8, embed_dim=24, depth=2, num_heads=2, **more)

    return make


def module_of(method, dims=2, **more):
    if method in ("mae", "simmim"):
        more |= {"fill": "learnable", "decoder": linear} if method == "simmim" else {}
        module = MaskedPretrain(encoder=small(), **more)
    elif method == "multimae":
        module = MultiMAEPretrain(encoder=small(ModalityTransformer), **more)
    elif method in TWO_VIEWS:
        module = TwoViewPretrain(method, encoder=small(), **more)
    else:
        config = TeacherConfig(prototypes=16, centre_momentum=0.5)
        module = TeacherPretrain(method, encoder=small(), teacher=more.pop("teacher", config), **more)
    module.build(SPECS[dims])
    return module


def linear(width, grid, out):
    from common.blocks.decoder import LinearDecoder

    return LinearDecoder(width, grid, out)


def batch_of(dims=2, batch=4, seed=0):
    spec, generator = SPECS[dims], torch.Generator().manual_seed(seed)
    return {
        "image": torch.randn(batch, len(spec.channels), *spec.image_size, generator=generator),
        "modality_mask": torch.ones(batch, len(spec.channels) if dims == 3 else 1, dtype=torch.bool),
        "key": torch.arange(batch) * 7919 + seed,
        "subject_id": [f"s{index}" for index in range(batch)],
    }


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("method", ["mae", "simmim", "multimae", *TWO_VIEWS, *TEACHERS])
def test_a_step_reaches_every_weight_and_repeats(method, dims):
    """Without a gradient a weight would make ranks wait for each other."""
    module, batch = module_of(method, dims), batch_of(dims)
    if method in ("ibot", "attmask"):
        module.hidden = HiddenConfig(probability=1.0)
    first = module.step(batch, sync=True).loss()
    first.backward()
    idle = [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]
    assert idle == []
    assert all(torch.isfinite(p.grad).all() for p in module.parameters() if p.grad is not None)
    assert not any("teacher" in name for name, p in module.named_parameters() if p.requires_grad)
    assert torch.equal(module.step(batch, sync=True).loss(), first)
    other = module.step(batch | {"key": batch["key"] + 1}, sync=True).loss()
    assert not torch.equal(other, first)


@pytest.mark.parametrize("method", [*TWO_VIEWS, *TEACHERS])
def test_validation_changes_nothing(method):
    module = module_of(method).eval()
    before = copy.deepcopy(module.state_dict())
    for seed in range(2):
        module.step(batch_of(seed=seed), sync=False)
    alone = module.step(batch_of(batch=1), sync=False)
    assert math.isfinite(alone.loss().item())
    if method in (*TWO_VIEWS, "mocov3"):
        assert [float(term.count) for term in alone.terms.values()] == [0.0] * len(alone.terms)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    for name in ("centre", "patch_centre"):
        if getattr(module.network, name, None) is not None:
            assert float(getattr(module.network, name).count) == 0


@pytest.mark.parametrize("method", ["simclr", "mocov3"])
def test_one_sample_is_refused_in_training(method):
    with pytest.raises(UserError, match=r"data\.batch_size"):
        module_of(method).step(batch_of(batch=1), sync=True)


@pytest.mark.parametrize("method", ["dino", "ibot"])
def test_centres_add_up_micro_batches_and_the_old_one_serves_the_loss(method):
    whole, parts = module_of(method), module_of(method)
    batch = batch_of()
    whole.step(batch, sync=True)
    for part in (slice(0, 2), slice(2, 4)):
        parts.step({name: value[part] for name, value in batch.items()}, sync=True)
    for module in (whole, parts):
        assert not module.network.centre.value.any(), "moves once, after the step"
        module.network.centre.move()
        assert module.network.centre.value.any()
    assert torch.allclose(whole.network.centre.value, parts.network.centre.value, atol=1e-6)


def test_hidden_patches_of_ibot_and_attmask():
    module, keys = module_of("attmask"), torch.arange(400)
    attention = torch.rand(400, 16)
    mask = module.draw_hidden(keys, (4, 4), (attention, attention))
    shares = mask.float().mean(1)
    assert 0.4 < float((shares > 0).float().mean()) < 0.6
    assert float(shares.max()) <= 0.5
    hidden = shares[:400] > 0
    means = [(attention * m).sum(1) / m.sum(1).clamp(min=1) for m in (mask[:400], ~mask[:400])]
    assert bool((means[0] > means[1])[hidden].all())
    boxes = module_of("ibot").draw_hidden(keys, (4, 4), None)
    assert not torch.equal(boxes[:400], boxes[400:]), "views have masks of their own"


def test_attention_of_the_last_block_against_the_slow_form():
    for class_token in (False, True):
        module = TeacherPretrain("attmask", encoder=small(class_token=class_token))
        module.build(SPECS[2])
        branch, image = module.network.student.eval(), batch_of()["image"]
        tokens, attention = branch.attention(image)
        assert torch.allclose(tokens, branch.encode(image), atol=1e-6)
        x = branch.encoder.encode_image(image, (1,)).hidden[0]
        block = branch.encoder.blocks[1]
        q, k, _ = block.attn.heads(block.norm1(x))
        slow = torch.stack([torch.softmax(q[:, h] @ k[:, h].transpose(1, 2) / 12**0.5, -1) for h in range(2)]).mean(0)
        expected = slow[:, 0, 1:] if class_token else slow.mean(1)
        assert torch.allclose(attention, expected, atol=1e-6)


def test_a_checkpoint_without_a_teacher_is_refused():
    module = module_of("dino")
    state = {key: value for key, value in module.state_dict().items() if "teacher" not in key}
    with pytest.raises(CheckpointError, match="holds no teacher"):
        module.on_load_checkpoint({"state_dict": state})


def test_schedules_are_functions_of_the_step(monkeypatch):
    module = module_of("dino", teacher=TeacherConfig(prototypes=16))
    module.total_steps = 100
    assert module.first_momentum() == pytest.approx(0.9)
    seen = []
    for step in (0, 15, 30, 100):
        monkeypatch.setattr(TeacherPretrain, "global_step", step)
        seen.append(module.temperatures().teacher)
    assert seen == pytest.approx([0.04, 0.055, 0.07, 0.07])
    module.total_steps = 100_000
    assert module.first_momentum() == 0.996


def test_prototypes_survive_a_copy_and_have_norm_one():
    head = PrototypeHead(24, 8)
    x = torch.randn(5, 24)
    assert float(head(x).abs().max()) <= 1 + 1e-6
    assert torch.equal(copy.deepcopy(head)(x), head(x))
    scaled = copy.deepcopy(head)
    scaled.prototypes.data *= 3
    assert torch.allclose(scaled(x), head(x), atol=1e-6)


def test_prototype_information():
    apart = torch.eye(4)
    assert prototype_information(apart.mean(0), 0.0) == pytest.approx(1)
    assert prototype_information(apart[0], 0.0) == pytest.approx(0, abs=1e-9), "one prototype for all"
    assert prototype_information(torch.full((4,), 0.25), math.log(4)) == pytest.approx(0, abs=1e-6), "all alike"


def test_equal_vectors_give_the_floors():
    for method in TWO_VIEWS:
        module = module_of(method).eval()
        for parameter in module.network.projector.parameters():
            parameter.data.zero_()
        if method == "simclr":
            module.network.projector[-1].bias.data.fill_(1.0)
        else:
            module.network.projector[-1].bias.data.fill_(0.5)
        module.step(batch_of(), sync=False)
        assert module.watched.loss == pytest.approx(module.watched.floor, rel=1e-4), method


def test_heads_follow_the_width():
    assert light_decoder(192, (4, 4), 12).blocks[0].norm1.weight.shape == (128,)
    assert len(light_decoder(768, (4, 4), 12).blocks) == 8


def test_one_modality_trains_and_noise_in_absent_ones_leaves_the_loss_equal():
    module, batch = module_of("multimae", 3), batch_of(3)
    batch["modality_mask"][0, 1:] = False
    batch["modality_mask"][1, 2] = False
    empty = batch["image"] * batch["modality_mask"][:, :, None, None, None]
    noisy = torch.where(batch["modality_mask"][:, :, None, None, None], empty, torch.randn_like(empty))
    losses = [module.step(batch | {"image": image}, sync=True).loss() for image in (empty, noisy)]
    assert torch.equal(losses[0], losses[1])
    losses[0].backward()
    encoder = module.network.encoder.eval()
    alone = encoder.forward_features(empty[:1])
    tokens = encoder.embed_modalities(empty[:1])[:, :64]
    assert torch.allclose(alone, encoder.encode_tokens(tokens, None), atol=1e-5)


def test_blocks_of_simmim():
    module = MaskedPretrain(encoder=small(), decoder=linear, fill="learnable", block=2)
    module.build(InputSpec(("R", "G", "B"), (64, 64)))
    mask = module.draw_mask({"key": torch.arange(5)}).mask.view(5, 8, 8)
    blocks = mask.unfold(1, 2, 2).unfold(2, 2, 2).flatten(3)
    assert bool((blocks.all(3) | ~blocks.any(3)).all())
    assert mask.flatten(1).sum(1).tolist() == [48] * 5
    with pytest.raises(UserError, match=r"model\.block"):
        MaskedPretrain(encoder=small(), block=3).build(SPECS[2])


def part_of(method, rows, seed):
    """Return loss and mean gradient of this rank's rows of a batch."""
    torch.manual_seed(seed)
    module = module_of(method).double()
    module.hidden = HiddenConfig(probability=1.0)
    batch = batch_of()
    batch = {name: value[rows] for name, value in batch.items()}
    loss = module.step(batch | {"image": batch["image"].double()}, sync=True).loss()
    loss.backward()
    from common.distributed import world_size

    gradients = [all_reduce_sum(p.grad) / world_size() for p in module.parameters() if p.grad is not None]
    return loss.detach(), torch.cat([gradient.flatten() for gradient in gradients])


@pytest.mark.ddp
@pytest.mark.parametrize("method", ["multimae", "vicreg", "mocov3", "ibot"])
def test_two_ranks_equal_one(rank_pool, method):
    """Batch normalisation, negatives, moments and hidden patches over both ranks; the same value on each."""
    whole, gradient = part_of(method, slice(0, 4), 0)
    for value, part in rank_pool.run(part_of, [(method, slice(0, 2), 0), (method, slice(2, 4), 0)]):
        assert value.item() == pytest.approx(whole.item(), abs=1e-6)
        assert torch.allclose(part, gradient, rtol=1e-5, atol=1e-6)
