import argparse
import importlib
import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from common.commands import COMMANDS, main


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert COMMANDS[command][1].split("(")[0][:30] in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_declared_is_what_the_function_takes(command):
    module, _, function = COMMANDS[command].function.rpartition(".")
    taken = inspect.signature(getattr(importlib.import_module(module), function)).parameters
    parser = argparse.ArgumentParser()
    COMMANDS[command].declare(parser)
    declared = {action.dest for action in parser._actions} - {"help"}
    if parser.get_default("takes_archive"):
        declared = declared - {"config", "root", "layout", "set"} | {"archive"}
    assert declared == set(taken)
    assert all(parameter.annotation is not parameter.empty for parameter in taken.values())


def test_unknown_commands_exit_with_2():
    with pytest.raises(SystemExit) as stop:
        main(["dance"])
    assert stop.value.code == 2


def test_a_missing_configuration_is_one_line_and_exits_with_2(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "--config", "nowhere.yaml"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: The configuration nowhere.yaml does not exist.\n"


def test_a_manifest_cannot_have_folders_removed_nor_break_the_report(brain_root, tmp_path, capsys):
    """Each of these names removed a folder, or ended in a traceback."""
    root = shutil.copytree(brain_root / "brats", os.path.join(tmp_path, os.fsdecode(b"caf\xe9")))
    images = [str(path.relative_to(root)) for path in sorted(Path(root).rglob("*_t1.nii.gz"))]
    victims = [tmp_path / "victim/file", tmp_path / "cache/victim/file"]
    for victim in victims:
        victim.parent.mkdir(parents=True)
        victim.write_text("mine")
    names = ["./../../../victim", "../../../../victim", "sub-01/ses-1", "n" * 250]
    studies = [{"study": name, "image": {"t1": image}} for name, image in zip(names, images, strict=False)]
    (Path(root) / "datalist.json").write_text(json.dumps({"training": studies[1:], "validation": studies[:1]}))
    main(["prepare", "--config", "experiments/brainmvp/configs/pretrain.yaml", "--root", str(root),
          "--set", "atlas=[40,44,36]"])  # fmt: skip
    assert [victim.read_text() for victim in victims] == ["mine", "mine"]
    assert capsys.readouterr().out.splitlines()[-1] == "faults: none"
    assert len(list((tmp_path / "cache").glob("volumes/*/cases/*/image.npy"))) == len(studies)


def test_help_costs_no_torch():
    """The small command must answer at once."""
    code = """
import contextlib, sys
from common.commands import main
for arguments in (["--help"], ["doctor", "--help"], ["dance"], ["doctor", "--config", "nowhere.yaml"]):
    with contextlib.suppress(SystemExit):
        main(arguments)
print({"torch", "numpy", "lightning"} & set(sys.modules))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "set()"


@pytest.mark.slow
def test_commands_that_train_nothing_import_no_lightning():
    """Nor torchmetrics, and association no torch: a name printed or a pseudonym made is no reason to."""
    code = """
import sys
import datamodules.genetics.association
print({"torch"} & set(sys.modules))
import common.checkpoint, common.weights.convert, common.weights.export, datamodules.synthetic.command
print({"lightning", "torchmetrics", "monai"} & set(sys.modules))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == ["set()", "set()"]
