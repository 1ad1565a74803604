"""Archives that change between a run and the next (archives.md section 7, test case 11)."""

import csv
import json
import shutil
import stat
from pathlib import Path

import pytest
import torch

from common.checkpoint import read_checkpoint
from common.cli import execute
from common.errors import DataError
from experiments.e_mim.module import EMIMPretrain

ONE_EPOCH = "--trainer.max_epochs=1"


def weights(folder):
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


def rows(folder):
    with (folder / "membership.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def archive(brats_root, tmp_path):
    """Six of the eight cases; the others come later."""
    root = tmp_path / "archive"
    for case in sorted(brats_root.glob("BraTS-*"))[:6]:
        shutil.copytree(case, root / case.name)
    return root


class Killed(Exception):
    pass


def stopped(arguments, monkeypatch):
    """Run until the second epoch, die there, and return the run folder."""

    def die(self, batch, batch_idx):
        if self.current_epoch == 1:
            raise Killed
        return training_step(self, batch, batch_idx)

    training_step = EMIMPretrain.training_step
    with monkeypatch.context() as patch:
        patch.setattr(EMIMPretrain, "training_step", die)
        with pytest.raises(Killed):
            execute(arguments)
    return max(Path("runs/e_mim/pretrain").iterdir(), key=lambda path: path.stat().st_mtime)


def grow(brats_root, root):
    for case in sorted(brats_root.glob("BraTS-*"))[6:]:
        shutil.copytree(case, root / case.name)


def test_an_archive_that_grows_or_shrinks(archive, brats_root, pretrain_arguments, monkeypatch, capsys):
    whole = execute(pretrain_arguments(root=archive))
    assert stat.S_IMODE((whole / "membership.csv").stat().st_mode) == 0o600
    assert sorted({row["split"] for row in rows(whole)}) == ["test", "train", "val"]
    assert all(len(row["source_xxh3"].split()) >= 4 for row in rows(whole))
    assert (
        read_checkpoint(whole, "last")["membership"]["digest"]
        == (json.loads((whole / "summary.json").read_text())["membership"]["digest"])
    )
    first = stopped(pretrain_arguments(root=archive), monkeypatch)
    grow(brats_root, archive)
    capsys.readouterr()
    arguments = pretrain_arguments("--ckpt_path", str(first), root=archive)
    assert execute(arguments) == first
    assert "2 cases are new since this run began and are not used" in capsys.readouterr().out
    expected = weights(whole)
    assert max(float((value - expected[name]).abs().max()) for name, value in weights(first).items()) == 0.0
    assert rows(first) == rows(whole)
    shutil.rmtree(archive / rows(first)[0]["case_id"])
    with pytest.raises(DataError, match=r"1 of its 6 cases are gone, first BraTS-GLI"):
        execute([*arguments, "--trainer.max_epochs=3"])
    with pytest.raises(DataError, match=r"split by shares \[.*seed 0.*configuration by shares .*seed 5"):
        execute([*arguments, "--data.split.seed=5"])


def finetune(root, pretrained, split, *more):
    config = ["--config", "experiments/e_mim/configs/finetune_brats_seg.yaml"]
    tiny = ["--model.network.feature_size=4", "--model.network.skip_blocks=[1,1,2]",
            "--model.encoder.embed_dim=32", "--data.crops.size=[32,32,32]",
            "--data.num_workers=0", "--data.batch_size=1", "--trainer.max_epochs=1", "--trainer.precision=32-true",
            "--trainer.enable_progress_bar=false", "--trainer.check_val_every_n_epoch=1"]  # fmt: skip
    return ["fit", *config, f"--data.root={root}", f"--model.pretrained={pretrained}", *tiny, *more,
            *([f"--data.split.file={split}"] if split else [])]  # fmt: skip


def test_patients_of_pre_training_in_the_test_set(archive, pretrain_arguments, tmp_path, capsys):
    """Three, in the archive itself and in a copy of it elsewhere."""
    first = execute(pretrain_arguments(ONE_EPOCH, root=archive))
    trained = [row["case_id"] for row in rows(first) if row["split"] == "train"]
    others = [row["case_id"] for row in rows(first) if row["split"] != "train"]
    split = tmp_path / "split.csv"
    tested = trained[:3]
    parts = {name: "test" if name in tested else "train" for name in trained} | dict.fromkeys(others, "val")
    split.write_text("case_id,split\n" + "".join(f"{name},{part}\n" for name, part in parts.items()))
    for root in (archive, shutil.copytree(archive, tmp_path / "copy")):
        capsys.readouterr()
        folder = execute(
            finetune(root, first, split, "--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1")
        )
        assert "3 of 3 test patients were seen in pre-training" in capsys.readouterr().out
        seen = json.loads((folder / "summary.json").read_text())["seen_patients"]
        assert seen["test"] == {"patients": 3, "certain": 3, "possible": 0}
        assert seen["val"]["certain"] == 0
    with pytest.raises(DataError, match=r"3 of 3 test patients .* set data\.seen_patients to drop"):
        execute(finetune(archive, first, split, "--data.seen_patients=refuse"))
    # Without a split file, those that pre-training knows keep their place: nobody has been seen.
    execute(finetune(archive, first, None, "--trainer.fast_dev_run=1", "--data.split.seed=7"))
    assert "0 of 1 test patients were seen in pre-training" in capsys.readouterr().out


def test_another_batch_size_inside_an_epoch(archive, pretrain_arguments):
    folder = execute(pretrain_arguments("--trainer.max_steps=1", "--checkpoint.every_n_steps=1", root=archive))
    with pytest.raises(DataError, match=r"inside an epoch, 1 of \d batches in, with a batch size of 2, not 1"):
        execute(pretrain_arguments("--ckpt_path", str(folder), "--data.batch_size=1", root=archive))
