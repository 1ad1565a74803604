import pickle
from functools import partial

import pytest
import torch

from common.blocks.vit import VisionTransformer
from common.checkpoint import (
    build_encoder,
    check_shapes,
    load_encoder,
    read_checkpoint,
    resolve_checkpoint,
)
from common.checkpoint_io import AtomicCheckpointIO, atomic_save
from common.errors import CheckpointError, StorageError
from common.types import InputSpec
from experiments.e_mim.module import EMIMPretrain

CHANNELS = ("t1c", "t1n", "t2f")


@pytest.fixture
def run_folder(tmp_path):
    """A run folder with the checkpoint of an untrained network."""
    encoder = partial(VisionTransformer, embed_dim=24, depth=2, num_heads=2)
    module = EMIMPretrain(encoder=encoder, taps=(1, 2))
    module.build(InputSpec(CHANNELS, (32, 32, 32), preprocessing={"orientation": "RAS"}))
    content = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(content)
    for name in ("best", "last"):
        atomic_save(content, tmp_path / "run/checkpoints" / f"{name}.ckpt")
    return tmp_path / "run", module


def test_a_folder_means_its_best_or_its_last(run_folder):
    folder, _ = run_folder
    assert resolve_checkpoint(folder).name == "best.ckpt"
    assert resolve_checkpoint(folder, "last").name == "last.ckpt"
    assert resolve_checkpoint(folder / "checkpoints/last.ckpt").name == "last.ckpt"
    (folder / "checkpoints/best.ckpt").unlink()
    assert resolve_checkpoint(folder).name == "last.ckpt"
    with pytest.raises(CheckpointError, match="There is no checkpoint at"):
        resolve_checkpoint(folder / "nowhere")
    with pytest.raises(CheckpointError, match=r"holds neither checkpoints/best.ckpt nor"):
        resolve_checkpoint(folder.parent)


def test_an_encoder_alone(run_folder):
    folder, module = run_folder
    encoder = load_encoder(folder)
    x = torch.rand(1, 3, 32, 32, 32)
    assert torch.equal(encoder.forward_features(x), module.network.encoder.forward_features(x))
    assert encoder.num_features == 24
    assert encoder.load_report.missing == []
    assert encoder.load_report.unexpected == []


def test_another_size_resamples_positions_alone(run_folder):
    folder, module = run_folder
    encoder = load_encoder(folder, image_size=(48, 32, 32))
    assert encoder.pos_embed.shape == (1, 12, 24)
    assert list(encoder.load_report.adapted) == ["pos_embed"]
    assert torch.equal(encoder.patch_embed.proj.weight, module.network.encoder.patch_embed.proj.weight)
    assert encoder.forward_features(torch.rand(1, 3, 48, 32, 32)).shape == (1, 12, 24)


def test_channels_are_matched_by_name(run_folder):
    folder, module = run_folder
    old = module.network.encoder.patch_embed.proj.weight.reshape(24, 3, -1)
    encoder = load_encoder(folder, channels=["t2f", "adc", "t1c"])
    new = encoder.patch_embed.proj.weight.reshape(24, 3, -1)
    assert torch.equal(new[:, 0], old[:, 2])
    assert torch.equal(new[:, 2], old[:, 0])
    assert not torch.equal(new[:, 1], old[:, 1])
    assert "channels ['t1c', 't1n', 't2f'] to ['t2f', 'adc', 't1c']" in str(encoder.load_report)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_channels_without_names_are_matched_by_position(run_folder, count):
    folder, module = run_folder
    old = module.network.encoder.patch_embed.proj.weight.reshape(24, 3, -1)
    encoder = load_encoder(folder, in_channels=count)
    new = encoder.patch_embed.proj.weight.reshape(24, count, -1)
    assert torch.equal(new[:, :3], old[:, :count])
    assert encoder.forward_features(torch.rand(1, count, 32, 32, 32)).shape == (1, 8, 24)


def test_what_is_no_checkpoint_of_ours(tmp_path):
    (tmp_path / "text.ckpt").write_text("hello")
    with pytest.raises(CheckpointError, match=r"text\.ckpt"):
        read_checkpoint(tmp_path / "text.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    with pytest.raises(CheckpointError, match="holds no encoder"):
        load_encoder(tmp_path / "foreign.ckpt")
    with pytest.raises(CheckpointError, match="not one of this project's"):
        build_encoder("os.system", {})
    with pytest.raises(CheckpointError, match="does not have"):
        build_encoder("common.blocks.vit.Missing", {})


class Payload:
    def __reduce__(self):
        return (print, ("executed",))


def test_nothing_is_unpickled(tmp_path, capsys):
    torch.save({"state_dict": {}, "payload": Payload()}, tmp_path / "evil.ckpt")
    (tmp_path / "raw.ckpt").write_bytes(pickle.dumps(Payload()))
    for name in ("evil.ckpt", "raw.ckpt"):
        with pytest.raises(CheckpointError):
            read_checkpoint(tmp_path / name)
    assert "executed" not in capsys.readouterr().out


def test_a_truncated_checkpoint(run_folder):
    folder, _ = run_folder
    path = folder / "checkpoints/best.ckpt"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=r"best.ckpt cannot be read as a checkpoint"):
        read_checkpoint(path)


def test_shapes_are_compared_in_one_sentence():
    with pytest.raises(
        CheckpointError, match=r"fit this network: a is \(2,\) there and \(3,\) here \(and 2 more differences\)"
    ):
        check_shapes({"a": torch.zeros(2), "c": torch.zeros(1)}, {"a": torch.zeros(3), "b": torch.zeros(1)})
    check_shapes({"a": torch.zeros(2)}, {"a": torch.ones(2)})


def test_saving_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "folder/last.ckpt"
    plugin = AtomicCheckpointIO()
    plugin.save_checkpoint({"step": 1}, path)

    def fail(content, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(StorageError, match=r"last\.ckpt cannot be written: disk full"):
        plugin.save_checkpoint({"step": 2}, path)
    assert plugin.load_checkpoint(path) == {"step": 1}
    assert [p.name for p in path.parent.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("name", ["../victim/best.ckpt", "../victim", "checkpoints", "best.txt"])
def test_a_checkpoint_cannot_have_anything_but_a_checkpoint_removed(tmp_path, name):
    """Lightning removes recursively what a resumed checkpoint calls the best one so far."""
    folder = tmp_path / "checkpoints"
    for path in (tmp_path / "victim/best.ckpt", folder / "best.ckpt", folder / "checkpoints/file", folder / "best.txt"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(StorageError, match="is no checkpoint of this run"):
        AtomicCheckpointIO().remove_checkpoint(str(folder / name))
    assert sorted(tmp_path.rglob("*")) == before
    AtomicCheckpointIO().remove_checkpoint(folder / "best.ckpt")
    AtomicCheckpointIO().remove_checkpoint(folder / "best.ckpt")
    assert not (folder / "best.ckpt").exists()
