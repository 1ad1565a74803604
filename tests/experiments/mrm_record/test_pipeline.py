"""From an archive to an exported encoder through the commands: stopping, ranks, bad input, real samples."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import timm.models.vision_transformer as timm_vit
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common import commands
from common.checkpoint import load_encoder
from common.cli import execute
from common.errors import PreemptedError
from datamodules.synthetic.reports import write_mimic_cxr
from experiments.mrm_record.module import MRMPretrain

pytestmark = pytest.mark.slow

CONFIG = ["--config", "experiments/mrm_record/configs/pretrain.yaml"]
TINY = [
    *(f"--model.encoder.{name}" for name in ("patch_size=8", "embed_dim=24", "depth=2", "num_heads=3")),
    *(f"--model.decoder.{name}" for name in ("decoder_dim=24", "depth=1", "num_heads=3")),
    *(f"--model.report.{name}" for name in ("dim=24", "depth=1", "num_heads=3", "mlp_dim=48")),
    "--data.image.size=[48,48]", "--data.cache.side=48", "--data.text.vocab_size=300", "--data.text.length=40",
    "--data.batch_size=4", "--data.num_workers=0", "--trainer.max_epochs=2", "--trainer.check_val_every_n_epoch=1",
    "--trainer.enable_progress_bar=false", "--trainer.precision=32-true", "--trainer.log_every_n_steps=1",
]  # fmt: skip
NAMES = {
    "train/loss", "train/loss_reconstruction", "train/loss_report", "val/loss", "val/loss_reconstruction",
    "val/loss_report", "lr", "throughput/samples_per_second", "throughput/data_wait_fraction",
    "collapse/effective_rank", "collapse/floor_ratio", "collapse/floor_ratio_control", "collapse/text_floor_ratio",
    "collapse/prediction_diversity", "val/token_accuracy_frequent", "val/token_accuracy_rare",
    "report/gap_other_image", "report/gap_no_image",
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mimic_cxr")
    write_mimic_cxr(folder, 16, seed=0, size=(72, 80))
    return folder


@pytest.fixture
def arguments(root):
    def line(*more, data=root, command="fit"):
        return [command, *CONFIG, f"--data.root={data}", *TINY, *more]

    return line


def weights(folder):
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


def test_a_run_leaves_what_the_contract_asks_for(arguments, tmp_path, capsys):
    folder = execute(arguments())
    events = EventAccumulator(str(folder))
    events.Reload()
    assert set(events.Tags()["scalars"]) >= NAMES
    assert "reconstruction/high_resolution" in events.Tags()["images"]
    assert "reconstruction/low_resolution" in events.Tags()["images"]
    assert "reconstruction/report/text_summary" in events.Tags()["tensors"]
    assert min(event.step for event in events.Scalars("collapse/floor_ratio")) == 0
    assert (folder / "tokenizer.json").is_file()
    assert json.loads((folder / "summary.json").read_text())["status"] == "finished"
    ours = load_encoder(folder).eval()
    image = torch.randn(2, 3, 24, 24)
    for format in ("timm", "hf"):
        commands.main(["export", "--exp", "mrm_record", "--ckpt", str(folder), "--format", format,
                       "--out", str(tmp_path / format)])  # fmt: skip
        usage = (tmp_path / format / "README.md").read_text().split("```python\n")[1].split("```")[0]
        done = subprocess.run(
            [sys.executable, "-c", f"import torch\nimages = torch.load('x.pt')\n{usage}\n"
             f"torch.save({'features' if format == 'timm' else 'tokens'}, 'y.pt')"],
            cwd=tmp_path / format, capture_output=True, text=True, check=False,
        ) if (torch.save(image, tmp_path / format / "x.pt") or True) else None  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        tokens = ours.forward_features(image)
        expected = tokens[:, 1:].mean(1) if format == "timm" else tokens
        assert torch.allclose(torch.load(tmp_path / format / "y.pt"), expected, atol=1e-5)
    capsys.readouterr()
    commands.main(["doctor", *CONFIG, "--root", str(arguments()[3].split("=")[1]), "--set", "batch_size=4"])
    assert "training would accept this archive" in capsys.readouterr().out


@pytest.mark.parametrize("more", [[], ["--data.num_workers=2"], ["--trainer.accumulate_grad_batches=2"]])
def test_resumed_equals_uninterrupted(arguments, monkeypatch, more):
    """Dropout is 0.1 in the report decoder."""
    line = arguments(*more)
    whole = weights(execute(line))
    step, done = MRMPretrain.training_step, []

    def wrapped(self, batch, batch_idx):
        if self.trainer.fit_loop.total_batch_idx == 4 and not done:
            done.append(os.kill(os.getpid(), signal.SIGTERM))
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(MRMPretrain, "training_step", wrapped)
        with pytest.raises(PreemptedError):
            execute(line)
    folder = max(Path("runs/mrm_record/pretrain").iterdir(), key=lambda path: path.stat().st_mtime)
    execute([*line, "--ckpt_path", str(folder)])
    assert max(float((value - weights(folder)[key]).abs().max()) for key, value in whole.items()) == 0.0


@pytest.mark.ddp
def test_two_ranks_equal_one(arguments):
    shared = ["--trainer.max_epochs=1", "--model.optimization.optimizer=torch.optim.SGD",
              "--model.optimization.optimizer.lr=0.01",
              "--model.report.dropout=0", "--trainer.limit_train_batches=5",
              "--data.split.fractions=[0.6,0.4,0.0]", "--data.loader.draws=2"]  # fmt: skip
    alone = execute(arguments(*shared, "--data.batch_size=4"))
    command = [sys.executable, "-m", "common.cli", *arguments(*shared, "--data.batch_size=2"),
               "--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    together = Path(next(row.split(": ", 1)[1] for row in done.stdout.splitlines() if row.startswith("run folder")))
    first, second = weights(alone), weights(together)
    for key, value in first.items():
        assert torch.allclose(value, second[key], rtol=1e-6, atol=1e-6), key
    one, two = ({k: float(v) for row in csv.DictReader((folder / "metrics.csv").open()) for k, v in row.items() if v}
                for folder in (alone, together))  # fmt: skip
    for name in ("train/loss", "val/loss", "collapse/floor_ratio", "collapse/text_floor_ratio",
                 "report/gap_other_image", "report/gap_other_image_low", "val/token_accuracy"):  # fmt: skip
        assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name


def test_an_encoder_starts_from_timm_weights(arguments, tmp_path, capsys, refusal):
    theirs = timm_vit.VisionTransformer(img_size=24, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5)
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    line = arguments("--trainer.max_steps=1", f"--model.init_from={tmp_path / 'vit.pth'}")
    execute(line)
    report = next(row for row in capsys.readouterr().out.splitlines() if "encoder weights" in row)
    assert "missing: none" in report
    assert "unexpected: head.weight, head.bias" in report
    assert "no weights at" in refusal(arguments("--model.init_from=nowhere.pth"))


def test_another_tokenizer_is_refused(arguments, refusal):
    folder = execute(arguments("--trainer.max_steps=1"))
    sentence = refusal(arguments("--data.text.vocab_size=200", f"--ckpt_path={folder}"))
    assert "vocabulary" in sentence
    assert "tokenizer.json" in sentence


def test_damaged_members_leave_rows_and_the_run_goes_on(arguments, root, tmp_path):
    copy = shutil.copytree(root, tmp_path / "archive")
    first, second = sorted(copy.glob("mimic-cxr-jpg/*/files/**/*.jpg"))[:2]
    first.write_bytes(first.read_bytes()[:500])
    second.write_bytes(b"")
    folder = execute(arguments("--data.loader.max_fault_fraction=0.5", data=copy))
    rows = list(csv.DictReader((folder / "data_faults.csv").open()))
    assert {Path(row["path"]).name for row in rows} == {first.name, second.name}
    assert {row["kind"] for row in rows} == {"unreadable"}


def test_without_reports_the_hint_says_where_they_are(arguments, root, tmp_path, refusal):
    copy = shutil.copytree(root, tmp_path / "archive")
    shutil.rmtree(copy / "mimic-cxr")
    assert "mimic-cxr-reports.zip" in refusal(arguments(data=copy))


def test_texts_stay_out_of_the_logs_when_anonymised(arguments):
    folder = execute(arguments("--data.anonymise=true", "--trainer.max_steps=2"))
    events = EventAccumulator(str(folder))
    events.Reload()
    assert not events.Tags()["tensors"]


@pytest.mark.real_data
def test_real_radiographs_and_notes(arguments, real_data):
    folder = execute(arguments("--trainer.max_steps=6", "--data.samples.views=[AP,PA]", data=real_data("covid_cxr")))
    assert json.loads((folder / "summary.json").read_text())["status"] == "finished"
    assert (folder / "data_faults.csv").read_text().splitlines()[1:] == []


@pytest.mark.real_data
def test_real_reports_without_images(arguments, real_data):
    line = arguments("--trainer.max_steps=4", "--trainer.check_val_every_n_epoch=1", "--trainer.limit_val_batches=4",
                     data=real_data("openi_reports"))  # fmt: skip
    line[3:3] = ["--config", "experiments/mrm_record/configs/text_only.yaml"]
    folder = execute(line)
    scalars = json.loads((folder / "summary.json").read_text())["scalars"]
    assert "collapse/text_floor_ratio" in scalars
    assert "collapse/floor_ratio" not in scalars
