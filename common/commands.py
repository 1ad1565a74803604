"""The ``medmim`` command: everything around training. Each subcommand lives where its subject does."""

import argparse
import importlib
import sys

from common.runtime.process import prepare_memory

#: Subcommand to (module with ``add_arguments`` and ``run``, what it does). Modules are imported when they are needed.
COMMANDS = {
    "synthesize": ("datamodules.synthetic.command", "write a small synthetic tree in an official layout"),
    "doctor": ("datamodules.commands.doctor", "read an archive's headers (--deep: every byte) and print what is wrong"),
    "prepare": ("datamodules.commands.prepare", "build or verify the cache of an archive"),
    "split": ("datamodules.commands.split", "write a split by patient as a file"),
    "tokenizer": ("datamodules.reports.tokens", "learn a vocabulary from the training texts of an archive"),
    "export": ("common.weights.export", "write a pre-trained encoder for use without this project"),
    "convert": ("common.weights.convert", "turn the weights of MAE, timm or published code into an encoder for CKPT="),
    "embed": ("common.embed", "write the features of every case to Parquet"),
    "associate": (
        "datamodules.genetics.association",
        "test variants against image features, and count regions",
    ),
    "study": ("common.sweeps.runner", "run the arms of a comparison over seeds and write its results"),
    "bench": ("common.sweeps.bench", "time our own pairs side by side and print the ratios"),
}


def build_parser(wanted: str | None = None) -> argparse.ArgumentParser:
    """Make the parser; only the wanted subcommand's module is imported."""
    parser = argparse.ArgumentParser(prog="medmim", description=__doc__.splitlines()[0])
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, summary) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary)
        if name == wanted:
            importlib.import_module(module).add_arguments(subparser)
    return parser


def execute(arguments: list[str]) -> None:
    """Run a subcommand inside this process.

    Raises:
        UserError: refused.
        SystemExit: wrong usage.
    """
    wanted = next((argument for argument in arguments if argument in COMMANDS), None)
    args = build_parser(wanted).parse_args(arguments)
    importlib.import_module(COMMANDS[args.command][0]).run(args)


def main(arguments: list[str] | None = None) -> None:
    """Run ``medmim``. Exit codes: 0 done, 1 refused or failed with one line, 2 wrong usage."""
    prepare_memory()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    from common.errors import UsageError, UserError
    from common.names import printable

    try:
        execute([argument for argument in arguments if argument != "--debug"])
    except UserError as error:
        if debug:
            raise
        print(f"error: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)


if __name__ == "__main__":
    main()
