import platform
import subprocess
import sys

import pytest

from common.commands import COMMANDS, main


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert COMMANDS[command][1].split("(")[0][:30] in " ".join(capsys.readouterr().out.split())


def test_unknown_commands_exit_with_2():
    with pytest.raises(SystemExit) as stop:
        main(["dance"])
    assert stop.value.code == 2


def test_a_missing_configuration_is_one_line_and_exits_with_2(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "--config", "nowhere.yaml"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: The configuration nowhere.yaml does not exist.\n"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be asked")
def test_freed_memory_is_kept():
    """Large blocks cost no new pages once they were there."""
    code = """
from common.commands import prepare_memory
prepare_memory()
import resource
block = b"medmim"
def touched():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block * 2 * 10**7
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first, again = touched(), touched()
assert again < first / 10, (first, again)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
