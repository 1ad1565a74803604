import json
from functools import partial

import pytest
import torch

from common.blocks.vit import VisionTransformer
from common.checkpoint import (
    check_shapes,
    load_encoder,
    read_checkpoint,
    resolve_checkpoint,
)
from common.checkpoint_io import AtomicCheckpointIO, atomic_save
from common.commands import main
from common.errors import CheckpointError, StorageError
from common.types import InputSpec
from common.weights.export import export
from experiments.e_mim.module import EMIMPretrain

CHANNELS = ("t1c", "t1n", "t2f")


@pytest.fixture
def run_folder(tmp_path):
    """A run folder with the checkpoint of an untrained network."""
    encoder = partial(VisionTransformer, embed_dim=24, depth=2, num_heads=2)
    module = EMIMPretrain(encoder=encoder, taps=(1, 2))
    module.build(InputSpec(CHANNELS, (32, 32, 32), preprocessing={"orientation": "RAS"}))
    content: dict = {"state_dict": module.state_dict(), "global_step": 3}
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
    with pytest.raises(CheckpointError, match=r"no kernel for adc \(it has t1c, t1n, t2f\)"):
        load_encoder(folder, channels=["t2f", "adc", "t1c"])
    encoder = load_encoder(folder, channels=["FLAIR", "adc", "T1ce"], new_channels="mean")
    new = encoder.patch_embed.proj.weight.reshape(24, 3, -1)
    assert torch.equal(new[:, 0], old[:, 2])
    assert torch.equal(new[:, 2], old[:, 0])
    assert torch.equal(new[:, 1], old[:, [0, 2]].mean(1))
    assert "2 of 3 matched (t1c, flair = t2f); adc start as the mean" in str(encoder.load_report)
    report = encoder.load_report.channels
    assert (report.permuted, report.new, report.dropped) == (["t1c", "flair"], ["adc"], ["t1"])


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


def test_a_checkpoint_that_asks_for_a_command_builds_and_runs_nothing(run_folder, monkeypatch):
    """The attack that was seen to work: the record of a run's encoder names a function of this project."""
    folder, _ = run_folder
    ran = []
    monkeypatch.setattr("common.commands.execute", lambda *args, **more: ran.append((args, more)))
    content = torch.load(folder / "checkpoints/best.ckpt", weights_only=True)
    record = content["encoder"]
    for path, arguments in (
        ("common.commands.execute", {"arguments": ["doctor", "--help"]}),
        ("common.weights.export.run", {"args": None}),
        ("experiments.e_mim.module.EMIMPretrain", {}),
        (record["class_path"], {**record["init_args"], "depth": "12"}),
        (record["class_path"], {**record["init_args"], "extra": 1}),
    ):
        atomic_save(
            {**content, "encoder": {**record, "class_path": path, "init_args": arguments}}, folder / "evil.ckpt"
        )
        with pytest.raises(CheckpointError) as refusal:
            load_encoder(folder / "evil.ckpt")
        assert len(str(refusal.value)) <= 320
    assert ran == []


@pytest.mark.parametrize("name", ["class_path", "init_args", "prefix", "channels", "preprocessing"])
def test_an_encoder_that_is_described_in_part(run_folder, name):
    folder, _ = run_folder
    content = torch.load(folder / "checkpoints/best.ckpt", weights_only=True)
    for record in ({**content["encoder"], name: 7}, {k: v for k, v in content["encoder"].items() if k != name}):
        atomic_save({**content, "encoder": record}, folder / "part.ckpt")
        with pytest.raises(CheckpointError, match=f"does not describe its encoder: `{name}` is"):
            load_encoder(folder / "part.ckpt")


def test_an_export_that_asks_for_a_command_or_is_damaged(run_folder, tmp_path, monkeypatch):
    folder, _ = run_folder
    ran = []
    monkeypatch.setattr("common.commands.execute", lambda *args, **more: ran.append((args, more)))
    out = export("e_mim", folder, "monai", tmp_path / "export")
    whole = json.loads((out / "config.json").read_text())
    evil = {"class_path": "common.commands.execute", "init_args": {"arguments": ["doctor"]}}
    for change, message in (
        ({"encoder": evil}, "is not an encoder of this project"),
        ({"encoder": []}, "does not describe its encoder: `class_path`"),
        ({"channels": ["t1c"]}, "names 1 channels of an encoder of 3"),
        ({"format": "timm", "experiment": "../../common/commands"}, "It has no patch_embed.proj.weight"),
        ({"format": "released", "experiment": "brainmvp", "encoder": evil}, "is not an encoder of this project"),
        ({"format": "FORMATS", "experiment": "configs"}, "is no export in the format monai or timm"),
    ):
        (out / "config.json").write_text(json.dumps(whole | change))
        with pytest.raises(CheckpointError, match=message):
            load_encoder(out)
    for text in ("{", "[1]", "[" * 100_000):
        (out / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.json"):
            load_encoder(out)
    (out / "config.json").write_text(json.dumps(whole))
    weights = (out / "model.safetensors").read_bytes()
    for content in (weights[:-100], weights[:4], b"\xff" * 64, weights[:-1] + bytes([weights[-1] ^ 1])):
        (out / "model.safetensors").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged or was changed"):
            load_encoder(out)
    (out / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="can be read: export the encoder again"):
        load_encoder(out)
    assert ran == []


def test_a_truncated_checkpoint(run_folder):
    folder, _ = run_folder
    path = folder / "checkpoints/best.ckpt"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=r"best.ckpt is damaged .*last.ckpt is whole, of step 3"):
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
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(StorageError, match=r"last\.ckpt cannot be written: the disk or the quota is full"):
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
    with pytest.raises(StorageError, match="is not a checkpoint of this run"):
        AtomicCheckpointIO().remove_checkpoint(str(folder / name))
    assert sorted(tmp_path.rglob("*")) == before
    AtomicCheckpointIO().remove_checkpoint(folder / "best.ckpt")
    AtomicCheckpointIO().remove_checkpoint(folder / "best.ckpt")
    assert not (folder / "best.ckpt").exists()


@pytest.mark.parametrize("links", [True, False])
def test_the_checkpoint_before_the_last_is_kept(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr("pathlib.Path.hardlink_to", lambda *args: (_ for _ in ()).throw(OSError("no links")))
    for step in (1, 2, 3):
        atomic_save({"global_step": step}, tmp_path / "last.ckpt")
        atomic_save({"global_step": step}, tmp_path / "best.ckpt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.ckpt", "last.ckpt", "previous.ckpt"]
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 3
    assert read_checkpoint(tmp_path / "previous.ckpt")["global_step"] == 2
    (tmp_path / "last.ckpt").unlink()
    assert resolve_checkpoint(tmp_path, "last").name == "previous.ckpt"


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.unlink()
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_named_and_the_other_offered(tmp_path):
    last, previous = tmp_path / "last.ckpt", tmp_path / "previous.ckpt"
    for step in (5, 6):
        atomic_save({"global_step": step, "x": torch.ones(500)}, last)
    flip(last, 700)
    with pytest.raises(CheckpointError) as refusal:
        read_checkpoint(tmp_path, "last")
    assert str(refusal.value) == (
        f"{last} is damaged (its content does not match its check sum). {previous} is whole, of step 5: give that file "
        f"instead, as RESUME= or CKPT=."
    )
    # The run goes on from the other, and the damaged one does not take its place.
    assert read_checkpoint(previous)["global_step"] == 5
    atomic_save({"global_step": 7}, last)
    assert [read_checkpoint(path)["global_step"] for path in (last, previous)] == [7, 5]
    flip(previous, 700)
    flip(last, 100)
    with pytest.raises(CheckpointError, match="take a copy of it, or another checkpoint"):
        read_checkpoint(last)


def test_a_full_disk_leaves_the_last_checkpoint(run_folder, small_disk):
    folder, module = run_folder
    path = folder / "checkpoints/last.ckpt"
    before = path.read_bytes()
    with small_disk(len(before) // 2), pytest.raises(StorageError, match="the disk or the quota is full"):
        atomic_save({"state_dict": module.state_dict()}, path)
    assert path.read_bytes() == before
    assert sorted(p.name for p in path.parent.iterdir()) == ["best.ckpt", "last.ckpt"]


def test_a_full_disk_leaves_the_export_that_was_there(run_folder, small_disk):
    folder, _ = run_folder
    out = folder / "encoder"
    main(["export", "--exp", "e_mim", "--ckpt", str(folder), "--format", "monai", "--out", str(out)])
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with small_disk(4000), pytest.raises(StorageError, match="the disk or the quota is full"):
        export("e_mim", folder, "monai", out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", "encoder"]
    export("e_mim", folder, "monai", out)
    assert load_encoder(out).num_features == 24
