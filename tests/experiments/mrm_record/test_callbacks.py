from functools import partial
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from common.blocks.decoder import MAEDecoder
from common.blocks.vit import VisionTransformer
from common.module import SSLModule
from common.types import HiddenTokens, InputSpec
from experiments.mrm_record.callbacks import ImageReportGap
from experiments.mrm_record.model import ReportDecoder
from experiments.mrm_record.module import MRMPretrain


class Stub(SSLModule):
    """Loses exactly ``batch["losses"]`` (S, 3) with the right image, another and none; has two tokens."""

    build_network = step = reconstruct = reconstruction_target = token_features = panels = None

    def __init__(self):
        super().__init__({})
        self.network = torch.nn.Linear(1, 1)

    def hidden_tokens(self, batch, image="image"):
        loss = batch["losses"][:, ["image", "control_image", "none"].index(image)]
        right, wrong = -loss, (1 - (-loss).exp()).log()
        pairs = torch.stack([right, wrong], 1)
        targets = batch["targets"]
        return HiddenTokens(torch.where(targets[:, None] == 0, pairs, pairs.flip(1)), targets, batch["sample"])

    def validation_step(self, batch, batch_idx):
        return {"reconstruction": None}


def validate(module, callback, batches, words=None):
    trainer = pl.Trainer(callbacks=[callback], logger=False, enable_progress_bar=False, enable_model_summary=False,
                         accelerator="cpu")  # fmt: skip
    datamodule = pl.LightningDataModule()
    datamodule.val_dataloader = lambda: DataLoader(batches, batch_size=None)
    datamodule.tokenizer = SimpleNamespace(backend=SimpleNamespace(token_to_id=(words or {}).get))
    (scalars,) = trainer.validate(module, datamodule=datamodule, verbose=False)
    return scalars


def batches_by_hand():
    """Patient a has two studies in two batches; c has no image, so its words are not scored."""
    return [
        {
            "control_image": torch.zeros(3),
            "modality_mask": torch.tensor([[True, True], [True, True], [False, True]]),
            "patient_id": ["a", "b", "c"],
            "losses": torch.tensor([[0.5, 1.0, 2.0], [0.1, 0.1, 0.4], [3.0, 3.0, 3.0], [0.2, 0.2, 0.1]]),
            "targets": torch.tensor([0, 1, 0, 0]),
            "sample": torch.tensor([0, 0, 2, 1]),
        },
        {
            "control_image": torch.zeros(1),
            "modality_mask": torch.tensor([[True, True]]),
            "patient_id": ["a"],
            "losses": torch.tensor([[0.4, 0.7, 0.5]]),
            "targets": torch.tensor([1]),
            "sample": torch.tensor([0]),
        },
    ]


def test_losses_by_hand():
    scalars = validate(Stub(), ImageReportGap(), batches_by_hand())
    expected = {"loss_right_image": 1.2 / 4, "loss_other_image": 2.0 / 4, "loss_no_image": 3.0 / 4,
                "gap_other_image": 0.8 / 4, "gap_no_image": 1.8 / 4}  # fmt: skip
    for name, value in expected.items():
        assert scalars[f"report/{name}"] == pytest.approx(value, rel=1e-5), name
    # All resamplings of two persons: of a alone, of b alone, of both.
    assert scalars["report/gap_no_image_low"] == pytest.approx(-0.1, rel=1e-5)
    assert scalars["report/gap_no_image_high"] == pytest.approx(1.9 / 3, rel=1e-5)


def test_words_of_interest_alone_are_scored():
    scalars = validate(Stub(), ImageReportGap(["opacity", "unheard"]), batches_by_hand(), {"opacity": 1})
    assert scalars["report/loss_right_image"] == pytest.approx(0.25, rel=1e-5)
    assert scalars["report/gap_no_image"] == pytest.approx(0.2, rel=1e-5)


def test_nothing_is_said_without_control_images():
    batches = [{name: value for name, value in b.items() if name != "control_image"} for b in batches_by_hand()]
    assert validate(Stub(), ImageReportGap(), batches) == {}


def radiographs():
    ids = torch.randint(4, 40, (4, 8))
    labels = ids.masked_fill(torch.rand(4, 8) < 0.5, -100)
    labels[:, 0], labels[:, 1] = -100, ids[:, 1]
    image = torch.randn(4, 1, 32, 32)
    return {
        "image": image,
        "control_image": image.flip(0),
        "modality_mask": torch.ones(4, 2, dtype=torch.bool),
        "key": torch.arange(4) * 1000 + 17,
        "patient_id": ["a", "b", "c", "d"],
        "input_ids": ids.masked_fill(labels != -100, 3),
        "attention_mask": torch.ones(4, 8, dtype=torch.long),
        "labels": labels,
        "hidden_index": (labels != -100).flatten().nonzero()[:, 0],
        "hidden_ids": labels[labels != -100],
    }


def test_a_decoder_that_is_given_no_image_has_no_gap():
    """Only what passes through the projection to the report can make a difference; the words hidden are the same."""
    encoder = {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2, "class_token": True}
    module = MRMPretrain(
        encoder=partial(VisionTransformer, **encoder),
        decoder=partial(MAEDecoder, decoder_dim=16, depth=1, num_heads=2, num_prefix_tokens=1),
        report=partial(ReportDecoder, dim=16, depth=1, num_heads=2, mlp_dim=32),
    )
    module.build(InputSpec(("red", "green", "blue"), (32, 32), vocabulary={"size": 40, "length": 8}))
    batches = [radiographs(), radiographs()]
    gaps = {name: value for name, value in validate(module, ImageReportGap(), batches).items() if "gap" in name}
    assert all(value != 0 for value in gaps.values())
    with torch.no_grad():
        module.network.to_report.weight.zero_()
        module.network.to_report.bias.zero_()
    scalars = validate(module, ImageReportGap(), batches)
    assert {scalars[name] for name in gaps} == {0.0}
    assert scalars["report/loss_right_image"] == pytest.approx(scalars["val/loss_report"], rel=1e-5)
