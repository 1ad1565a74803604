import pickle
import shutil

import pytest
import torch

from common.checkpoint_io import atomic_save
from common.errors import CheckpointError
from common.weights.files import is_damaged, read_json, read_tensors, read_torch


class Payload:
    def __reduce__(self):
        return (print, ("executed",))


def refused(reader, path):
    """Return the refusal, one whole sentence without advice that is not ours."""
    with pytest.raises(CheckpointError) as refusal:
        reader(path)
    text = str(refusal.value)
    for foreign in ("weights_only", "torch.load", "two options", "\x1b", "\n"):
        assert foreign not in text
    assert path.name in text
    assert len(text) - len(str(path)) <= 250
    return text


def test_nothing_is_unpickled_and_the_refusal_says_what_to_do(tmp_path, capsys, recwarn):
    torch.save({"state_dict": {}, "payload": Payload()}, tmp_path / "evil.ckpt")
    torch.save({"payload": Payload()}, tmp_path / "legacy.ckpt", _use_new_zipfile_serialization=False)
    torch.save({"state_dict": torch.nn.Linear(1, 1)}, tmp_path / "module.ckpt")
    for name, found in (("evil", " (builtins.print)"), ("legacy", ""), ("module", " (torch.nn.modules.linear.Linear)")):
        text = refused(read_torch, tmp_path / f"{name}.ckpt")
        assert f"more than tensors and plain values{found}, and" in text
        assert text.endswith("Get its weights alone: safetensors, or a state dict of tensors.")
    (tmp_path / "raw.ckpt").write_bytes(pickle.dumps(Payload()))
    assert "is not a checkpoint" in refused(read_torch, tmp_path / "raw.ckpt")
    assert "executed" not in capsys.readouterr().out
    assert not recwarn


def test_files_of_before_version_1_6_are_read(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(read_torch(tmp_path / "old.pth")["a"], torch.ones(2))


def test_damaged_files(tmp_path):
    for new in (True, False):
        path = tmp_path / f"{new}.ckpt"
        torch.save({"a": torch.ones(200), "b": {"c": [1, 2]}}, path, _use_new_zipfile_serialization=new)
        whole = path.read_bytes()
        for length in range(0, len(whole), 29):
            path.write_bytes(whole[:length])
            refused(read_torch, path)
    (tmp_path / "list.ckpt").write_bytes(b"")
    torch.save([1], tmp_path / "list.ckpt")
    assert "holds a list, no state dict" in refused(read_torch, tmp_path / "list.ckpt")
    for reader in (read_torch, read_tensors, read_json):
        refused(reader, tmp_path / "gone")
        refused(reader, tmp_path)


def test_safetensors_and_json(tmp_path):
    for content in (b"", b"hello", b"\xff" * 100, b"\x10" + bytes(7) + b"{" * 16):
        (tmp_path / "x.safetensors").write_bytes(content)
        assert "cannot be read as safetensors" in refused(read_tensors, tmp_path / "x.safetensors")
    for content in (b"", b"{", b"\xff", b"[" * 100_000, b'{"a": 1}}'):
        (tmp_path / "x.json").write_bytes(content)
        assert "cannot be read as JSON" in refused(read_json, tmp_path / "x.json")
    (tmp_path / "x.json").write_bytes(b"[1]")
    assert "holds a list where an object is needed" in refused(read_json, tmp_path / "x.json")


def test_a_flipped_bit_anywhere_is_noticed_and_a_copy_is_verified_alone(tmp_path):
    atomic_save({"state_dict": {"a": torch.arange(40.0)}, "step": 3}, tmp_path / "last.ckpt")
    shutil.copy(tmp_path / "last.ckpt", tmp_path / "renamed.pt")
    assert torch.load(tmp_path / "renamed.pt", weights_only=True)["step"] == 3
    assert read_torch(tmp_path / "renamed.pt")["step"] == 3
    whole = (tmp_path / "last.ckpt").read_bytes()
    path = tmp_path / "flipped.ckpt"
    for position in range(len(whole)):
        changed = bytearray(whole)
        changed[position] ^= 1 << position % 8
        path.write_bytes(changed)
        assert is_damaged(path), position
        if position % 100 == 0:
            assert "check sum" in refused(read_torch, path)
    for length in range(1, 100):
        path.write_bytes(whole[:-length])
        refused(read_torch, path)
    path.write_bytes(whole)
    assert not is_damaged(path)


def test_files_without_a_check_sum_are_read(tmp_path):
    torch.save({"a": 1}, tmp_path / "foreign.pth")
    assert not is_damaged(tmp_path / "foreign.pth")
    assert read_torch(tmp_path / "foreign.pth") == {"a": 1}
