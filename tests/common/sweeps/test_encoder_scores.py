"""Frozen encoders and controls side by side, on a tree in which the label is plain to see."""

import json

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from common.cli import execute
from common.commands import execute as medmim
from common.errors import UserError
from common.sweeps import encoder_scores

pytestmark = pytest.mark.slow

PRETRAIN = [
    "fit", "--config", "experiments/baselines/configs/pretrain.yaml", "--model.encoder.patch_size=8",
    "--model.encoder.embed_dim=24", "--model.encoder.depth=1", "--model.encoder.num_heads=2",
    "--data.image.size=[32,32]", "--data.cache.side=40", "--data.batch_size=8", "--data.num_workers=0",
    "--trainer.max_steps=1", "--trainer.limit_val_batches=1", "--trainer.enable_progress_bar=false",
]  # fmt: skip


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Pictures of 60 patients, half of them bright, with a table; a run of one step; a configuration of the task."""
    folder = tmp_path_factory.mktemp("work")
    root = folder / "archive"
    root.mkdir()
    generator = np.random.default_rng(0)
    rows = []
    for patient in range(60):
        pixels = generator.integers(0, 120, (40, 40, 3)) + 100 * (patient % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(root / f"p{patient:02}.png")
        rows.append({"image": f"p{patient:02}.png", "subject": f"p{patient:02}", "bright": patient % 2})
    pd.DataFrame(rows).to_csv(root / "manifest.csv", index=False)
    labels = {"class_path": "datamodules.labelled.layout.LabelledTable",
              "init_args": {"classes": ["bright"], "file": "manifest.csv"}}  # fmt: skip
    task = {"class_path": "datamodules.labelled.classification.LabelledImageDataModule",
            "init_args": {"root": str(root), "labels": labels, "image": {"size": [32, 32]}, "cache": {"side": 40},
                          "split": {"fractions": [0.6, 0.2, 0.2]}, "batch_size": 8}}  # fmt: skip
    (folder / "task.yaml").write_text(yaml.safe_dump({"data": task}))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run = execute([*PRETRAIN, f"--data.root={root}"])
        yield folder, str(run.resolve())


def evaluate(folder, run, out, *more):
    medmim(
        ["evaluate-encoder", "--config", str(folder / "task.yaml"), "--ckpt", run, "--out", str(folder / out), *more]
    )
    return json.loads((folder / out / "results.json").read_text())


def test_encoders_and_controls_in_one_table(work, monkeypatch, capsys):
    folder, run = work
    monkeypatch.setattr("common.downstream.frozen._EPOCHS", 5)
    seen = []
    encode = encoder_scores.encode

    def noted(arm, split, place):
        seen.append((split, len(json.loads((folder / "all/choices.json").read_text())) if split == "test" else None))
        return encode(arm, split, place)

    monkeypatch.setattr(encoder_scores, "encode", noted)
    result = evaluate(folder, run, "all")
    assert list(result["scores"]) == [run, "random", "grey_histogram", "colour_grid"]
    assert result["scores"]["grey_histogram"]["linear"] > 0.9
    assert seen == [(split, number if split == "test" else None) for number in range(1, 5)
                    for split in ("train", "val", "test")], "test cases come after every choice is written"  # fmt: skip
    (compared,) = [row for row in result["comparisons"] if row["encoder"] == run]
    assert compared["reference"] == "random"
    assert "one training of each encoder" in result["notes"][0]
    said = capsys.readouterr().out
    assert said.index("cannot be told from chance here") < said.index("| encoder |")
    cases = pd.read_csv(folder / "all/encoder_0/per_case.csv")
    assert {"subject_id", "patient_id", "target_0", "attentive_0", "linear_0", "knn_0"} == set(cases)
    with pytest.raises(UserError, match="holds results already"):
        evaluate(folder, run, "all")


def test_twice_the_same_and_nothing_without_labels(work, monkeypatch):
    folder, run = work
    monkeypatch.setattr("common.downstream.frozen._EPOCHS", 3)
    first, second = (evaluate(folder, run, out, "--no-controls") for out in ("first", "second"))
    assert first["scores"] == second["scores"]
    assert first["comparisons"] == []
    with pytest.raises(UserError, match="give no labels"):
        medmim(["evaluate-encoder", "--config", "experiments/baselines/configs/pretrain.yaml", "--root",
                str(folder / "archive"), "--set", "image.size=[32,32]", "--set", "cache.side=40", "--ckpt", run,
                "--out", str(folder / "none")])  # fmt: skip
