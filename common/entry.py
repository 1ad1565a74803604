"""The ``lightning`` command before importing torch: help, versions and usage errors are answered at once.

Importing torch and Lightning takes seconds; a mistyped path should not. At its top this module imports only the
standard library and equally light modules.
"""

import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

from common.names import printable

COMMANDS = ("fit", "validate", "test", "predict")

_CHECKPOINT = {"fit": "continue this run"} | dict.fromkeys(COMMANDS[1:], "the run, or one of its checkpoints, to use")


def help_page(command: str | None) -> str:
    """Return the help page of a command, or the general one."""
    pages = files("common").joinpath("help")
    if command is None:
        return pages.joinpath("lightning.txt").read_text(encoding="utf-8")
    page = pages.joinpath("command.txt").read_text(encoding="utf-8")
    return page.replace("{command}", command).replace("{checkpoint}", _CHECKPOINT[command])


def versions() -> str:
    """Return the versions of this project and its main dependencies."""
    found = []
    for name in ("medmim", "lightning", "torch"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} (not installed)")
    return ", ".join(found)


def values_of(arguments: Sequence[str], *options: str) -> Iterator[str]:
    """Yield the values of options, given as ``--name value`` or ``--name=value``."""
    for argument, following in pairwise([*arguments, ""]):
        name, sign, value = argument.partition("=")
        if name in options and (sign or following):
            yield value if sign else following


def refusal(arguments: Sequence[str]) -> tuple[str, int] | None:
    """Return an error and its exit code; None if nothing is wrong as far as can be told without torch.

    The messages are those that the command itself would print later.
    """
    from common.errors import UsageError
    from common.runtime.configs import expand_config_arguments

    try:
        expand_config_arguments(arguments)
    except UsageError as error:
        return str(error), 2
    for path in values_of(arguments, "--ckpt_path"):
        if path != "null" and not Path(path).exists():
            return f"There is no checkpoint at {path}: give a file or a run folder.", 1
    for path in values_of(arguments, "--data.root", "--data.init_args.root"):
        if not Path(path).expanduser().exists():
            return f"The data root {path} is not a folder.", 1
    return None


def answer(arguments: Sequence[str]) -> int | None:
    """Answer what does not need torch.

    Returns:
        The exit code; None if the command has to run.
    """
    words = [argument for argument in arguments if not argument.startswith("-")]
    command = next((word for word in words if word in COMMANDS), None)
    refused: tuple[str, int] | None = None
    if command is None and "--version" in arguments:
        print(versions())
        return 0
    if {"-h", "--help"} & set(arguments) and (command or not words):
        print(help_page(command), end="")
        return 0
    if command is None:
        found = f"Unknown command {words[0]!r}" if words else "A command is missing"
        refused = f"{found}: it is one of {', '.join(COMMANDS)}. `lightning --help` explains them.", 2
    elif not any(argument.startswith(("--print_config", "--help", "--debug")) for argument in arguments):
        refused = refusal(arguments)
    if refused is None:
        return None
    print(f"error: {printable(refused[0])}", file=sys.stderr)
    return refused[1]


def main() -> None:
    """Run ``lightning``. Exit codes: as :func:`common.cli.main`."""
    arguments = sys.argv[1:]
    code = answer(arguments)
    if code is not None:
        sys.exit(code)
    from common.runtime.process import prepare_memory

    prepare_memory()
    from common.cli import main as run

    run(["--help" if argument == "--help-all" else argument for argument in arguments])


if __name__ == "__main__":
    main()
