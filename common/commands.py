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

    Arguments are declared here, not in the module of the function that takes them, because that module imports torch or
    pandas, which ``--help`` and usage errors must not. (jsonargparse could derive them from the function, but supports
    neither ``--seeds 0 1``, nor a repeated ``--config``, nor ``--vocab-size``.)

    Attributes:
        function: Dotted path of the function; it takes what is declared, by name.
        summary: One line for ``--help``.
        declare: Declares its arguments.
    """

    function: str
    summary: str
    declare: Callable[[ArgumentParser], None]


def _archive(parser: ArgumentParser) -> None:
    """Declare the options that become the argument ``archive``, a :class:`common.runtime.data_config.Archive`."""
    parser.set_defaults(takes_archive=True)
    parser.add_argument(
        "--config", action="append", required=True, help="configuration with a data section; repeat to add overlays"
    )
    parser.add_argument(
        "--root", help="folder of the archive, or an archive.yaml (default: data.root of the configuration)"
    )
    parser.add_argument("--layout", help="use this layout instead of recognising it")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="another data setting, such as cache.format=b2nd; options of lightning's such as --data.NAME=VALUE are "
        "taken too, and those of model and trainer are left aside",
    )


def _synthesize(parser: ArgumentParser) -> None:
    parser.add_argument("layout", nargs="?", help="layout to write, such as brats2023; an unknown name lists all")
    parser.add_argument(
        "--config", action="append", help="instead of a layout: configurations whose data.root ends in its name"
    )
    parser.add_argument("--out", help="folder to write (default: data/synthetic/LAYOUT, or the configuration's root)")
    parser.add_argument("--cases", type=int, default=16, help="number of cases (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the cases (default: %(default)s)")


def _init(parser: ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", help="the archive; it is read, and nothing is written into it")
    parser.add_argument("--exp", help="experiment that it is for (default: all are tried)")
    parser.add_argument("--table", help="table of its images, where that lies elsewhere or is one of several")
    parser.add_argument("--out", help="file to write (default: archives/NAME.yaml)")
    parser.add_argument("--force", action="store_true", help="write over a file of that name")


def _doctor(parser: ArgumentParser) -> None:
    _archive(parser)
    parser.add_argument("--deep", action="store_true", help="read every byte; verify every check sum and voxel")
    parser.add_argument("--workers", type=int, default=4, help="threads (default: %(default)s)")


def _prepare(parser: ArgumentParser) -> None:
    _archive(parser)
    parser.add_argument("--workers", type=int, default=4, help="threads (default: %(default)s)")


def _split(parser: ArgumentParser) -> None:
    _archive(parser)
    parser.add_argument("--out", required=True, help="CSV to write, for data.split.file")
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
    parser.add_argument("--out", required=True, help="JSON file to write, for data.text.tokenizer")


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
    parser.add_argument("--num-heads", type=int, help="number of attention heads (default: width / 64)")


def _embed(parser: ArgumentParser) -> None:
    _archive(parser)
    parser.add_argument("--ckpt", required=True, help="run folder, checkpoint or export")
    parser.add_argument("--out", required=True, help="Parquet file to write: subject_id, split, feature")


def _evaluate_encoder(parser: ArgumentParser) -> None:
    _archive(parser)
    parser.add_argument("--ckpt", nargs="+", required=True, help="run folders, checkpoints or exports")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument(
        "--scores",
        nargs="+",
        default=["attentive", "linear", "knn"],
        choices=("attentive", "linear", "knn"),
        help="the first one is tested for differences (default: all three)",
    )
    parser.add_argument(
        "--no-controls",
        dest="controls",
        action="store_false",
        help="leave out the untrained encoder, the histogram and the grid of colours",
    )


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
    parser.add_argument("--out", help="JSON file to write (default: runs/EXP/study_NAME/)")
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


def _torture(parser: ArgumentParser) -> None:
    parser.add_argument("--exp", help="one experiment only (default: all)")
    parser.add_argument("--kills", type=int, default=20, help="kills of each experiment (default: %(default)s)")
    parser.add_argument("--out", help="folder to write all runs and the table to (default: a temporary one)")
    parser.add_argument("--seed", type=int, default=0, help="other seeds, other kills (default: %(default)s)")


#: What stands below every page of help.
EXIT_CODES = "Exit codes: 0 done, 1 refused or failed with one line, 2 wrong usage."

COMMANDS = {
    "synthesize": Command(
        "datamodules.synthetic.command.run", "write a small synthetic tree in an official layout", _synthesize
    ),
    "doctor": Command(
        "datamodules.commands.doctor.run",
        "read an archive's headers and 8 cases whole (--deep: every byte) and print what is wrong",
        _doctor,
    ),
    "init": Command(
        "datamodules.commands.init.run",
        "look at an archive and write archives/NAME.yaml, which says how it was understood; for DATA=",
        _init,
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
    "evaluate-encoder": Command(
        "common.sweeps.encoder_scores.run",
        "score frozen encoders and controls on an archive's labels, side by side",
        _evaluate_encoder,
    ),
    "associate": Command(
        "datamodules.genetics.association.run",
        "test variants for association with image features",
        _associate,
    ),
    "study": Command(
        "common.sweeps.runner.run", "run the arms of a comparison over seeds and write its results", _study
    ),
    "bench": Command(
        "common.sweeps.bench.run", "time pairs of our own variants side by side and print the ratios", _bench
    ),
    "torture": Command(
        "common.sweeps.torture.run", "kill and resume runs in many ways and compare them with whole ones", _torture
    ),
}


def build_parser() -> ArgumentParser:
    """Make the parser of all subcommands."""
    parser = ArgumentParser(prog="medmim", description=__doc__.splitlines()[0], epilog=EXIT_CODES)
    parser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.declare(
            subparsers.add_parser(name, help=command.summary, description=command.summary, epilog=EXIT_CODES)
        )
    return parser


def execute(arguments: list[str]) -> None:
    """Run a subcommand inside this process.

    Raises:
        UserError: refused.
        SystemExit: wrong usage.
    """
    parser = build_parser()
    found, others = parser.parse_known_args(arguments)
    options = vars(found)
    module, _, function = COMMANDS[options.pop("command")].function.rpartition(".")
    takes_archive = options.pop("takes_archive", False)
    if others and not (takes_archive and others[0].startswith("--")):
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    if takes_archive:
        from common.runtime.data_config import Archive, data_options

        root, settings = data_options(others)
        options["root"], options["set"] = root or options["root"], [*options["set"], *settings]
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
