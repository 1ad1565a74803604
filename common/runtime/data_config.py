"""The data section of configurations, for commands that need an archive but no model."""

import argparse
from argparse import ArgumentError
from collections.abc import Sequence
from typing import Any

import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule

from common.errors import UserError
from common.runtime.configs import find_config, merge, read_config

#: Lines of jsonargparse's messages that only say how it tried.
_NOISE = (
    "Does not validate against",
    "Subtypes:",
    "Errors:",
    "- Expected a <class 'NoneType'>",
    "Given value type:",
    "Given value: N",
)


def one_line(message: str) -> str:
    """Return what a message of jsonargparse over many lines says."""
    lines = [line.strip() for line in message.splitlines()]
    words = [line.removeprefix("- ") for line in lines if line and not line.startswith(_NOISE)]
    return "; ".join(words).replace(":; ", ": ").removesuffix(".")


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare ``--config``, ``--root``, ``--layout`` and ``--set``."""
    parser.add_argument(
        "--config", action="append", required=True, help="configuration with a data section; repeat to overlay"
    )
    parser.add_argument("--root", help="the archive (default: the configuration's)")
    parser.add_argument("--layout", help="force a layout instead of recognising it")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a data setting, such as cache.format=b2nd"
    )


def read_data_section(configs: Sequence[str]) -> dict[str, Any]:
    """Merge the data sections of configurations, later ones over earlier ones.

    Raises:
        UserError: a configuration is missing or none names a data module.
    """
    section: dict[str, Any] = {}
    for name in configs:
        section = merge(section, read_config(find_config(name)).get("data") or {})
    if "class_path" not in section:
        raise UserError(f"{', '.join(configs)} names no data module (data.class_path).")
    return section


def data_options(configs: Sequence[str]) -> dict[str, Any]:
    """Return the arguments that configurations give to their data module."""
    return read_data_section(configs).get("init_args", {})


def data_section(args: argparse.Namespace) -> dict[str, Any]:
    """Merge the data sections of the configurations and the switches.

    Raises:
        UserError: as :func:`read_data_section`, or a setting has no ``=``.
    """
    section = read_data_section(args.config)
    options = section.setdefault("init_args", {})
    options |= {name: value for name, value in (("root", args.root), ("layout", args.layout)) if value is not None}
    for setting in args.set:
        name, sign, value = setting.partition("=")
        if not sign:
            raise UserError(f"--set takes NAME=VALUE, got {setting!r}.")
        *above, last = name.removeprefix("data.").split(".")
        nested: dict[str, Any] = {last: yaml.safe_load(value)}
        for part in reversed(above):
            nested = {part: nested}
        section["init_args"] = options = merge(options, nested)
    return section


def make_datamodule(args: argparse.Namespace) -> Any:
    """Instantiate the data module that the arguments describe.

    Raises:
        UserError: a setting does not exist or cannot have this value.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data", fail_untyped=False)
    section = data_section(args)
    try:
        return parser.instantiate(parser.parse_object({"data": section})).data
    except (ArgumentError, ValueError) as error:
        raise UserError(f"{one_line(str(error))}.") from error
