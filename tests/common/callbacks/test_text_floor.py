import math

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from common.callbacks.text_floor import TextFloor, frequent_tokens, unigram_log_likelihood
from common.module import SSLModule
from common.types import HiddenTokens

COUNTS = torch.tensor([0, 2, 6, 2, 6, 0, 1, 3])


class Stub(SSLModule):
    """Predicts whatever ``answer`` says of the true tokens."""

    build_network = step = reconstruct = reconstruction_target = token_features = panels = None

    def __init__(self, answer):
        super().__init__({})
        self.network = torch.nn.Linear(1, 1)
        self.answer = answer

    def hidden_tokens(self, batch):
        return HiddenTokens(self.answer(batch), batch, torch.zeros_like(batch))

    def validation_step(self, batch, batch_idx):
        return {"reconstruction": None}


def validate(module, targets, sizes):
    """Run one validation, with so many hidden tokens in each batch, and return what was logged."""
    trainer = pl.Trainer(callbacks=[TextFloor()], logger=False, enable_progress_bar=False, enable_model_summary=False,
                         accelerator="cpu")  # fmt: skip
    datamodule = pl.LightningDataModule()
    datamodule.val_dataloader = lambda: DataLoader(targets.split(sizes), batch_size=None)
    datamodule.token_counts = lambda: COUNTS
    (scalars,) = trainer.validate(module, datamodule=datamodule, verbose=False)
    return scalars


def certain_of(tokens):
    return 50 * torch.nn.functional.one_hot(tokens, len(COUNTS)).float()


def test_unigrams_are_smoothed_by_one():
    likelihood = unigram_log_likelihood(COUNTS)
    assert likelihood.exp().tolist() == pytest.approx([c / 28 for c in (1, 3, 7, 3, 7, 1, 2, 4)], rel=1e-12)
    assert likelihood.exp().sum().item() == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize(
    ("share", "expected"),
    [(0.5, [2, 4]), (0.6, [2, 4]), (0.61, [2, 4, 7]), (0.3, [2]), (0.0, []), (1.0, [1, 2, 3, 4, 6, 7])],
)
def test_frequent_tokens_by_hand(share, expected):
    """Of 20 tokens, 6 and 6 are 60 %."""
    assert frequent_tokens(COUNTS, share).nonzero()[:, 0].tolist() == expected


@pytest.mark.parametrize("sizes", [[9], [1, 8], [4, 0, 5]])
def test_knowing_frequencies_alone_scores_one(sizes):
    targets = torch.tensor([2, 2, 4, 7, 0, 1, 2, 5, 3])
    scalars = validate(Stub(lambda t: unigram_log_likelihood(COUNTS).expand(len(t), -1)), targets, sizes)
    floor = -sum(math.log((int(COUNTS[t]) + 1) / 28) for t in targets) / 9
    assert scalars["collapse/text_floor_ratio"] == pytest.approx(1, abs=1e-6)
    assert scalars["collapse/text_floor"] == pytest.approx(floor, rel=1e-6)
    assert scalars["val/token_accuracy"] == pytest.approx(3 / 9)


def test_accuracy_of_frequent_and_rare_tokens():
    """Right on 2, 3 and 7; 2 and 4 are frequent. Batches weigh by their tokens."""
    targets = torch.tensor([2, 4, 4, 2, 3, 7, 1, 0, 2])
    known = torch.tensor([2, 3, 7])
    scalars = validate(Stub(lambda t: certain_of(t.where(torch.isin(t, known), torch.tensor(6)))), targets, [2, 7])
    assert scalars["val/token_accuracy"] == pytest.approx(5 / 9)
    assert scalars["val/token_accuracy_frequent"] == pytest.approx(3 / 5)
    assert scalars["val/token_accuracy_rare"] == pytest.approx(2 / 4)
    assert scalars["collapse/text_floor_ratio"] > 1


def test_knowing_everything_scores_nothing():
    scalars = validate(Stub(certain_of), torch.tensor([2, 4, 4]), [3])
    assert scalars["collapse/text_floor_ratio"] == pytest.approx(0, abs=1e-6)
    assert "val/token_accuracy_rare" not in scalars


def test_nothing_hidden_and_other_modules_are_left_alone():
    class Plain(pl.LightningModule):
        def validation_step(self, batch, batch_idx):
            self.log("val/loss", 1.0)

    assert validate(Plain(), torch.tensor([1, 2]), [2]) == {"val/loss": 1.0}
    assert validate(Stub(certain_of), torch.zeros(0, dtype=torch.long), [0]) == {}
