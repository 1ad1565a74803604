"""What a person may say in ``archive.yaml``, how it is refused, and who wins over whom."""

import json
import random
from dataclasses import fields
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from common.commands import main as medmim
from common.errors import DataError, UserError
from common.runtime.data_config import Archive, with_archive_file
from datamodules.archive_file import (
    LAYOUT_KEYS,
    SCHEMA,
    archive_file_of,
    parsed,
    read_archive_file,
)
from datamodules.registry import FileRef, Record, Settings, open_archive
from datamodules.targets import with_targets
from datamodules.volumes.cases import Case
from datamodules.volumes.modalities import respelled
from datamodules.volumes.reading import write_nifti

#: The example of the specification, and the keys that it lacks.
FULL = """\
version: 1
root: .
layout: bids
modalities: {t1: T1w, t2: T2w, flair: FLAIR}
ignore: ["*.mat"]
masks: {lesion: {name: lesion-manual, values: [1]}}
targets:
  diagnosis: {table: participants.tsv, column: dx, kind: classification, classes: [control, patient], merge: {a: [b]}}
subject: sub
session: ses
split: {file: null, fractions: [0.8, 0.1, 0.1], seed: 0, ids: pad, unlisted: ignore}
grid: {reference: t1, spacing: [1, 1, 2.5]}
voxels: {intensity: {t1: percentile}, nan: refuse, complex: refuse, header: refuse}
series: [{description: mprage, te: [0, 40.5], contrast: true, modality: t1}, {kind: other, ignore: no}]
pipeline: fmriprep
runs: all
frame: 0
uneven: refuse
min_slices: 2
missing: ignore
table: labels.csv
columns: {image: file, subject: patient}
"""


def refused(text: str) -> str:
    with pytest.raises(DataError) as error:
        parsed(text, "archive.yaml")
    sentence = str(error.value)
    assert len(sentence) <= 300
    assert "\n" not in sentence
    return sentence


def test_every_key_is_read():
    content = parsed(FULL, "archive.yaml")
    assert set(content) == set(SCHEMA)
    assert content["split"] == {"fractions": [0.8, 0.1, 0.1], "seed": 0, "ids": "pad", "unlisted": "ignore"}
    assert content["grid"]["spacing"] == [1.0, 1.0, 2.5]
    assert content["series"][0] == {"description": "mprage", "te": [0, 40.5], "contrast": True, "modality": "t1"}


def test_every_setting_of_a_layout_is_a_key_but_those_of_a_task():
    assert {field.name for field in fields(Settings)} <= {*LAYOUT_KEYS, "categories"}


def test_values_are_text_as_written():
    content = parsed("targets: {dx: {classes: [01, 1, no, 2.50]}}\nsubject: 007", "a")
    assert content["targets"]["dx"]["classes"] == ["01", "1", "no", "2.50"]
    assert content["subject"] == "007"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("layot: bids", "no key 'layot'; the nearest key is layout"),
        ("split: {fraction: [1, 0, 0]}", "split has no key 'fraction'; the nearest key is fractions"),
        ("split: {fractions: [0.5, 0.1, 0.1]}", "three shares that sum to 1"),
        ("split: {fractions: [0.8, 0.2]}", "a list of 3 values"),
        ("layout: bidz", "Unknown layout 'bidz'; nearest are bids"),
        ("version: 2", "version must be 1"),
        ("modalities: {t1: a, T1w: b}", "modalities names t1 twice, as t1 and T1w"),
        ("modalities: [t1]", "modalities must be a mapping"),
        ("masks: {a: {values: [x]}}", r"masks.a.values[0] must be a whole number"),
        ("subject: {regex: '(x'}", "the expression of subject cannot be read"),
        ("subject: {regex: '(x)'}", "needs a group (?P<subject>...)"),
        ("pipeline: ../other", "pipeline must be a place under the root"),
        ("voxels: {nan: no}", "voxels.nan must be refuse or zero, got 'no'"),
        ("grid: {spacing: [1, 1, 0]}", "three lengths above 0"),
        ("min_slices: -3", "min_slices must be a whole number"),
        ("series: [{discription: x, modality: t1}]", "unknown key 'discription'"),
        ("series: [{description: 5, modality: t1}]", "archive.yaml: "),
        ("targets: {a: {classes: [x]}}", "a list of 2 or more values"),
        ("split: {seed: 1}\nsplit: {seed: 2}", "the key 'split' stands there twice"),
        ("a: &x [1]\nb: *x", "alias"),
        ("masks: [", "not a valid YAML file in line 1"),
        ("- a", "must be a mapping"),
        ("", "must be a mapping"),
        ("[" * 5000, "not a valid YAML file"),
    ],
)
def test_refusals_are_one_sentence(text, words):
    assert words in refused(text)


def mutated(rng: random.Random) -> str:
    """Change the full file in one to three places."""
    lines = FULL.splitlines()
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(lines))
        line = lines[place]
        kind = rng.randrange(6)
        if kind == 0:
            lines[place] = line[: rng.randrange(len(line) + 1)]
        elif kind == 1:
            at = rng.randrange(len(line) + 1)
            lines[place] = line[:at] + rng.choice("{}[]:,*&!|>'\"%@`\t\x00\x1bé-0a ~#?") + line[at:]
        elif kind == 2:
            key = line.partition(":")[0]
            odd = ("null", "[]", "{}", "3", "-1", "true", ".nan", "1e999", "[[]]", "{a: {b: [1]}}", "x" * 500, "''")
            lines[place] = f"{key}: {rng.choice(odd)}"
        elif kind == 3:
            lines.insert(place, rng.choice(lines))
        elif kind == 4:
            letters = list(line)
            if letters:
                letters[rng.randrange(len(letters))] = chr(rng.randrange(1, 0x3000))
            lines[place] = "".join(letters)
        else:
            lines[place] = "  " * rng.randint(0, 3) + line
    return "\n".join(lines)


def test_a_thousand_mutated_files_are_read_or_refused_in_a_sentence(tmp_path):
    rng = random.Random(7)
    refusals = []
    path = tmp_path / "archive.yaml"
    for _ in range(1000):
        path.write_bytes(mutated(rng).encode("utf-8", "surrogatepass"))
        try:
            read_archive_file(path)
        except DataError as error:
            refusals.append(str(error))
    assert 300 < len(refusals) < 1000
    assert [text for text in refusals if len(text) > 300 or "\n" in text] == []


def test_where_a_file_lies(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/inner.csv").touch()
    (tmp_path / "outer.csv").touch()
    (tmp_path / "a.yaml").write_text("root: data\n")
    file = archive_file_of(tmp_path / "a.yaml")
    assert file is not None
    assert file.root == tmp_path / "data"
    assert file.located("inner.csv") == str(tmp_path / "data/inner.csv")
    assert file.located("outer.csv") == str(tmp_path / "outer.csv")
    assert archive_file_of(tmp_path / "data") is None
    (tmp_path / "data/archive.yaml").write_text("ignore: ['x']\n")
    assert archive_file_of(tmp_path / "data").root == tmp_path / "data"
    (tmp_path / "data/archive.yaml").write_text(f"root: {tmp_path}\n")
    with pytest.raises(DataError, match="not the folder that it lies in"):
        archive_file_of(tmp_path / "data")
    (tmp_path / "a.yaml").write_text("root: gone\n")
    with pytest.raises(DataError, match="is not a folder"):
        archive_file_of(tmp_path / "a.yaml")


PRETRAIN = "experiments/e_mim/configs/pretrain.yaml"


def write_volumes(root: Path, cases: int = 6, names=("T1w", "T2w")) -> Path:
    rng = np.random.default_rng(0)
    for case in range(cases):
        for name in names:
            folder = root / f"C{case}"
            folder.mkdir(parents=True, exist_ok=True)
            data = np.zeros((24, 24, 24), np.float32)
            data[4:20, 4:20, 4:20] = rng.random((16, 16, 16)) * 100 + 1
            write_nifti(folder / f"{name}.nii.gz", data, np.eye(4))
    return root


def test_the_command_line_wins_over_the_file_and_the_file_over_the_experiment(tmp_path, capsys):
    root = write_volumes(tmp_path / "data")
    (tmp_path / "a.yaml").write_text("root: data\nmodalities: {t1: T1w}\nsplit: {seed: 5}\nvoxels: {nan: zero}\n")
    (tmp_path / "exp.yaml").write_text(json.dumps({
        "data": {"class_path": "datamodules.volumes.datamodule.VolumeDataModule",
                 "init_args": {"root": "nowhere", "modalities": ["t2"], "split": {"seed": 1}, "batch_size": 3}}
    }))  # fmt: skip
    settings = Archive([str(tmp_path / "exp.yaml")], str(tmp_path / "a.yaml"), None, ["split.seed=9"]).section[
        "init_args"
    ]
    assert settings["root"] == str(root)
    assert settings["modalities"] == ["t1"]  # the file over the experiment
    assert settings["split"] == {"seed": 9}  # the command line over the file
    assert settings["batch_size"] == 3
    assert settings["voxels"] == {"nan": "zero"}
    assert "archive: " in capsys.readouterr().out
    words, file = with_archive_file(
        ["fit", "--config", str(tmp_path / "exp.yaml"), f"--data.root={tmp_path / 'a.yaml'}", "--data.split.seed=9"]
    )
    assert file == tmp_path / "a.yaml"
    assert words[:3] == ["fit", "--config", str(tmp_path / "exp.yaml")]
    assert json.loads(words[4])["data"]["init_args"]["split"] == {"seed": 5}
    assert words[5:] == ["--data.root", str(root), "--data.split.seed=9"]


def test_a_file_in_the_root_is_used_and_said(tmp_path, capsys):
    root = write_volumes(tmp_path / "data")
    (root / "archive.yaml").write_text("modalities: {t2: T2w}\n")
    medmim(["doctor", "--config", PRETRAIN, "--root", str(root)])
    text = capsys.readouterr().out
    assert f"archive: {root / 'archive.yaml'} is used (modalities)" in text
    assert "modalities: T2w in 6" in text or "modalities: t2 in 6" in text
    assert "training would accept" in text


def test_options_of_lightning_are_settings_for_a_doctor(tmp_path, capsys):
    root = write_volumes(tmp_path / "data")
    arguments = [
        "doctor",
        "--config",
        PRETRAIN,
        "--root",
        str(root),
        "--data.batch_size=64",
        "--trainer.max_epochs",
        "3",
    ]
    with pytest.raises(SystemExit) as stop:
        medmim(arguments)
    assert stop.value.code == 1
    assert "fewer than one batch of 64" in capsys.readouterr().err
    for wrong in (["--data.batch_size"], ["--nonsense"], ["stray"]):
        with pytest.raises(SystemExit) as stop:
            medmim(["doctor", "--config", PRETRAIN, "--root", str(root), *wrong])
        assert stop.value.code == 2


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("pipeline: fmriprep", "the layout folder, which has no setting pipeline"),
        ("runs: all", "has no setting runs"),
        ("table: a.csv", "has no setting table"),
        ("modalities: {flair: FLAIR}", "No case has FLAIR"),
        ("layout: bids", "is not of the layout bids"),
    ],
)
def test_a_setting_without_effect_is_refused(tmp_path, said, words):
    root = write_volumes(tmp_path / "data")
    (tmp_path / "a.yaml").write_text(f"root: {root}\n{said}\n")
    with pytest.raises(UserError, match=words):
        Archive([PRETRAIN], str(tmp_path / "a.yaml")).datamodule().index()


def test_what_a_task_has_no_use_for_is_said(tmp_path, capsys):
    root = write_volumes(tmp_path / "data")
    (tmp_path / "a.yaml").write_text(f"root: {root}\ntargets: {{dx: {{classes: [a, b]}}}}\n")
    Archive([PRETRAIN], str(tmp_path / "a.yaml"))
    assert "this task has no use for its targets" in capsys.readouterr().out


def test_grid_and_masks_and_targets_reach_volumes(tmp_path):
    root = write_volumes(tmp_path / "data", 8, ("T1w", "T2w", "lesion_seg"))
    for folder in sorted(root.iterdir()):
        label = np.zeros((24, 24, 24), np.uint8)
        label[8:12, 8:12, 8:12] = 2
        write_nifti(folder / "lesion_seg.nii.gz", label, np.eye(4))
    (root / "cases.csv").write_text("case_id,dx\n" + "".join(f"C{i},{'ill' if i % 2 else 'well'}\n" for i in range(8)))
    (tmp_path / "a.yaml").write_text(
        f"root: {root}\nmasks: {{lesion: {{name: lesion_seg, values: [2]}}}}\n"
        "grid: {reference: t1, spacing: [2, 2, 2]}\n"
        "targets: {state: {column: dx, classes: [well, ill]}}\n"
    )
    seg = Archive(["experiments/e_mim/configs/finetune_brats_seg.yaml"], str(tmp_path / "a.yaml")).datamodule()
    layout = seg.index()
    assert seg.regions == {"lesion": (2,)}
    assert layout.preprocessing.reference == "t1"
    assert layout.preprocessing.spacing == (2, 2, 2)
    probe = Archive(["experiments/e_mim/configs/finetune_idh_probe.yaml"], str(tmp_path / "a.yaml")).datamodule()
    probe.index()
    assert probe.targets == {f"C{i}": i % 2 for i in range(8)}


def of(*names: str) -> Record:
    return Record("a", "a", volumes={name: FileRef(Path(f"a/{name}.nii")) for name in names})


def test_modalities_are_named_by_patterns_and_places():
    record = of("x1_T1w", "mr", "T2w")
    (found,) = respelled([record], {"t1": "*[_.-]T1w", "pd": "mr[1]", "t2": "t2"})
    assert {name: str(ref) for name, ref in found.volumes.items()} == {
        "t1": "a/x1_T1w.nii", "pd": "a/mr.nii[1]", "t2": "a/T2w.nii"
    }  # fmt: skip
    with pytest.raises(DataError, match="Two volumes of the case a fit"):
        respelled([of("a_T1w", "b_T1w")], {"t1": "*_T1w"})
    with pytest.raises(DataError, match="No case has swi, which modalities: names as swi"):
        respelled([record], {"swi": "swi"})
    (left,) = respelled([of("head", "T1w")], {"t1": "head"})
    assert {name: ref.path.name for name, ref in left.volumes.items()} == {"t1": "head.nii"}


def test_targets_from_a_table_elsewhere(tmp_path):
    root = write_volumes(tmp_path / "data", 4)
    table = tmp_path / "dx.csv"
    table.write_text("case_id,dx,age\nC0,a,60\nC1,b,61\nC2,old,62\nC3,,63\n")
    archive = open_archive(root, needs={"volumes"})
    rules = {"dx": {"table": str(table), "classes": ["a", "b"], "merge": {"b": ["old"]}}, "age": {"table": str(table)}}
    with_targets(archive, rules)
    assert [record.targets["dx"] for record in archive.records] == ["a", "b", "b", ""]
    assert [record.targets["age"] for record in archive.records] == ["60", "61", "62", "63"]
    assert str(table) in archive.tables
    archive = open_archive(root, needs={"volumes"})
    with pytest.raises(DataError, match="has no column sex"):
        with_targets(archive, {"sex": {"table": str(table)}})
    with pytest.raises(DataError, match="no case has sex"):
        with_targets(archive, {"sex": {}})
    with pytest.raises(DataError, match="no case has a value of dx; the values found are a, b, old"):
        with_targets(archive, {"dx": {"table": str(table), "classes": ["x", "y"]}})
    assert isinstance(archive.records[0], Record)


def write_pictures(root: Path, count: int = 24) -> Path:
    rng = np.random.default_rng(0)
    (root / "img").mkdir(parents=True)
    rows = []
    for number in range(count):
        Image.fromarray(rng.integers(0, 255, (64, 64), dtype=np.uint8)).save(root / f"img/x{number}.png")
        text = "clear lungs and a normal heart today"
        rows.append({"file": f"img/x{number}.png", "who": f"p{number // 2}", "says": text, "ill": number % 2})
    pd.DataFrame(rows).to_csv(root / "data.csv", index=False)
    return root


TABLE = "layout: table\ntable: data.csv\ncolumns: {image: file, text: says}\nsubject: who\n"


@pytest.mark.parametrize("experiment", ["mrm_record", "mrm_genetics", "umd"])
def test_every_room_of_images_heeds_a_table(tmp_path, experiment):
    root = write_pictures(tmp_path / "data")
    (tmp_path / "a.yaml").write_text(f"root: {root}\nignore: ['*x23.png']\nmissing: ignore\n{TABLE}")
    configs = [f"experiments/{experiment}/configs/pretrain.yaml"]
    data = Archive(configs, str(tmp_path / "a.yaml")).datamodule()
    data.index()
    members = [member for part in data.splits.values() for member in part]
    assert len({member.patient_id for member in members}) == 12
    assert not any(path.name == "x23.png" for path in data.paths_in_use())


def test_targets_of_a_table_feed_classification(tmp_path):
    root = write_pictures(tmp_path / "data")
    (tmp_path / "a.yaml").write_text(
        f"root: {root}\n{TABLE.replace(', text: says', '')}targets: {{ill: {{classes: [0, 1]}}}}\n"
    )
    data = Archive(["experiments/mrm_record/configs/finetune_rsna.yaml"], str(tmp_path / "a.yaml")).datamodule()
    assert data.index().classes == ("ill",)
    assert {item.targets for item in data.images} == {(0.0,), (1.0,)}
    assert len({item.patient_id for item in data.images}) == 12


def test_a_layout_of_labels_refuses_what_it_does_not_know(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "a.yaml").write_text("root: data\nsubject: file\n")
    data = Archive(["experiments/mrm_record/configs/finetune_rsna.yaml"], str(tmp_path / "a.yaml")).datamodule()
    with pytest.raises(DataError, match="which has no setting subject"):
        data.index()


def test_modalities_say_nothing_to_those_who_read_pictures(tmp_path, capsys):
    root = write_pictures(tmp_path / "data")
    (tmp_path / "a.yaml").write_text(f"root: {root}\nmodalities: {{t1: a}}\ngrid: {{reference: t1}}\n{TABLE}")
    Archive(["experiments/umd/configs/pretrain.yaml"], str(tmp_path / "a.yaml")).datamodule().index()
    assert "this task has no use for its modalities, grid" in capsys.readouterr().out


def test_the_order_of_masks_is_part_of_what_a_cache_holds(tmp_path):
    from datamodules.volumes.cache import VolumeCache
    from datamodules.volumes.profiles import prepared

    root = write_volumes(tmp_path / "data", 3)
    cache = VolumeCache(root, prepared(open_archive(root, needs={"volumes"})), folder=tmp_path / "cache")
    first = Case("a", "a", {}, {"x": Path("x"), "y": Path("y")})
    turned = first._replace(labels={"y": Path("y"), "x": Path("x")})
    assert cache._members(first) != cache._members(turned)


def test_a_file_is_yaml_that_others_can_read():
    assert yaml.safe_load(FULL)["layout"] == "bids"
