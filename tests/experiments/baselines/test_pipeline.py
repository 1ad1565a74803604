"""Every method through the command, on pictures and on volumes: what it logs, its checkpoint, its encoder, resuming."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from common.checkpoint import load_encoder
from common.cli import execute
from common.errors import PreemptedError
from common.module import SSLModule
from datamodules.synthetic.fundus import write_idrid
from datamodules.synthetic.reports import write_mimic_cxr

pytestmark = pytest.mark.slow

CONFIGS = Path("experiments/baselines/configs")
ENCODER = ["--model.encoder.embed_dim=24", "--model.encoder.depth=2", "--model.encoder.num_heads=2",
           "--model.encoder.patch_size=8"]  # fmt: skip
TRAINER = ["--trainer.max_epochs=2", "--trainer.check_val_every_n_epoch=1", "--trainer.enable_progress_bar=false",
           "--trainer.precision=32-true", "--trainer.log_every_n_steps=1", "--trainer.limit_val_batches=1",
           "--trainer.limit_train_batches=2", "--trainer.num_sanity_val_steps=1"]  # fmt: skip
PICTURES = ["--data.image.size=[32,32]", "--data.cache.side=40", "--data.batch_size=4", "--data.num_workers=0"]
VOLUMES = ["--data.crops.size=[32,32,32]", "--data.batch_size=4", "--data.num_workers=0", "--data.loader.draws=2",
           "--data.loader.val_draws=2", "--data.split.fractions=[0.5,0.5,0.0]"]  # fmt: skip
MASKED = ["mae", "simmim", "multimae"]
TWO_VIEWS = ["simclr", "vicreg", "barlow"]
TEACHERS = ["mocov3", "byol", "dino", "ibot", "attmask"]
WATCHED = {"collapse/image_rank", "collapse/feature_std", "collapse/effective_rank", "val/loss"}


@pytest.fixture(scope="module")
def idrid(tmp_path_factory):
    folder = tmp_path_factory.mktemp("idrid")
    write_idrid(folder, 3, seed=0, size=(40, 48))
    return folder


@pytest.fixture
def line(idrid, brats_root):
    """Return the command line of a method on pictures (2) or volumes (3)."""

    def of(method, dims, *more):
        names = ["pretrain.yaml"] + (["volumes.yaml"] if dims == 3 else []) + [f"{method}.yaml"]
        names += [name for name in [f"{method}.volumes.yaml"] if dims == 3 and (CONFIGS_HERE / name).is_file()]
        configs = [word for name in names for word in ("--config", str(CONFIGS / name))]
        if dims == 3 and method in MASKED:
            configs += ["--config", QUICK]  # the best constant of volumes takes longer than all else
        data = [f"--data.root={idrid}", *PICTURES] if dims == 2 else [f"--data.root={brats_root}", *VOLUMES]
        return ["fit", *configs, *ENCODER, *data, *TRAINER, *more]

    return of


QUICK = json.dumps({"trainer": {"callbacks": [
    {"class_path": "common.callbacks.effective_rank.EffectiveRank"},
    {"class_path": "common.callbacks.pooled_features.PooledFeatures"},
]}})  # fmt: skip
CONFIGS_HERE = Path(__file__).parents[3] / CONFIGS


def weights(folder):
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("method", [*MASKED, *TWO_VIEWS, *TEACHERS])
def test_every_method_trains_on_pictures_and_volumes(line, method, dims):
    folder = execute(line(method, dims, "--trainer.max_epochs=1"))
    scalars = json.loads((folder / "summary.json").read_text())["scalars"]
    wanted = set(WATCHED)
    if method in MASKED:
        wanted |= (
            {"val/loss_reconstruction"}
            if dims == 3
            else {"collapse/floor_ratio", "collapse/floor_ratio_control", "collapse/prediction_diversity"}
        )
    else:
        wanted |= {"collapse/view_similarity", "collapse/view_similarity_control"}
        wanted |= {"collapse/floor_ratio"} if method in ("simclr", "vicreg", "barlow", "mocov3") else set()
        wanted |= {"collapse/prototype_information"} if method in ("dino", "ibot", "attmask") else set()
    assert wanted <= scalars.keys()
    assert all(torch.isfinite(torch.tensor(value["final"])) for value in scalars.values())
    image = torch.randn(2, 3, 32, 32) if dims == 2 else torch.randn(2, 4, 32, 32, 32)
    encoder = load_encoder(folder).eval()
    assert encoder.forward_features(image).shape == (2, 4**dims, 24)
    prefix = "network.teacher.module.encoder." if method in ("dino", "ibot", "attmask") else ""
    state = weights(folder)
    prefix = prefix or next(key.split("blocks.0.")[0] for key in state if "encoder.blocks.0." in key)
    assert "teacher" not in prefix or method in ("dino", "ibot", "attmask")
    assert torch.equal(state[f"{prefix}blocks.0.norm1.weight"], encoder.blocks[0].norm1.weight)


@pytest.mark.parametrize(
    ("method", "dims", "more"),
    [
        ("multimae", 3, []),
        ("simclr", 2, ["--data.num_workers=2"]),
        ("attmask", 2, ["--trainer.accumulate_grad_batches=2", "--model.teacher.frozen=0.4"]),
        ("mocov3", 3, []),
    ],
)
def test_resumed_equals_uninterrupted(line, monkeypatch, method, dims, more):
    """Inside the second epoch; teacher, centres, moving statistics and schedules included."""
    arguments = line(method, dims, *more)
    whole = weights(execute(arguments))
    step, done = SSLModule.training_step, []

    def wrapped(self, batch, batch_idx):
        if self.trainer.fit_loop.total_batch_idx == 2 and not done:
            done.append(os.kill(os.getpid(), signal.SIGTERM))
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(SSLModule, "training_step", wrapped)
        with pytest.raises(PreemptedError):
            execute(arguments)
    folder = max(Path("runs/baselines/pretrain").iterdir(), key=lambda path: path.stat().st_mtime)
    execute([*arguments, "--ckpt_path", str(folder)])
    assert max(float((value - weights(folder)[key]).abs().max()) for key, value in whole.items()) == 0.0


def test_images_with_texts(tmp_path):
    """The words that other methods hide are put back, and the temperature is learned."""
    write_mimic_cxr(tmp_path / "mimic", 36, seed=0, size=(72, 80))
    folder = execute(
        ["fit", "--config", str(CONFIGS / "clip.yaml"), f"--data.root={tmp_path / 'mimic'}", *ENCODER, *TRAINER,
         "--data.image.size=[32,32]", "--data.cache.side=40", "--data.batch_size=4", "--data.num_workers=0",
         "--data.text.vocab_size=300", "--data.text.length=40", "--model.text.init_args.dim=24",
         "--model.text.init_args.depth=1", "--model.text.init_args.num_heads=2",
         "--trainer.max_epochs=1"]
    )  # fmt: skip
    scalars = json.loads((folder / "summary.json").read_text())["scalars"]
    assert {"val/loss_contrast", "val/retrieval_accuracy", "val/temperature", "collapse/image_rank"} <= scalars.keys()
    assert load_encoder(folder).num_features == 24
    assert weights(folder)["network.log_scale"].item() != pytest.approx(2.6592600, abs=1e-7)
