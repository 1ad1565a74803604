"""Encoders and archives whose channels differ in name, order or number (archives.md section 4, test case 10)."""

import json
import shutil
from functools import partial

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from common.blocks.vit import VisionTransformer
from common.checkpoint import encoder_record, load_encoder
from common.checkpoint_io import atomic_save
from common.commands import execute
from common.downstream.probe import LinearProbe
from common.downstream.segmentation import SegmentationModule
from common.errors import CheckpointError, DataError
from common.types import InputSpec, TaskState
from datamodules.configs import SplitConfig
from datamodules.volumes.datamodule import CropConfig, LabelConfig, VolumeDataModule
from experiments.e_mim.module import EMIMPretrain

STORED = ("t1c", "t1n", "t2f", "t2w")
RENAMED = {"t1c": "T1c", "t1n": "t1", "t2f": "FLAIR", "t2w": "t2"}
SIZE = (32, 32, 32)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A run folder as older versions wrote it: its channels are the archive's names alone."""
    torch.manual_seed(0)
    encoder = partial(VisionTransformer, embed_dim=24, depth=2, num_heads=2)
    module = EMIMPretrain(encoder=encoder, taps=(1, 2))
    module.build(InputSpec(STORED, SIZE))
    record = encoder_record(module, module.spec)
    del record["names"]
    folder = tmp_path_factory.mktemp("run")
    atomic_save({"state_dict": module.state_dict(), "encoder": record}, folder / "checkpoints/best.ckpt")
    return folder


@pytest.fixture(scope="module")
def archive(brats_root, tmp_path_factory):
    """Four cases under the names of 2023; the third lacks FLAIR."""
    root = tmp_path_factory.mktemp("archive")
    for case in sorted(brats_root.glob("BraTS-*"))[:4]:
        (root / case.name).symlink_to(case)
    return root


def renamed(archive, target, *without, swi=False):
    """Copy an archive under other names of its modalities, in a folder per case."""
    for case in sorted(archive.glob("BraTS-*")):
        (target / case.name).mkdir(parents=True)
        for old, new in RENAMED.items():
            source = case / f"{case.name}-{old}.nii.gz"
            if source.is_file() and old not in without:
                shutil.copy(source, target / case.name / f"{new}.nii.gz")
        shutil.copy(case / f"{case.name}-seg.nii.gz", target / case.name / "seg.nii.gz")
        if swi:
            shutil.copy(case / f"{case.name}-t1n.nii.gz", target / case.name / "SWI.nii.gz")
    return target


def data(root, **options):
    settings = {"batch_size": 4, "seed": 1, "split": SplitConfig((0.5, 0.25, 0.25))}
    module = VolumeDataModule(str(root), crops=CropConfig(SIZE), **settings | options)
    module.prepare_data()
    module.setup("predict")
    return module


def with_regions(root, **options):
    return data(root, labels=LabelConfig(needed=True, regions={"tumour": (1, 2, 3)}), **options)


def embed(root, ckpt, out, *more):
    config = "experiments/e_mim/configs/pretrain.yaml"
    options = [f"--set=crops.size={list(SIZE)}", "--set=batch_size=4", "--set=num_workers=0", *more]
    execute(["embed", "--config", config, "--root", str(root), "--ckpt", str(ckpt), "--out", str(out), *options])
    frame = pd.read_parquet(out).set_index("subject_id").sort_index()
    return torch.tensor(np.stack(frame["feature"])), json.loads(pq.read_schema(out).metadata[b"channels"])


@torch.no_grad()
def tokens(encoder, module):
    """In float64, so that another order of a sum is not taken for another kernel."""
    encoder = encoder.double().eval()
    return {
        name: features
        for batch in module.central_samples()
        for name, features in zip(batch["subject_id"], encoder.forward_features(batch["image"].double()), strict=True)
    }


def test_a_renamed_archive_gives_the_same_tokens(archive, pretrained, tmp_path, capsys):
    other = data(renamed(archive, tmp_path / "renamed"))
    assert other.input_spec.channels == ("flair", "t1", "t1c", "t2")
    assert other.input_spec.names == ("FLAIR", "t1", "T1c", "t2")
    expected = tokens(load_encoder(pretrained), data(archive))
    found = tokens(load_encoder(pretrained, channels=other.input_spec.channels), other)
    assert found.keys() == expected.keys()
    assert max(float((found[name] - expected[name]).abs().max()) for name in found) < 1e-6
    capsys.readouterr()
    first, facts = embed(other.root, pretrained, tmp_path / "a.parquet")
    assert "channels: 4 of 4 matched (T1c = t1c, t1 = t1n, FLAIR = t2f, t2 = t2w)\n" in capsys.readouterr().out
    again, _ = embed(other.root, pretrained, tmp_path / "b.parquet")
    assert torch.equal(first, again)
    assert (facts["permuted"], facts["new"], facts["dropped"], facts["absent"]) == (["t1c", "flair"], [], [], [])


def test_a_channel_more_is_refused_where_the_encoder_is_frozen(archive, pretrained, tmp_path):
    root = renamed(archive, tmp_path / "more", swi=True)
    sentence = r"The encoder has no kernel for swi \(it has t1c, t1n, t2f, t2w\): set data.modalities"
    with pytest.raises(CheckpointError, match=sentence):
        embed(root, pretrained, tmp_path / "a.parquet")
    probe = LinearProbe(pretrained=str(pretrained))
    with pytest.raises(CheckpointError, match=sentence):
        built(probe, data(root))
    chosen, _ = embed(root, pretrained, tmp_path / "a.parquet", "--set=modalities=[T1, t1ce, t2, flair]")
    plain, _ = embed(archive, pretrained, tmp_path / "b.parquet")
    assert torch.allclose(chosen, plain, atol=1e-6)


def test_a_channel_less_is_fed_as_absent(archive, pretrained, tmp_path, capsys):
    module = data(renamed(archive, tmp_path / "less", "t2f"))
    features, facts = embed(module.root, pretrained, tmp_path / "a.parquet")
    assert "channels: 4 of 4 matched (t1c, t1 = t1n, t2f, t2 = t2w); flair not in the data, fed as absent" in (
        capsys.readouterr().out.replace("T1c = t1c", "t1c").replace("flair = t2f", "t2f")
    )
    assert facts["absent"] == ["flair"]
    assert len(features) == 4
    built(LinearProbe(pretrained=str(pretrained)), module)
    (batch, *_) = module.central_samples()
    assert module.input_spec.channels == ("t1", "t1c", "t2", "flair")
    assert batch["modality_mask"][0].tolist() == [True, True, True, False]
    assert not batch["image"][:, 3].any()


class Trainer:
    """What a module asks of its trainer while it is built."""

    def __init__(self, datamodule):
        self.datamodule = datamodule


def built(module, datamodule):
    """Build a module's network for a data module, as Lightning would."""
    module._trainer = Trainer(datamodule)
    module.configure_model()
    return module


def segmentation(**options):
    encoder = partial(VisionTransformer, embed_dim=24, depth=2, num_heads=2)
    return SegmentationModule(
        encoder=encoder, network=lambda encoder, _: torch.nn.ModuleDict({"vit": encoder}), **options
    )


def kernel(module):
    return module.network["vit"].patch_embed.proj.weight.unflatten(1, (len(module.spec.channels), -1))


def test_fine_tuning_starts_new_channels_as_the_mean(archive, pretrained, tmp_path):
    old = load_encoder(pretrained).patch_embed.proj.weight.unflatten(1, (4, -1))
    more = with_regions(renamed(archive, tmp_path / "more", swi=True))
    module = built(segmentation(pretrained=str(pretrained)), more)
    assert list(module.spec.channels) == ["flair", "t1", "t1c", "t2", "swi"]
    assert torch.equal(kernel(module)[:, :4], old[:, [2, 1, 0, 3]])
    assert torch.allclose(kernel(module)[:, 4], old.mean(1))
    assert module.channel_report.new == ["swi"]
    # Channels that the configuration names are all there are; the encoder's others are dropped.
    some = built(segmentation(pretrained=str(pretrained)), with_regions(tmp_path / "more", modalities=["T2", "flair"]))
    assert list(some.spec.channels) == ["t2", "flair"]
    assert some.channel_report.dropped == ["t1c", "t1"]
    # Without such a choice they stay, as absent.
    less = with_regions(renamed(archive, tmp_path / "less", "t2f", "t2w"))
    few = built(segmentation(pretrained=str(pretrained)), less)
    assert list(few.spec.channels) == ["t1", "t1c", "flair", "t2"]
    assert few.channel_report.absent == ["flair", "t2"]


def test_nothing_in_common(lung_root, pretrained):
    module = data(lung_root, labels=LabelConfig(needed=True))
    with pytest.raises(CheckpointError, match=r"None of the data's channels \(1h, xe\)"):
        built(LinearProbe(pretrained=str(pretrained)), module)
    with pytest.raises(CheckpointError, match=r"set model\.new_channels to fresh"):
        built(segmentation(pretrained=str(pretrained)), module)
    fresh = built(segmentation(pretrained=str(pretrained), new_channels="fresh"), module)
    assert list(fresh.spec.channels) == ["1h", "xe"]
    assert fresh.channel_report.new == ["1h", "xe"]


def test_a_trained_model_meets_other_archives_in_its_own_order(archive, tmp_path, capsys):
    """Evaluation, prediction and resuming: the data follow the checkpoint."""
    spec = {"channels": list(STORED), "image_size": list(SIZE)}

    def trained():
        module = segmentation()
        module.state = TaskState.read({"state": {"spec": spec, "encoder": None}})
        return module

    module = with_regions(renamed(archive, tmp_path / "renamed", "t2w"))
    built(trained(), module)
    assert module.input_spec.channels == ("t1c", "t1", "flair", "t2")
    assert "3 of 4" not in (line := capsys.readouterr().out)
    assert (
        "channels: 4 of 4 matched (T1c = t1c, t1 = t1n, FLAIR = t2f, t2 = t2w); t2 not in the data, fed as absent"
        in line
    )
    (batch, *_) = module.central_samples()
    (expected, *_) = data(archive).central_samples()
    assert torch.equal(batch["image"][:, :3], expected["image"][:, :3])
    assert batch["modality_mask"][0].tolist() == [True, True, True, False]
    with pytest.raises(CheckpointError, match="no kernel for swi"):
        built(trained(), with_regions(renamed(archive, tmp_path / "more", swi=True)))


def test_two_files_of_one_modality(archive, tmp_path):
    root = renamed(archive, tmp_path / "twice")
    first = sorted(root.iterdir())[0]
    shutil.copy(first / "t1.nii.gz", first / "MPRAGE.nii.gz")
    with pytest.raises(DataError, match=rf"The case {first.name} has two files of one modality: t1.nii.gz is the same"):
        data(root)
    (first / "MPRAGE.nii.gz").unlink()
    shutil.copy(first / "t1.nii.gz", first / "T1.nii.gz")
    with pytest.raises(DataError, match="two files of one modality"):
        data(root)
