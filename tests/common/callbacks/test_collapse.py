"""The three scalars that tell a network that learned from one that collapsed."""

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from common.callbacks.effective_rank import EffectiveRank, spectrum_figure
from common.callbacks.floor_ratio import FloorRatio
from common.callbacks.prediction_diversity import PredictionDiversity
from common.module import SSLModule, StepOutput, Term
from common.optim import OptimizerConfig
from common.types import Reconstruction, TokenFeatures

N, P = 6, 4


class Stub(SSLModule):
    """Answers with whatever ``predict`` says of the target; positions 0 to 2 are hidden."""

    def __init__(self, predict, features=None):
        super().__init__(OptimizerConfig(torch.optim.SGD))
        self.predict = predict
        self.features = features
        self.network = torch.nn.Linear(1, 1)

    def build_network(self, spec):
        return self.network

    def reconstruct(self, batch, image="image"):
        target = batch["image"]
        mask = torch.zeros(target.shape[:3], dtype=torch.bool)
        mask[..., :3] = True
        mask &= batch["modality_mask"][:, :, None]
        first = mask.clone()
        first[..., 1:] = False
        return Reconstruction(self.predict(target), target, mask, {"first": first})

    def reconstruction_target(self, batch):
        return batch["image"], batch["modality_mask"][:, :, None].expand(-1, -1, N)

    def step(self, batch, sync):
        output = self.reconstruct(batch)
        loss = (output.pred - output.target).square().mean()
        return StepOutput({"reconstruction": Term(loss, 1, 1.0)}, output)

    def token_features(self, batch):
        keep = torch.ones(len(batch["image"]), N, dtype=torch.bool)
        return TokenFeatures({"final": self.features(batch)}, keep)

    def panels(self, batch, output, index):
        return {}

    def configure_optimizers(self):
        return None


def samples(count=40, modalities=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(count, modalities, N, P, generator=generator) + torch.arange(P)
    return [
        {"image": x, "modality_mask": torch.ones(modalities, dtype=torch.bool), "key": torch.tensor(i)}
        for i, x in enumerate(image)
    ]


def validate(module, callback, data, batch_size=8, reference=None):
    """Run one validation and return what was logged."""
    loader = DataLoader(data, batch_size=batch_size)
    trainer = pl.Trainer(callbacks=[callback], logger=False, enable_progress_bar=False, enable_model_summary=False,
                         accelerator="cpu")  # fmt: skip
    datamodule = pl.LightningDataModule()
    datamodule.val_dataloader = lambda: loader
    datamodule.reference_samples = lambda count: DataLoader(reference or data, batch_size=batch_size)
    (scalars,) = trainer.validate(module, datamodule=datamodule, verbose=False)
    return scalars


def test_the_best_constant_scores_one():
    data = samples()
    mean = torch.stack([s["image"] for s in data]).mean(0)
    scalars = validate(Stub(lambda target: mean.expand_as(target)), FloorRatio(), data)
    assert scalars["collapse/floor_ratio"] == pytest.approx(1.0, abs=1e-6)
    assert scalars["collapse/floor_ratio_first"] == pytest.approx(1.0, abs=1e-6)


def test_the_floor_is_the_error_of_the_constant_at_hidden_entries():
    data = samples()
    target = torch.stack([s["image"] for s in data])
    constant = target.mean(0)
    expected = (constant - target)[:, :, :3].square().mean().item()
    scalars = validate(Stub(lambda t: t + 0.5), FloorRatio(), data)
    assert scalars["collapse/floor"] == pytest.approx(expected, rel=1e-5)
    assert scalars["collapse/masked_mse"] == pytest.approx(0.25, rel=1e-5)
    assert scalars["collapse/floor_ratio"] == pytest.approx(0.25 / expected, rel=1e-5)


def test_the_floor_comes_from_the_training_samples():
    """A constant learned from other samples is what a collapsed network could know."""
    shifted = [s | {"image": s["image"] + 1} for s in samples(seed=1)]
    scalars = validate(Stub(lambda t: t), FloorRatio(), samples(), reference=shifted)
    assert scalars["collapse/floor"] > 1.0
    assert scalars["collapse/floor_ratio"] == 0.0


def test_a_group_has_the_best_constant_of_its_own():
    """What lies beside the group, as air does beside a brain, says nothing about it."""

    class Bright(Stub):
        def reconstruct(self, batch, image="image"):
            output = super().reconstruct(batch, image)
            return output._replace(groups={"bright": output.mask & self.reconstruction_groups(batch)["bright"]})

        def reconstruction_groups(self, batch):
            return {"bright": batch["image"].mean(3) > 2.2}

    data = samples()
    target = torch.stack([s["image"] for s in data])
    bright = target.mean(3, keepdim=True) > 2.2
    mean = (target * bright).sum(0) / bright.sum(0)
    expected = ((mean - target).square().mean(3) * bright[..., 0])[:, :, :3].sum() / bright[:, :, :3].sum()
    scalars = validate(Bright(lambda t: t + 0.5), FloorRatio(), data)
    assert scalars["collapse/floor_ratio_bright"] == pytest.approx(0.25 / expected.item(), rel=1e-5)
    assert scalars["collapse/floor_ratio"] == pytest.approx(
        0.25 / (target.mean(0) - target)[:, :, :3].square().mean().item(), rel=1e-5
    )


def test_what_the_input_alone_would_score():
    """Over the same masks and the same constant; nothing is logged where hidden entries are left out."""

    class Filled(Stub):
        def reconstruct(self, batch, image="image"):
            return super().reconstruct(batch, image)._replace(unchanged=batch["image"] - 0.3)

    scalars = validate(Filled(lambda t: t + 0.5), FloorRatio(), samples())
    floor = scalars["collapse/floor"]
    assert scalars["collapse/floor_ratio_identity"] == pytest.approx(0.09 / floor, rel=1e-4)
    assert scalars["collapse/floor_ratio"] == pytest.approx(0.25 / floor, rel=1e-4)
    assert "collapse/floor_ratio_identity" not in validate(Stub(lambda t: t), FloorRatio(), samples())


def test_absent_modalities_count_nowhere():
    data = samples()
    for sample in data[:10]:
        sample["modality_mask"] = torch.tensor([True, False])
    broken = [s | {"image": s["image"] + 1e6 * (~s["modality_mask"])[:, None, None]} for s in data]
    clean, wild = (
        validate(Stub(lambda t: torch.zeros_like(t)), FloorRatio(), d)["collapse/floor_ratio"] for d in (data, broken)
    )
    assert clean == wild


def test_uneven_last_batches_weigh_by_their_entries():
    data = samples(count=9)
    ratios = [validate(Stub(lambda t: t * 0.9), FloorRatio(), data, size)["collapse/floor_ratio"] for size in (2, 4, 9)]
    assert ratios == pytest.approx([ratios[0]] * 3, rel=1e-6)


@pytest.mark.parametrize(
    ("predict", "expected"),
    [(lambda t: torch.ones_like(t), 0.0), (lambda t: t, 1.0), (lambda t: 0.5 * t + 3, 0.25)],
)
def test_diversity_is_the_share_of_the_targets_variance(predict, expected):
    scalars = validate(Stub(predict), PredictionDiversity(), samples())
    assert scalars["collapse/prediction_diversity"] == pytest.approx(expected, abs=1e-9)


def test_diversity_is_that_of_numpy_whatever_the_batches():
    import numpy as np

    data = samples(count=11)
    predict = torch.nn.Tanh()
    target = torch.stack([s["image"] for s in data])[:, :, :3].double().numpy()
    expected = np.tanh(target).var(0).sum() / target.var(0).sum()
    for size in (1, 4, 11):
        scalars = validate(Stub(predict), PredictionDiversity(), data, size)
        assert scalars["collapse/prediction_diversity"] == pytest.approx(expected, rel=1e-5)


def test_effective_rank_of_known_features():
    """Features that live on k equal axes have rank k; equal features have rank 1."""
    axes = torch.eye(8)[:3]

    def three(batch):
        return axes.repeat(2, 1)[:N].expand(len(batch["image"]), N, 8)

    rank = validate(Stub(lambda t: t, three), EffectiveRank(), samples())["collapse/effective_rank"]
    # Centring takes one of the three directions away.
    assert rank == pytest.approx(2.0, abs=1e-3) or rank == pytest.approx(3.0, abs=1e-3)
    one = validate(Stub(lambda t: t, lambda b: torch.ones(len(b["image"]), N, 8)), EffectiveRank(), samples())
    assert one["collapse/effective_rank"] <= 1.0 + 1e-6


def test_the_spectrum_shows_where_training_began():
    spectra = {"final": torch.tensor([3.0, 2.0, 0.0]), "tap1": torch.tensor([1.0, 0.5, 0.1])}
    figure = spectrum_figure(spectra, spectra, step=10)
    assert len(figure.axes[0].lines) == 4
    assert len(spectrum_figure(spectra, {}, step=0).axes[0].lines) == 2


@pytest.mark.parametrize("callback", [FloorRatio, EffectiveRank, PredictionDiversity])
def test_other_modules_are_left_alone(callback):
    class Plain(pl.LightningModule):
        def validation_step(self, batch, batch_idx):
            self.log("val/loss", 1.0)

    assert validate(Plain(), callback(), samples()) == {"val/loss": 1.0}


def test_diversity_needs_no_complete_sample():
    """In an archive where everyone lacks something, each entry is compared among those who have it."""
    data = samples(count=12)
    for index, sample in enumerate(data):
        sample["modality_mask"] = torch.tensor([index % 2 == 0, index % 2 == 1])
    scalars = validate(Stub(lambda t: 0.5 * t + 3), PredictionDiversity(), data)
    assert scalars["collapse/prediction_diversity"] == pytest.approx(0.25, rel=1e-6)
