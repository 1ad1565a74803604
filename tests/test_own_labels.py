"""A person's own labels, from a folder to scores and predictions, as a new user would do it."""

import csv
import json

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from common.cli import execute
from common.errors import UserError
from common.from_run import evaluate, predict

CONFIGS = "experiments/{}/configs/finetune_{}.yaml"
TRAINER = ["--trainer.enable_progress_bar=false", "--trainer.precision=32-true", "--trainer.max_epochs=2",
           "--trainer.check_val_every_n_epoch=1", "--trainer.logger=false"]  # fmt: skip


def finetune(experiment, task, root, *switches):
    stem = CONFIGS.format(experiment, task)
    return execute(["fit", "--config", stem, "--config", stem.replace(".yaml", ".smoke.yaml"), "--data.root", str(root),
                    *TRAINER, *switches])  # fmt: skip


def table_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def scores_of(kind):
    """Return metrics of the newest evaluation."""
    (folder,) = sorted(kind.parent.parent.glob("evaluate_*/*"))[-1:]
    return json.loads((folder / "metrics.json").read_text()), folder


def write_decathlon(root, cases=10, spacing=(1.0, 1.0, 2.0)):
    """Write cases in which 7 is a bright cube and 9 its brighter core."""
    generator, training = np.random.default_rng(0), []
    affine = np.diag([*spacing, 1.0])
    for index in range(cases):
        voxels = generator.normal(100, 5, (40, 40, 36)).astype(np.float32)
        label = np.zeros(voxels.shape, np.uint8)
        at = generator.integers(4, 16, 3)
        for value, edge in ((7, 16), (9, 8)):
            place = tuple(slice(a, a + edge) for a in at)
            label[place], voxels[place] = value, voxels[place] + 60
        for part, data in (("imagesTr", voxels), ("labelsTr", label)):
            (root / part).mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(data, affine), root / part / f"case_{index:03d}.nii.gz")
        training.append(
            {"image": f"./imagesTr/case_{index:03d}.nii.gz", "label": f"./labelsTr/case_{index:03d}.nii.gz"}
        )
    labels = {"0": "background", "7": "rim", "9": "core"}
    facts = {"modality": {"0": "T1"}, "labels": labels, "training": training, "test": []}
    (root / "dataset.json").write_text(json.dumps(facts))


def write_picture(path, bright, generator, colour=True):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = generator.integers(0, 60, (80, 72, 3) if colour else (80, 72))
    pixels[20:60, 20:60] += int(bright)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)


@pytest.mark.slow
def test_volumes_with_the_label_values_7_and_9(tmp_path, capsys):
    write_decathlon(tmp_path / "own")
    (tmp_path / "split.csv").write_text(
        "case_id,split\n"
        + "".join(f"case_{i:03d},{'train' if i < 6 else 'val' if i < 8 else 'test'}\n" for i in range(10))
    )
    run = finetune("e_mim", "segmentation", tmp_path / "own", "--data.split.file=split.csv",
                   "--model.encoder.embed_dim=48", "--model.encoder.depth=4", "--model.encoder.num_heads=2",
                   "--model.network.feature_size=4")  # fmt: skip
    evaluate(str(run))
    metrics, _ = scores_of(run)
    assert {"dice_rim", "dice_core", "hd95_rim", "ml_reference_core"} <= metrics.keys()
    assert metrics["ml_reference_core"]["mean"] == pytest.approx(8**3 * 2 / 1000)
    for part in ("labelsTr", "dataset.json"):
        (tmp_path / "own" / part).rename(tmp_path / part.replace(".json", ".away"))
    files = sorted((tmp_path / "own/imagesTr").glob("*"))[:2]
    predict(str(run), [str(file) for file in files], "out")
    assert "predictions: out" in capsys.readouterr().out
    for file in files:
        mask, source = nib.load(tmp_path / "out/predictions" / file.name), nib.load(file)
        assert mask.shape == source.shape
        assert np.allclose(mask.affine, source.affine)
        assert set(np.unique(mask.get_fdata())) <= {0, 7, 9}
    assert len(list((tmp_path / "out/pictures").glob("*.png"))) == 2
    with pytest.raises(UserError, match="holds something already"):
        predict(str(run), [str(files[0])], "out")


@pytest.mark.slow
def test_a_table_of_radiographs_with_classes_as_words(tmp_path):
    generator, rows = np.random.default_rng(0), ["image,subject,diagnosis"]
    for index in range(48):
        name = ("normal", "pneumonia", "effusion")[index % 3]
        write_picture(tmp_path / f"own/{index:04d}.png", 60 * (index % 3), generator, colour=False)
        rows.append(f"{index:04d}.png,{index // 2:03d}x{index % 3},{name}")
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    run = finetune("mrm_record", "classification", tmp_path / "own", "--data.target.file=labels.csv",
                   "--data.target.name=diagnosis", "--model.balanced=true")  # fmt: skip
    evaluate(str(run))
    metrics, folder = scores_of(run)
    assert {"auroc", "auprc", "balanced_accuracy", "ece", "auroc_effusion", "auroc_ci_low"} <= metrics.keys()
    assert (folder / "confusion_matrix.png").is_file()
    lines = table_of(folder / "per_case.csv")
    assert {line["target"] for line in lines} == {"normal", "pneumonia", "effusion"}
    assert all(0 <= float(line["probability_normal"]) <= 1 for line in lines)
    predict(str(run), [str(tmp_path / "own")], "out")
    predicted = table_of(tmp_path / "out/predictions.csv")
    assert len(predicted) == 48
    again = {line["subject_id"]: line for line in predicted}
    assert all(again[line["subject_id"]]["probability_normal"][:6] == line["probability_normal"][:6] for line in lines)


@pytest.mark.slow
def test_class_folders_with_five_ordered_grades_on_a_frozen_encoder(tmp_path):
    generator = np.random.default_rng(0)
    for index in range(60):
        write_picture(tmp_path / f"own/{index % 5}/{index:03d}.png", 40 * (index % 5), generator)
    run = finetune("mrm_genetics", "classification", tmp_path / "own", "--data.target.kind=ordinal",
                   "--data.subject=file", "--model.freeze_encoder=true", "--trainer.max_epochs=4")  # fmt: skip
    evaluate(str(run))
    metrics, _ = scores_of(run)
    assert {"kappa", "kappa_ci_low", "auroc_4"} <= metrics.keys()
    predict(str(run), [str(tmp_path / "own/3/003.png"), str(tmp_path / "own/4/004.png")], "out")
    assert [row["predicted"] in "01234" for row in table_of(tmp_path / "out/predictions.csv")] == [True, True]
