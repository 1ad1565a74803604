"""What a pre-training will take, worked out before anything is rented."""

import json

import pytest

from common.commands import main
from common.sweeps.cost import StepCost
from common.sweeps.plan import cost_of, hours, largest_batch, make_schedule, plan_line, read_machine

H200 = read_machine("h200x8")
SMALL = StepCost(parameters=100_000_000, forward=1e11, operations=3e11, activations=2**30)


def mae(width, depth, heads):
    """Masked autoencoding as published: a quarter of the patches encoded, a decoder of 8 blocks of 512."""
    encoder = {"patch_size": 16, "embed_dim": width, "depth": depth, "num_heads": heads, "class_token": True}
    return {
        "model": {
            "class_path": "experiments.mrm_genetics.module.RelationPretrain",
            "init_args": {
                "encoder": {"class_path": "common.blocks.vit.VisionTransformer", "init_args": encoder},
                "decoder": {
                    "class_path": "experiments.mrm_genetics.model.FusedDecoder",
                    "init_args": {"decoder_dim": 512, "depth": 8, "num_heads": 16},
                },
                "masker": {"class_path": "common.maskers.random.RandomMasker", "init_args": {"mask_ratio": 0.75}},
                "tau_image": 0.0,
                "match_weight": 0.0,
            },
        },
        "data": {"init_args": {"genetics": False}},
    }


@pytest.mark.parametrize(("sizes", "gflop"), [((1024, 24, 16), 41.5), ((768, 12, 12), 19.6)])
def test_operations_of_published_autoencoders(sizes, gflop):
    cost = cost_of(mae(*sizes))
    assert cost.forward / 1e9 == pytest.approx(gflop, rel=0.02)
    assert cost.operations / cost.forward == pytest.approx(3, rel=0.03)
    assert cost.activations > 2**20


def test_hours_of_the_specification():
    assert hours(5.9e18, H200.bf16_tflops, 0.25) == pytest.approx(6.6, rel=0.01)


def test_a_batch_smaller_than_the_gpus_is_warned_of():
    settings = {"data": {"init_args": {"batch_size": 4}}, "trainer": {"max_epochs": 10, "check_val_every_n_epoch": 5}}
    schedule = make_schedule(settings, 1000)
    assert (schedule.steps, schedule.validations) == (2500, 2)
    kept, scaled = (plan_line(SMALL, schedule, H200, 64, kept) for kept in (True, False))
    assert "batch 4 in all gives 0.06 samples a GPU on 64" in kept.warnings
    assert scaled.steps == 40
    assert kept.hours["low"] > kept.hours["middle"] > kept.hours["high"] > 0


def test_steps_decide_where_there_are_no_epochs():
    trainer = {"max_epochs": -1, "max_steps": 500, "check_val_every_n_epoch": None, "val_check_interval": 100}
    schedule = make_schedule({"data": {"init_args": {"loader": {"draws": 2}}}, "trainer": trainer}, 50)
    assert (schedule.batch_size, schedule.samples, schedule.steps, schedule.validations) == (4, 100, 500, 5)


def test_what_does_not_fit():
    assert largest_batch(SMALL, H200) == 117
    line = plan_line(SMALL._replace(activations=50 * 2**30), make_schedule(
        {"data": {"init_args": {}}, "trainer": {"max_epochs": 1}}, 100), H200, 1, True)  # fmt: skip
    assert any("does not fit: 2 samples a GPU do" in words for words in line.warnings)


def test_the_command(tmp_path, capsys):
    arguments = ["plan", "--config", "experiments/e_mim/configs/pretrain.yaml", "--config",
                 "experiments/e_mim/configs/small.yaml", "--samples", "1000", "--gpus", "1,64"]  # fmt: skip
    written = []
    for name in ("a.json", "b.json"):
        main([*arguments, "--out", str(tmp_path / name)])
        written.append((tmp_path / name).read_text())
    assert written[0] == written[1]
    assert len(json.loads(written[0])["lines"]) == 3
    assert "samples a GPU on 64" in capsys.readouterr().out
    for wrong, words in ((["--machine", "nowhere"], "a100x8, h200x8"), (["--gpus", "many"], "numbers with commas")):
        with pytest.raises(SystemExit):
            main([*arguments, *wrong])
        assert words in capsys.readouterr().err
