import re
import subprocess
import sys

import pytest
import yaml

from common.checkpoint import resolve_checkpoint
from common.cli import MedmimCLI, main
from common.entry import COMMANDS, answer, help_page, values_of
from common.errors import UserError
from datamodules.registry import open_archive

CONFIG = "experiments/e_mim/configs/pretrain.yaml"


def test_what_needs_no_torch_imports_none():
    code = f"""
import sys
from common.entry import answer
for arguments in (["--help"], ["fit", "--help"], ["--version"], [], ["dance"], ["fit", "--config", "nowhere.yaml"],
                  ["fit", "--config", "{CONFIG}", "--data.root", "/nowhere"], ["fit", "--config", "{CONFIG}"]):
    print(answer(arguments), file=sys.stderr)
print({{"torch", "numpy", "lightning"}} & set(sys.modules))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "set()"
    codes = [line for line in result.stderr.splitlines() if not line.startswith("error: ")]
    assert codes == ["0", "0", "0", "2", "2", "2", "1", "None"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "A command is missing"),
        (["dance"], 2, "Unknown command 'dance': it is one of fit"),
        (["dance", "--help"], 2, "Unknown command 'dance'"),
        (["fit", "--config", "nowhere.yaml"], 2, "The configuration nowhere.yaml does not exist."),
        (["--config=nowhere.yaml", "fit"], 2, "The configuration nowhere.yaml"),
        (["fit", "--ckpt_path=no/such"], 1, "There is no checkpoint at no/such"),
        (["fit", "--data.root", "/nowhere\x1b[31m"], 1, r"The data root /nowhere\x1b[31m is not a folder."),
    ],
)
def test_a_mistake_is_one_line(capsys, arguments, code, words):
    assert answer(arguments) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"error: {words}")
    assert shown.err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["fit", "--config", CONFIG],
        ["fit", "--config", CONFIG, "--ckpt_path=null"],
        ["fit", "--config", CONFIG, "--data.root=/nowhere", "--print_config"],
        ["fit", "--config", "nowhere.yaml", "--debug"],
        ["fit", "--help-all"],
        ["fit", "--model.help=common.blocks.vit.VisionTransformer"],
    ],
)
def test_all_else_is_left_to_the_command(capsys, arguments):
    assert answer(arguments) is None
    assert capsys.readouterr() == ("", "")


def test_sentences_and_codes_are_those_of_the_command(capsys, tmp_path):
    with pytest.raises(UserError) as later:
        resolve_checkpoint("no/such")
    assert answer(["fit", "--ckpt_path=no/such"]) == 1
    assert capsys.readouterr().err == f"error: {later.value}\n"
    with pytest.raises(UserError) as later:
        open_archive(tmp_path / "gone")
    assert answer(["fit", f"--data.root={tmp_path / 'gone'}"]) == 1
    assert capsys.readouterr().err == f"error: {later.value}\n"
    assert answer(["fit", "--config=gone.yaml"]) == 2
    first = capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config=gone.yaml"])
    assert (stop.value.code, capsys.readouterr().err) == (2, first)


def test_values_of_options():
    assert list(values_of(["--a", "1", "--b=2", "--a=3", "--a"], "--a")) == ["1", "3"]


def test_versions_are_shown(capsys):
    assert answer(["--version"]) == 0
    assert "torch " in capsys.readouterr().out


def test_the_pages_name_what_there_is(monkeypatch):
    """Every command and option of the pages is one of the parser's, under the name and in the place the page says."""
    monkeypatch.setattr(MedmimCLI, "_run_subcommand", lambda self, subcommand: None)
    monkeypatch.setattr(MedmimCLI, "instantiate_classes", lambda self: None)
    cli = MedmimCLI(["fit", "--config", "experiments/e_mim/configs/finetune_brats_seg.yaml"])
    assert list(COMMANDS) == list(MedmimCLI.subcommands())
    assert re.findall(r"^  ([a-z]+) ", help_page(None), re.MULTILINE)[:4] == list(COMMANDS)
    settings = yaml.safe_load(cli.parser.dump(cli.config, skip_unset=False))["fit"]
    for command in COMMANDS:
        options = cli._subcommand_parsers[command].format_help()
        shown = set(re.findall(r"--[\w.]+", help_page(command))) - {"--help", "--debug", "--model.help", "--data.help"}
        assert len(shown) > 10
        for option in shown:
            place = settings
            for part in option.removeprefix("--").split(".") if option.startswith(("--model", "--data")) else ():
                place = place[part] if part in place else place["init_args"][part]
            assert option.startswith(("--model", "--data")) or re.search(rf"{re.escape(option)}\b", options), option
    assert "{" not in help_page("test")
