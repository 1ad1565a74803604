"""From an archive to an exported encoder through the commands: stopping, ranks, bad input, downstream, real samples."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common import commands
from common.checkpoint import load_encoder
from common.cli import execute
from common.errors import PreemptedError
from datamodules.synthetic.fundus import write_aptos, write_idrid, write_palm, write_rfmid, write_tcga, write_ukb
from experiments.mrm_genetics.module import RelationPretrain

pytestmark = pytest.mark.slow

CONFIGS = Path("experiments/mrm_genetics/configs")
CONFIG = ["--config", str(CONFIGS / "pretrain.yaml")]
ENCODER = [*(f"--model.encoder.{name}" for name in ("patch_size=8", "embed_dim=24", "depth=2", "num_heads=3"))]
GENOME = ["--model.genome_encoder.depth=2", "--model.genome_encoder.segments={snp: 5, pgs: 2, burden: 3, omics: 4}"]
DATA = ["--data.image.size=[32,32]", "--data.cache.side=40", "--data.batch_size=4", "--data.num_workers=0"]
TRAINER = ["--trainer.max_epochs=2", "--trainer.check_val_every_n_epoch=1", "--trainer.enable_progress_bar=false",
           "--trainer.precision=32-true", "--trainer.log_every_n_steps=1"]  # fmt: skip
DECODERS = [f"--model.{decoder}.{name}" for decoder in ("decoder", "genome_decoder")
            for name in ("decoder_dim=24", "depth=1", "num_heads=3")]  # fmt: skip
TINY = [*ENCODER, *GENOME, *DECODERS, *DATA, *TRAINER]
NAMES = {
    "train/loss", "train/loss_image", "train/loss_genome", "train/loss_self", "train/loss_cross", "val/loss",
    "val/loss_image", "val/loss_genome", "val/loss_self", "val/loss_cross", "lr", "throughput/samples_per_second",
    "throughput/data_wait_fraction", "collapse/effective_rank", "collapse/floor_ratio", "collapse/floor_ratio_control",
    "collapse/prediction_diversity", "collapse/patch_mean_ratio", "collapse/genome_floor_ratio",
    "collapse/genome_pc_ratio", "collapse/cosine_mean", "collapse/cosine_std",
    *(f"relation/{what}_{name}" for what in ("zeroed_fraction", "kept_mass")
      for name in ("image_self", "genome_self", "image_cross", "genome_cross")),
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ukb")
    write_ukb(folder, 5, seed=0, size=(48, 64))
    return folder


@pytest.fixture
def arguments(root):
    def line(*more, data=root, command="fit"):
        return [command, *CONFIG, f"--data.root={data}", *TINY, *more]

    return line


def weights(folder):
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


def scalars_of(folder):
    return json.loads((folder / "summary.json").read_text())["scalars"]


def test_a_run_leaves_what_the_contract_asks_for(arguments, root, tmp_path, capsys):
    folder = execute(arguments("--data.genome.step=8"))
    events = EventAccumulator(str(folder))
    events.Reload()
    assert set(events.Tags()["scalars"]) >= NAMES
    assert {"reconstruction/image", "relation/samples", "relation/attention"} <= set(events.Tags()["images"])
    assert min(event.step for event in events.Scalars("collapse/floor_ratio")) == 0
    fractions = {name: events.Scalars(f"relation/zeroed_fraction_{name}")[-1].value for name in
                 ("image_self", "genome_self", "image_cross", "genome_cross")}  # fmt: skip
    tokens = 5 + 2 + 3
    expected = {"image_self": 12 / 17, "genome_self": int(0.5 * tokens) / tokens,
                "image_cross": int(0.75 * tokens) / tokens, "genome_cross": 8 / 17}  # fmt: skip
    assert fractions == pytest.approx(expected, abs=2e-2)  # a person without scores has fewer columns
    assert fractions["image_self"] == pytest.approx(12 / 17, abs=1e-6)
    stored = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    assert stored["ImageGenomeDataModule"]["genome"]["snp"]["mean"]
    ours = load_encoder(folder).eval()
    image = torch.randn(2, 3, 32, 32)
    commands.main(["export", "--exp", "mrm_genetics", "--ckpt", str(folder), "--format", "timm",
                   "--out", str(tmp_path / "timm")])  # fmt: skip
    usage = (tmp_path / "timm" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    torch.save(image, tmp_path / "timm" / "x.pt")
    code = f"import torch\nimages = torch.load('x.pt')\n{usage}\ntorch.save(features, 'y.pt')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "timm", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    expected = ours.forward_features(image)[:, 1:].mean(1)
    assert torch.allclose(torch.load(tmp_path / "timm" / "y.pt"), expected, atol=1e-5)
    capsys.readouterr()
    commands.main(["doctor", *CONFIG, "--root", str(root), "--set", "batch_size=4", "--deep"])
    out = capsys.readouterr().out
    assert "training would accept this archive" in out
    assert "snp: 1" in out
    commands.main(["embed", *CONFIG, "--root", str(root), "--set", "image.size=[32,32]", "--set", "cache.side=40",
                   "--ckpt", str(folder), "--out", str(tmp_path / "f.parquet")])  # fmt: skip
    table = pd.read_parquet(tmp_path / "f.parquet")
    assert len(table) == 20
    genotypes = str(root / "genetics/ukb_cal_chr{chrom}_v2")
    commands.main(["associate", "--features", str(tmp_path / "f.parquet"), "--split", "all", "--components", "2",
                   "--genotypes", genotypes, "--out", str(tmp_path / "gwas")])  # fmt: skip
    assert json.loads((tmp_path / "gwas" / "summary.json").read_text())["persons"] >= 15


@pytest.mark.parametrize("more", [[], ["--data.num_workers=2", "--trainer.accumulate_grad_batches=2"]])
def test_resumed_equals_uninterrupted(arguments, monkeypatch, more):
    """Alpha dropout is 0.1 in the tokens."""
    line = arguments("--data.genome.step=8", "--data.loader.draws=2", *more)
    whole = weights(execute(line))
    step, done = RelationPretrain.training_step, []

    def wrapped(self, batch, batch_idx):
        if self.trainer.fit_loop.total_batch_idx == 8 and not done:
            done.append(os.kill(os.getpid(), signal.SIGTERM))
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(RelationPretrain, "training_step", wrapped)
        with pytest.raises(PreemptedError):
            execute(line)
    folder = max(Path("runs/mrm_genetics/pretrain").iterdir(), key=lambda path: path.stat().st_mtime)
    execute([*line, "--ckpt_path", str(folder)])
    assert max(float((value - weights(folder)[key]).abs().max()) for key, value in whole.items()) == 0.0


@pytest.mark.ddp
def test_two_ranks_equal_one(arguments):
    shared = ["--trainer.max_epochs=1", "--model.optimization.optimizer=torch.optim.SGD",
              "--model.optimization.optimizer.lr=0.01",
              "--model.genome_encoder.dropout=0", "--trainer.limit_train_batches=3", "--data.genome.step=8",
              "--model.match_weight=10"]  # fmt: skip
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
    for name in ("train/loss", "val/loss_image", "val/loss_genome", "collapse/floor_ratio",
                 "collapse/genome_floor_ratio", "relation/kept_mass_image_self",
                 "relation/zeroed_fraction_genome_cross"):  # fmt: skip
        assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name


def test_images_alone_and_the_baselines(arguments, refusal):
    folder = execute(arguments("--data.genetics=false", "--trainer.max_steps=2"))
    names = scalars_of(folder)
    assert "relation/zeroed_fraction_image_self_second" in names
    assert not any("genome" in name for name in names)
    line = arguments("--trainer.max_steps=2")
    line[3:3] = ["--config", str(CONFIGS / "mae.yaml")]
    assert "collapse/floor_ratio" in scalars_of(execute(line))
    line = arguments("--trainer.max_steps=2", "--data.genome.step=8")
    line[3:3] = ["--config", str(CONFIGS / "tau0.yaml")]
    zeroed = [value["final"] for name, value in scalars_of(execute(line)).items() if "zeroed" in name]
    assert zeroed == [0.0] * 4
    contig = ["fit", "--config", "experiments/baselines/configs/contig.yaml",
              line[5], *ENCODER, *GENOME, *DATA, *TRAINER,
              "--trainer.max_steps=2", "--data.genome.step=8"]  # fmt: skip
    folder = execute(contig)
    assert {"val/loss_contrast", "val/retrieval_accuracy", "collapse/effective_rank"} <= scalars_of(folder).keys()
    assert load_encoder(folder).num_features == 24
    sentence = refusal([*contig, "--data.genetics=false"])
    assert "complete_only" in sentence


def test_stained_regions_train_with_their_omics(arguments, tmp_path):
    write_tcga(tmp_path / "archive", 4, 0)
    line = arguments("--trainer.max_steps=2", data=tmp_path / "archive")
    line[3:3] = ["--config", str(CONFIGS / "pathology.yaml")]
    names = scalars_of(execute(line))
    assert {"val/loss_genome", "collapse/genome_floor_ratio", "relation/zeroed_fraction_genome_cross"} <= names.keys()


def test_bad_input_is_refused_in_a_sentence(arguments, root, tmp_path, refusal):
    copy = shutil.copytree(root, tmp_path / "archive")
    for path in copy.glob("genetics/*.fam"):
        path.write_text("".join(f"{9 + i} {9 + i} 0 0 0 b\n" for i, _ in enumerate(path.read_text().splitlines())))
    shutil.rmtree(copy / "pgs")
    shutil.rmtree(copy / "burden")
    sentence = refusal(arguments(data=copy))
    assert "None of the 20 people with images" in sentence
    assert "synthetic" in sentence
    (tmp_path / "empty").mkdir()
    assert "of no known layout" in refusal(arguments(data=tmp_path / "empty"))
    assert "no genotypes at" in refusal(arguments("--data.genome.genotypes=nowhere"))
    assert "applied to genotypes" in refusal(arguments(f"--data.genome.scores={root}"))


def test_damaged_images_leave_rows_and_the_run_goes_on(arguments, root, tmp_path):
    copy = shutil.copytree(root, tmp_path / "archive")
    first, second = sorted(copy.glob("fundus/**/*.png"))[:2]
    first.write_bytes(first.read_bytes()[:500])
    second.write_bytes(b"")
    folder = execute(arguments("--data.loader.max_fault_fraction=0.5", "--data.genome.step=8", data=copy))
    rows = list(csv.DictReader((folder / "data_faults.csv").open()))
    assert {Path(row["path"]).name for row in rows} == {first.name, second.name}


def test_another_genome_is_refused_on_resuming(arguments, refusal):
    folder = execute(arguments("--trainer.max_steps=1", "--data.genome.step=8"))
    sentence = refusal(arguments("--data.genome.step=4", f"--ckpt_path={folder}"))
    assert "genome" in sentence


TASKS = {
    "aptos": (write_aptos, "kappa", []),
    "idrid": (write_idrid, "kappa", []),
    "rfmid": (write_rfmid, "auroc", []),
    "crp": (write_ukb, "mse", []),
    "crp.classification": (write_ukb, "auroc", []),
    "tcga_grading": (write_tcga, "f1_micro", ["--data.split.num_folds=3"]),
    "palm_seg": (write_palm, "dice_disc", ["--data.batch_size=2"]),
}


@pytest.mark.parametrize("task", TASKS)
def test_tasks_start_from_an_encoder_and_are_scored(task, arguments, tmp_path):
    write, metric, more = TASKS[task]
    write(tmp_path / "archive", 4, 0, **({} if task.startswith("tcga") else {"size": (48, 64)}))
    pretrained = execute(arguments("--trainer.max_steps=1", "--data.genetics=false"))
    config = ["--config", str(CONFIGS / f"finetune_{task}.yaml"), f"--data.root={tmp_path / 'archive'}", *DATA, *more]
    line = [*config, *TRAINER, *ENCODER]
    if task == "palm_seg":  # its decoder doubles four times
        config.append("--model.network.feature_size=4")
        folder = execute(["fit", *line, config[-1], "--model.encoder.patch_size=16", "--model.encoder.depth=4"])
    else:
        folder = execute(["fit", *line, f"--model.pretrained={pretrained}"])
    assert any(name.startswith("val/") for name in scalars_of(folder))
    tested = execute(["test", *config, "--ckpt_path", str(folder), "--trainer.enable_progress_bar=false"])
    metrics = json.loads((tested / "metrics.json").read_text())
    assert metric in metrics
    assert len(list(csv.DictReader((tested / "per_case.csv").open()))) == metrics["n"]


@pytest.mark.real_data
def test_real_eyes_with_real_genotypes(arguments, real_data):
    genotypes = real_data("hapmap3_plink") / "HM3_thinned_autosomal_overlap"
    folder = execute(arguments("--trainer.max_steps=4", f"--data.genome.genotypes={genotypes}", "--data.genome.step=20",
                               "--trainer.limit_val_batches=3", data=real_data("idrid")))  # fmt: skip
    assert scalars_of(folder)["relation/zeroed_fraction_image_self"]["final"] == pytest.approx(12 / 17, abs=1e-6)
    assert (folder / "data_faults.csv").read_text().splitlines()[1:] == []


@pytest.mark.real_data
def test_real_regions_join_their_omics(real_data, capsys):
    from datamodules.configs import SplitConfig
    from datamodules.genetics.datamodule import ImageGenomeDataModule, PictureConfig

    root, everyone = str(real_data("tcga_gbmlgg")), SplitConfig((1.0, 0.0, 0.0))
    data = ImageGenomeDataModule(root, split=everyone, image=PictureConfig((64, 64)))
    data.prepare_data()
    data.setup("fit")
    assert data.index().layout.name == "tcga_gbmlgg"
    assert data.genome.sizes["omics"] > 20
    assert [all(data.genome.has(sample.person)) for sample in data.splits["train"]] == [True] * 3
    assert "omics" in capsys.readouterr().out
