"""The ``medmim`` command: everything around training. Each subcommand is implemented in the package it belongs to."""

import argparse
import importlib
import sys
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn

from common.errors import UsageError, UserError
from common.files import is_about_storage, storage_sentence
from common.names import printable
from common.runtime.lean_imports import import_torchmetrics
from common.runtime.process import prepare_memory


class Command(NamedTuple):
    """A subcommand.

    Arguments are declared here, away from the function that takes them, because its module imports torch or pandas: a
    page of help and a refusal of wrong usage must not. (jsonargparse would read them off the function, but has neither
    ``--seeds 0 1``, nor a repeated ``--config``, nor ``--vocab-size``.)

    Attributes:
        function: Dotted path of the function; it takes what is declared, by name.
        summary: One line for ``--help``.
        declare: Declares its arguments.
    """

    function: str
    summary: str
    declare: Callable[[ArgumentParser], None]


def _archive(parser: ArgumentParser) -> None:
    """Declare what becomes the argument ``archive``, a :class:`common.runtime.data_config.Archive`."""
    parser.set_defaults(takes_archive=True)
    parser.add_argument(
        "--config", action="append", required=True, help="configuration with a data section; repeat to add overlays"
    )
    parser.add_argument("--root", help="folder of the archive (default: data.root of the configuration)")
    parser.add_argument("--layout", help="use this layout instead of recognising it")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="another data setting, such as cache=b2nd"
    )


def _synthesize(parser: ArgumentParser) -> None:
    parser.add_argument("layout", nargs="?", help="layout to write, such as brats2023; an unknown name lists all")
    parser.add_argument(
        "--config", action="append", help="instead of a layout: configurations whose data.root ends in its name"
    )
    parser.add_argument("--out", help="folder to write (default: data/synthetic/LAYOUT, or the configuration's root)")
    parser.add_argument("--cases", type=int, default=16, help="number of cases (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the cases (default: %(default)s)")


def _doctor(parser: ArgumentParser) -> None:
    _archive(parser)
    parser.add_argument("--deep", action="store_true", help="read every byte; verify every check sum and voxel")
    parser.add_argument("--workers", type=int, default=4, help="threads (default: %(default)s)")


def _prepare(parser: ArgumentParser) -> None:
    _archive(parser)
    parser.add_argument("--workers", type=int, default=0, help="threads (default: one per core)")
    parser.add_argument(
        "--check", choices=("sampled", "full", "off"), help="how much of an existing cache is read (default: sampled)"
    )


def _split(parser: ArgumentParser) -> None:
    _archive(parser)
    parser.add_argument("--out", required=True, help="CSV to write, for data.split_file")
    parser.add_argument(
        "--by", choices=("case", "patient"), default="case", help="what each line names (default: %(default)s)"
    )
    parser.add_argument(
        "--lists", nargs=3, metavar=("TRAIN", "VAL", "TEST"), help="text files whose lines begin with a case"
    )
    parser.add_argument("--repair", action="store_true", help="drop patients from a list who are also in a later one")


def _tokenizer(parser: ArgumentParser) -> None:
    _archive(parser)
    parser.add_argument(
        "--kind", choices=("wordpiece", "bpe"), help="kind of tokenizer (default: the configuration's, else wordpiece)"
    )
    parser.add_argument("--vocab-size", type=int, help="maximum number of tokens (default: the configuration's)")
    parser.add_argument("--out", required=True, help="JSON file to write, for data.tokenizer")


def _export(parser: ArgumentParser) -> None:
    parser.add_argument("--exp", required=True, help="experiment, such as e_mim")
    parser.add_argument("--ckpt", required=True, help="run folder or checkpoint")
    parser.add_argument("--format", required=True, help="format, such as monai")
    parser.add_argument("--out", required=True, help="folder to write")


def _convert(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--exp", required=True, help="experiment whose fine-tuning will use the encoder, such as mrm_record"
    )
    parser.add_argument(
        "--weights", required=True, help="file with the weights: .safetensors, or written by torch.save"
    )
    parser.add_argument("--out", required=True, help="folder to write, to be used as CKPT=")
    parser.add_argument("--num-heads", type=int, help="attention heads (default: width / 64)")


def _embed(parser: ArgumentParser) -> None:
    _archive(parser)
    parser.add_argument("--ckpt", required=True, help="run folder, checkpoint or export")
    parser.add_argument("--out", required=True, help="Parquet file to write: subject_id, split, feature")


def _associate(parser: ArgumentParser) -> None:
    parser.add_argument("--features", required=True, help="Parquet file of medmim embed: subject_id, split, feature")
    parser.add_argument("--genotypes", required=True, help="PLINK prefix, .bed or .bgen; {chrom} stands for 1 to 22")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--split", default="test", help="only people of this split, or all (default: %(default)s)")
    parser.add_argument("--covariates", help="CSV with IID and numeric columns, such as sex and age")
    parser.add_argument(
        "--components", type=int, default=10, help="principal components of the features (default: %(default)s)"
    )
    parser.add_argument(
        "--genetic-components",
        type=int,
        default=0,
        help="principal components of the genotypes to add as covariates (default: 0)",
    )
    parser.add_argument("--kinship", help="table of pairs (IID1, IID2, KINSHIP); default: estimated from the genotypes")
    parser.add_argument(
        "--p1", type=float, default=5e-8, help="largest P of a region's leading variant (default: %(default)s)"
    )
    parser.add_argument(
        "--p2", type=float, default=1e-7, help="largest P of a region's other members (default: %(default)s)"
    )
    parser.add_argument(
        "--r2", type=float, default=0.1, help="smallest squared correlation within a region (default: %(default)s)"
    )
    parser.add_argument(
        "--kb",
        type=float,
        default=150,
        help="largest distance from the leading variant, in kilobases (default: %(default)s)",
    )


def _study(parser: ArgumentParser) -> None:
    parser.add_argument("study", nargs="?", help="YAML file, such as experiments/e_mim/configs/studies/collapse.yaml")
    parser.add_argument("--data", help="folder of the archive")
    parser.add_argument("--out", help="JSON file to write (default: into the experiment's results folder)")
    parser.add_argument("--arms", nargs="+", help="only these arms")
    parser.add_argument("--seeds", nargs="+", type=int, help="only these seeds")
    parser.add_argument(
        "--merge", dest="parts", nargs="+", metavar="FILE", help="run nothing; merge partial results into one"
    )
    parser.add_argument(
        "--readme", dest="readmes", nargs="+", metavar="FILE", help="only regenerate the tables of these READMEs"
    )


def _bench(parser: ArgumentParser) -> None:
    parser.add_argument("--exp", help="one experiment only (default: all)")
    parser.add_argument("--out", help="JSON file to write in addition")


def _plan(parser: ArgumentParser) -> None:
    parser.add_argument("--config", action="append", required=True, help="pretrain.yaml; repeat to add overlays")
    parser.add_argument("--machine", default="h200x8", help="name or YAML file of a machine (default: %(default)s)")
    parser.add_argument("--gpus", default="1,8,64", help="numbers of GPUs (default: %(default)s)")
    parser.add_argument("--samples", type=int, help="training cases, where there is no archive yet")
    parser.add_argument("--root", help="folder of the archive; only names and tables are read")
    parser.add_argument("--out", help="JSON file to write as well")


COMMANDS = {
    "synthesize": Command(
        "datamodules.synthetic.command.run", "write a small synthetic tree in an official layout", _synthesize
    ),
    "doctor": Command(
        "datamodules.commands.doctor.run",
        "read an archive's headers (--deep: every byte) and print what is wrong",
        _doctor,
    ),
    "prepare": Command("datamodules.commands.prepare.run", "build or verify the cache of an archive", _prepare),
    "split": Command("datamodules.commands.split.run", "write a split by patient as a file", _split),
    "tokenizer": Command(
        "datamodules.commands.tokenizer.run", "learn a vocabulary from the training texts of an archive", _tokenizer
    ),
    "export": Command("common.weights.export.run", "write a pre-trained encoder for use without this project", _export),
    "convert": Command(
        "common.weights.convert.run",
        "turn the weights of MAE, timm or published code into an encoder for CKPT=",
        _convert,
    ),
    "embed": Command("common.embed.run", "write the features of every case to Parquet", _embed),
    "associate": Command(
        "datamodules.genetics.association.run",
        "test variants for association with image features",
        _associate,
    ),
    "study": Command(
        "common.sweeps.runner.run", "run the arms of a comparison over seeds and write its results", _study
    ),
    "plan": Command(
        "common.sweeps.plan.run", "estimate hours and memory of a pre-training on a machine that is not there", _plan
    ),
    "bench": Command(
        "common.sweeps.bench.run", "time pairs of our own variants side by side and print the ratios", _bench
    ),
}


def build_parser() -> ArgumentParser:
    """Make the parser of all subcommands."""
    parser = ArgumentParser(prog="medmim", description=__doc__.splitlines()[0])
    parser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.declare(subparsers.add_parser(name, help=command.summary, description=command.summary))
    return parser


def execute(arguments: list[str]) -> None:
    """Run a subcommand inside this process.

    Raises:
        UserError: refused.
        SystemExit: wrong usage.
    """
    options = vars(build_parser().parse_args(arguments))
    module, _, function = COMMANDS[options.pop("command")].function.rpartition(".")
    if options.pop("takes_archive", False):
        from common.runtime.data_config import Archive

        options["archive"] = Archive(*(options.pop(name) for name in ("config", "root", "layout", "set")))
        import_torchmetrics()  # before the function's module imports Lightning
    getattr(importlib.import_module(module), function)(**options)


def main(arguments: list[str] | None = None) -> None:
    """Run ``medmim``. Exit codes: 0 done, 1 refused or failed with one line, 2 wrong usage."""
    prepare_memory()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    try:
        execute([argument for argument in arguments if argument != "--debug"])
    except UserError as error:
        if debug:
            raise
        _fail(error)
    except OSError as error:
        if debug or not is_about_storage(error):
            raise
        _fail(UserError(storage_sentence(Path(error.filename or "A file"), error, "written or read")))


def _fail(error: Exception) -> NoReturn:
    print(f"error: {printable(' '.join(str(error).split()))}", file=sys.stderr)
    sys.exit(2 if isinstance(error, UsageError) else 1)


if __name__ == "__main__":
    main()
