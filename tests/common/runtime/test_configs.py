import json

import pytest

from common.errors import UsageError
from common.runtime.configs import expand_config_arguments, find_config, merge, read_config

CONFIGS = "experiments/e_mim/configs"


def write(folder, **contents):
    folder.mkdir(exist_ok=True)
    for name, text in contents.items():
        (folder / f"{name.replace('__', '.')}.yaml").write_text(text)
    return folder


def test_merge_keeps_what_the_overlay_does_not_name():
    merged = merge({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 9}, "d": {"e": 4}})
    assert merged == {"a": {"b": 9, "c": 2}, "d": {"e": 4}}


def test_another_class_drops_the_arguments_of_the_old_one():
    old = {"class_path": "SGD", "init_args": {"momentum": 0.9}}
    assert merge({"x": old}, {"x": {"init_args": {"lr": 1}}})["x"]["init_args"] == {"momentum": 0.9, "lr": 1}
    assert merge({"x": old}, {"x": {"class_path": "SGD"}})["x"] == old
    assert merge({"x": old}, {"x": {"class_path": "Adam"}})["x"] == {"class_path": "Adam"}
    assert merge({"x": {"init_args": {"lr": 1}}}, {"x": old})["x"]["init_args"] == {"lr": 1, "momentum": 0.9}


def test_lists_append_only_where_they_say_so():
    assert merge({"c+": [1]}, {"c+": [2]}) == {"c+": [1, 2]}
    assert merge({"c": [1]}, {"c+": [2]}) == {"c": [1, 2]}
    assert merge({"c+": [1]}, {"c": [2]}) == {"c": [2]}
    assert merge({"c": [1]}, {"c": [2]}) == {"c": [2]}


def test_bases_come_first_in_their_order(tmp_path):
    write(tmp_path, a="v: {x: 1, y: 1, z: 1}", b="base: [a.yaml]\nv: {y: 2, z: 2}", c="v: {z: 3}")
    write(tmp_path, task="base: [b.yaml, c.yaml]\nw: 4")
    assert read_config(tmp_path / "task.yaml") == {"v": {"x": 1, "y": 2, "z": 3}, "w": 4}


def test_a_base_may_be_a_file_of_the_package(tmp_path, monkeypatch):
    write(tmp_path, mine=f"base: [{CONFIGS}/families/segmentation.yaml]\ndata: {{init_args: {{root: /mine}}}}")
    monkeypatch.chdir(tmp_path)
    config = read_config(tmp_path / "mine.yaml")
    assert config["model"]["class_path"].endswith("SegmentationModule")
    assert config["data"]["init_args"]["root"] == "/mine"
    assert config["data"]["init_args"]["labels"] == {"needed": True, "fraction": 1.0}


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        ({"task": "base: [gone.yaml]"}, "task.yaml: its base .*gone.yaml does not exist"),
        ({"task": "base: [a.yaml]", "a": "base: [task.yaml]"}, "own base: task.yaml -> a.yaml -> task.yaml"),
        ({"task": "base: [task.yaml]"}, "is its own base: task.yaml -> task.yaml"),
        ({"task": "base: a.yaml"}, "base must be a list"),
        ({"task": "- 1"}, "must map names"),
        ({"task": "a: [1"}, "not a valid YAML file: .*line 1"),
    ],
)
def test_what_is_wrong_is_one_sentence(tmp_path, contents, words):
    write(tmp_path, **contents)
    with pytest.raises(UsageError, match=words) as error:
        read_config(tmp_path / "task.yaml")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) - str(error.value).count(str(tmp_path)) * len(str(tmp_path)) < 300


def test_a_file_used_twice_is_no_cycle(tmp_path):
    write(tmp_path, a="v: 1", b="base: [a.yaml]", task="base: [a.yaml, b.yaml]")
    assert read_config(tmp_path / "task.yaml") == {"v": 1}


def test_a_task_takes_over_the_overlays_of_its_families(tmp_path):
    write(tmp_path, far="v: 1", far__small="v: 2", near="base: [far.yaml]", near__smoke="v: 3", far__smoke="v: 4")
    write(tmp_path, task="base: [near.yaml]", own="base: [near.yaml]", own__small="v: 5")
    assert find_config(str(tmp_path / "task.smoke.yaml")).name == "near.smoke.yaml"
    assert find_config(str(tmp_path / "task.small.yaml")).name == "far.small.yaml"
    assert find_config(str(tmp_path / "own.small.yaml")).name == "own.small.yaml"
    for name in ("task.large.yaml", "gone.small.yaml", "gone.yaml"):
        with pytest.raises(UsageError, match=f"{name} does not exist"):
            find_config(str(tmp_path / name))


def test_arguments_are_expanded_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, plain="v: 1")
    given = ["fit", "--config", f"{CONFIGS}/pretrain.yaml", f"--config={CONFIGS}/feature.yaml", "-c", "plain.yaml"]
    expanded = expand_config_arguments(given)
    assert "base" not in json.loads(expanded[2])
    assert json.loads(expanded[2])["model"]["init_args"]["encoder"]["init_args"]["embed_dim"] == 768
    assert expanded[3].endswith("experiments/e_mim/configs/feature.yaml")
    assert expanded[3] != given[3]
    assert expanded[4:] == ["-c", "plain.yaml"]
    assert expand_config_arguments(expanded) == expanded
