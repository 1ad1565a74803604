"""Steps that are not finite: nothing of them reaches weights, optimiser, running statistics or files."""

import json
import math
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from common.callbacks.finite_check import FiniteCheck, describe
from common.checkpoint import load_encoder, read_checkpoint
from common.checkpoint_io import AtomicCheckpointIO, atomic_save
from common.errors import CheckpointError, NonFiniteError
from common.finite import check_finite, not_finite
from common.module import BuiltFromData
from common.optim import OptimizerConfig
from common.runtime.loggers import SummaryLogger
from common.types import InputSpec, TaskState
from common.weights.export import export
from tests.common.test_checkpoint import run_folder  # noqa: F401


class Toy(BuiltFromData):
    """Two losses of a batch ``(x, poison)``; the poison makes one of them, or a gradient, NaN."""

    def __init__(self, optimizer, kind="loss"):
        super().__init__(OptimizerConfig(optimizer))
        self.state = TaskState(InputSpec(("a",), (1,)))
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.kind = kind

    def build_network(self, spec):
        raise AssertionError

    def training_step(self, batch, batch_idx):
        x, poison = batch["x"], batch["poison"]
        if self.kind == "input":
            x = x + torch.where(poison > 0, math.nan, 0.0)
        out = self.network(x)
        # The root of 0 has an infinite gradient, which times 0 is NaN, while the loss is a number.
        extra = torch.where(poison > 0, math.inf if self.kind == "loss" else 0.0, 0.0)
        root = (out.mean() * torch.where(poison > 0, 0.0, 1.0)).square().sqrt()
        losses = {"square": out.square().mean() + extra, "root": root}
        loss = sum(losses.values())
        self.log_dict({f"train/loss_{name}": value.detach() for name, value in losses.items()}, batch_size=1)
        self.log("train/loss", loss.detach(), batch_size=1)
        return loss

    def configure_optimizers(self):
        return self.optimization.optimizer(self.network.parameters())


def loader(count, bad=(), leave_out=()):
    torch.manual_seed(1)
    batches = [{"x": x, "poison": torch.tensor(float(i in bad)), "subject_id": [f"case {i}"] * 4}
               for i, x in enumerate(torch.randn(count, 6, 3))]  # fmt: skip
    return DataLoader([batch for i, batch in enumerate(batches) if i not in leave_out], batch_size=None)


def train(module, data, forgiven=0, every=10, **more):
    check = FiniteCheck(every, forgiven)
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, logger=more.pop("logger", False), callbacks=[check],
                         enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                         plugins=[AtomicCheckpointIO()], **more)  # fmt: skip
    trainer.fit(module, data)
    return trainer, check


OPTIMIZERS = {
    "AdamW": partial(torch.optim.AdamW, lr=0.1, weight_decay=0.3),
    "fused AdamW": partial(torch.optim.AdamW, lr=0.1, weight_decay=0.3, fused=True),
    "SGD": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.3),
    "fused SGD": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.3, fused=True),
    "fused Adam": partial(torch.optim.Adam, lr=0.1, fused=True, amsgrad=True),
    "RMSprop": partial(torch.optim.RMSprop, lr=0.1, momentum=0.9),
}


def everything(trainer):
    """Return all weights, running statistics and the optimiser's state."""
    state = dict(trainer.lightning_module.state_dict())
    for index, values in trainer.optimizers[0].state_dict()["state"].items():
        state |= {f"{index} {name}": torch.as_tensor(value) for name, value in values.items() if value is not None}
    return state


@pytest.mark.parametrize("kind", ["loss", "gradient", "input"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_bad_step_leaves_everything_as_if_it_had_not_been(name, kind):
    clip = None if kind == "input" else 0.5
    whole, check = train(Toy(OPTIMIZERS[name], kind), loader(8, bad=(0, 4)), forgiven=2, gradient_clip_val=clip)
    assert check.skipped == 2
    without, _ = train(Toy(OPTIMIZERS[name], kind), loader(8, leave_out=(0, 4)), gradient_clip_val=clip)
    a, b = everything(whole), everything(without)
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key
    assert not hasattr(whole.optimizers[0], "found_inf")


@pytest.mark.parametrize("name", ["AdamW", "fused AdamW"])
def test_one_bad_batch_takes_its_accumulated_step_along(name):
    whole, check = train(Toy(OPTIMIZERS[name]), loader(8, bad=(2,)), forgiven=1, accumulate_grad_batches=2)
    assert check.skipped == 1
    without, _ = train(Toy(OPTIMIZERS[name]), loader(8, leave_out=(2, 3)), accumulate_grad_batches=2)
    a, b = everything(whole), everything(without)
    for key in a:
        assert torch.equal(a[key], b[key]), key


def test_the_run_stops_at_the_next_look_with_one_sentence(capsys):
    module = Toy(OPTIMIZERS["fused AdamW"])
    with pytest.raises(NonFiniteError) as stop:
        train(module, loader(30, bad=(12, 13)), every=5)
    assert str(stop.value).startswith(
        "Stopped at step 13: the loss (loss_square) is not finite, with the samples case 12, case 12, case 12 and 1 "
        "more. No weight has seen it. Lower the learning rate"
    )
    assert len(str(stop.value)) <= 320
    assert module.trainer.global_step == 15
    assert not not_finite(module.state_dict())
    assert len({id(t) for t in module.network.parameters()}) == 6
    with pytest.raises(NonFiniteError, match=r"step 13: the gradient is not finite, with the samples case 12"):
        train(Toy(OPTIMIZERS["AdamW"], "gradient"), loader(14, bad=(12,)), every=50)
    trainer, _ = train(Toy(OPTIMIZERS["AdamW"]), loader(14, bad=(12,)), forgiven=1, every=7)
    assert trainer.callback_metrics["throughput/skipped_steps"] == 1
    assert "skipped step 13: the loss (loss_square)" in capsys.readouterr().out


def test_without_our_command_the_check_is_there_too():
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
                         enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    with pytest.raises(NonFiniteError, match="step 2"):
        trainer.fit(Toy(OPTIMIZERS["AdamW"]), loader(4, bad=(1,)))


def test_what_a_run_forgave_is_counted_over_its_restarts(tmp_path):
    trainer, check = train(Toy(OPTIMIZERS["AdamW"]), loader(4, bad=(1,)), forgiven=1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = FiniteCheck(10, 1)
    again.load_state_dict(check.state_dict())
    assert again.skipped == 1
    stored = read_checkpoint(tmp_path / "last.ckpt")["callbacks"]
    assert {"skipped": 1} in stored.values()


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    """Finite gradients and an infinite learning rate: only the weights show it."""
    trainer, _ = train(Toy(OPTIMIZERS["AdamW"]), loader(2))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    trainer.optimizers[0].state[next(trainer.lightning_module.parameters())]["exp_avg"][0] = math.inf
    with pytest.raises(NonFiniteError, match="nothing was saved at step 2: state exp_avg of optimiser 0, parameter 0"):
        trainer.save_checkpoint(tmp_path / "last.ckpt")
    with torch.no_grad():
        trainer.lightning_module.network[2].weight[0] = math.nan
    with pytest.raises(NonFiniteError, match=r"network\.2\.weight holds NaN or infinity"):
        trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    check_finite(read_checkpoint(tmp_path / "last.ckpt")["state_dict"], "it")


def test_a_diverging_learning_rate_stops_the_run_and_no_file_holds_it():
    module = Toy(partial(torch.optim.SGD, lr=1e30))
    with pytest.raises(NonFiniteError, match=r"Stopped at step \d: the loss"):
        train(module, loader(20), every=3)


def test_debugging_names_the_first_module_or_loss_that_is_not_finite():
    make = OPTIMIZERS["AdamW"]
    with pytest.raises(NonFiniteError, match=r"Step 3: the output of network\.0 \(Linear\) .* its input is not either"):
        train(Toy(make, "input"), loader(4, bad=(2,)), detect_anomaly=True)
    with pytest.raises(NonFiniteError, match=r"Step 3: train/loss_square is inf, computed from modules whose outputs"):
        train(Toy(make), loader(4, bad=(2,)), detect_anomaly=True)
    with pytest.raises(NonFiniteError, match=r"Step 3: Function 'SqrtBackward0' returned nan|'PowBackward0' returned"):
        train(Toy(make, "gradient"), loader(4, bad=(2,)), detect_anomaly=True)
    assert not torch.is_anomaly_enabled()


def test_the_sentence_names_the_rank_whose_loss_it_was():
    from common.callbacks.finite_check import _Finding

    first = _Finding(7, [], ["a", "b"])
    text = describe([[first], [_Finding(7, ["loss_mim"], ["x" * 50, "y"]), _Finding(8, ["loss_mlm"], ["z"])]])
    assert text == f"step 7: the loss (loss_mim) is not finite on rank 1, with the samples {'x' * 27}..., y"
    assert describe([[first], []]) == "step 7: the gradient is not finite, with the samples a, b"
    assert describe([[_Finding(7, [], [])]]).endswith("with the samples (without names)")


def test_summaries_say_what_was_not_finite(tmp_path):
    logger = SummaryLogger(str(tmp_path))
    for step, value in enumerate([3.0, 2.0, math.nan, math.inf]):
        logger.log_metrics({"train/loss": value, "never": math.nan}, step)
    logger.save()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["scalars"] == {"train/loss": {"first": 3.0, "final": None, "best": 2.0, "best_step": 1}}
    assert summary["not_finite"] == {
        "train/loss": {"first_step": 2, "times": 2},
        "never": {"first_step": 0, "times": 4},
    }
    again = SummaryLogger(str(tmp_path))
    again.log_metrics({"train/loss": 1.0}, 9)
    again.save()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["scalars"]["train/loss"] == {"first": 3.0, "final": 1.0, "best": 1.0, "best_step": 9}
    assert summary["not_finite"]["train/loss"] == {"first_step": 2, "times": 2}


def test_encoders_that_are_not_finite_are_neither_loaded_nor_exported(run_folder, tmp_path):  # noqa: F811
    folder, _ = run_folder
    content = torch.load(folder / "checkpoints/best.ckpt", weights_only=True)
    content["state_dict"]["network.encoder.norm.bias"][3] = math.nan
    atomic_save(content, folder / "checkpoints/best.ckpt")
    with pytest.raises(CheckpointError, match=r"holds NaN or infinity in norm\.bias: its training diverged"):
        load_encoder(folder)
    with pytest.raises(CheckpointError, match=r"norm\.bias"):
        export("e_mim", folder, "monai", tmp_path / "out")
    assert not (tmp_path / "out").exists()
