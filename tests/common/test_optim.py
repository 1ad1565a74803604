import pytest
import torch

from common.blocks.vit import VisionTransformer
from common.optim import WarmupCosine, WarmupLinear, param_groups


class Wrapper(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = VisionTransformer(1, (32, 32, 32), embed_dim=8, depth=3, num_heads=2)
        self.head = torch.nn.Linear(8, 2)


def test_groups_cover_everything_once_and_spare_what_must_not_decay():
    module = Wrapper()
    groups = param_groups(module)
    assert sum(len(g["params"]) for g in groups) == len(list(module.parameters()))
    spared = {id(p) for g in groups if g.get("weight_decay") == 0.0 for p in g["params"]}
    names = {name for name, p in module.named_parameters() if id(p) in spared}
    assert "encoder.pos_embed" in names
    assert "head.bias" in names
    assert "encoder.blocks.0.norm1.weight" in names
    assert "encoder.blocks.0.attn.qkv.weight" not in names
    assert "head.weight" not in names


def test_layer_decay_falls_towards_the_input():
    module = Wrapper()
    scales = {id(p): g["lr_scale"] for g in param_groups(module, layer_decay=0.5) for p in g["params"]}
    by_name = {name: scales[id(p)] for name, p in module.named_parameters()}
    assert by_name["head.weight"] == 1
    assert by_name["encoder.norm.weight"] == 1
    assert by_name["encoder.blocks.2.mlp.fc1.weight"] == 0.5
    assert by_name["encoder.patch_embed.proj.weight"] == 0.5**4
    with pytest.raises(ValueError, match="layer_decay"):
        param_groups(module, layer_decay=0)


def test_frozen_parameters_are_left_out():
    module = Wrapper()
    module.encoder.requires_grad_(False)
    assert sum(len(g["params"]) for g in param_groups(module)) == 2


def test_warmup_then_cosine():
    schedule = WarmupCosine(warmup=0.1, final=0.1)
    factors = [schedule.factor(step, 100) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == pytest.approx(1)
    assert factors[10] == pytest.approx(1)
    assert factors[55] == pytest.approx(0.55)
    assert factors[100] == pytest.approx(0.1)
    assert WarmupCosine(0).factor(0, 10) == 1


@pytest.mark.parametrize("schedule", [WarmupCosine(50), WarmupLinear(50)])
def test_warmup_in_steps(schedule):
    """R6 of masked record modeling, fine-tuning; in its warm-up, steps are counted from 1."""
    rates = {step: 0.03 * schedule.factor(step, 3000) for step in (0, 24, 49, 50, 1525, 3000)}
    assert rates == pytest.approx({0: 6e-4, 24: 0.015, 49: 0.03, 50: 0.03, 1525: 0.015, 3000: 0.0})


def test_the_two_falls_differ_between_their_middle_and_ends():
    """A quarter into the fall; the cosine's numbers are R6 of masked record modeling, pre-training."""
    assert 1.5e-4 * WarmupCosine(40).factor(80, 200) == pytest.approx(1.280330e-4)
    assert 1.5e-4 * WarmupCosine(40).factor(160, 200) == pytest.approx(2.196699e-5)
    assert WarmupLinear(40).factor(80, 200) == pytest.approx(0.75)
    assert WarmupLinear(40, final=0.2).factor(160, 200) == pytest.approx(0.2 + 0.8 * 0.25)


def test_a_share_is_rounded_to_steps_and_a_single_step_is_no_share():
    assert [WarmupLinear(0.02).factor(step, 100) for step in (0, 1)] == [0.5, 1]
    assert WarmupLinear(1).factor(0, 100) == 1
    assert WarmupLinear(1).factor(1, 100) == 1
    assert WarmupLinear(1).factor(100, 100) == 0


@pytest.mark.parametrize("warmup", [-0.1, 1.5, -3])
def test_no_other_warmup_is_taken(warmup):
    with pytest.raises(ValueError, match=r"share of all steps in \[0, 1\) or a whole number of steps, got"):
        WarmupCosine(warmup)


def test_schedule_honours_scales():
    parameters = [{"params": [torch.zeros(1)], "lr_scale": s} for s in (1.0, 0.25)]
    optimizer = torch.optim.SGD(parameters, lr=0.4)
    WarmupCosine(0.5)(optimizer, 4)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.2, 0.05])
