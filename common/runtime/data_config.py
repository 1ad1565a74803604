"""The data section of configurations, for commands that need an archive but no model."""

import json
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from common.errors import UsageError, UserError
from common.runtime.configs import find_config, merge, read_config
from common.runtime.lean_imports import import_torchmetrics

#: Lines of jsonargparse's messages that only describe its attempts.
_NOISE = (
    "Does not validate against",
    "Subtypes:",
    "Errors:",
    "- Expected a <class 'NoneType'>",
    "Given value type:",
    "Given value: N",
)


def one_line(message: str) -> str:
    """Return a multi-line message of jsonargparse in one line."""
    lines = [line.strip() for line in message.splitlines()]
    words = [line.removeprefix("- ") for line in lines if line and not line.startswith(_NOISE)]
    return "; ".join(words).replace(":; ", ": ").removesuffix(".")


#: What a person says about an archive, where it lies in the archive itself.
_ARCHIVE_FILE = "archive.yaml"
#: What options of ``lightning`` are about; those of data alone matter where there is no model.
_SECTIONS = ("data", "model", "trainer", "checkpoint", "safety", "seed_everything")
_ROOTS = ("--data.root", "--data.init_args.root")


def archive_options(
    section: Mapping[str, Any], root: str | None, said: Any = None
) -> tuple[dict[str, Any], Path] | None:
    """Return the data settings that an archive file asks for, and the file; None where there is none.

    What the file means is for the data module to say, which is imported only where there is a file. The ``config.yaml``
    of a run holds what its file said, so the one in the root is not asked again.

    Args:
        section: The data section without the file: ``class_path`` and ``init_args``.
        root: The root on the command line, a folder or an archive file; None: the section's.
        said: An archive file that is not written yet, in place of the root.

    Raises:
        UserError: there is no such data module, or the file cannot be used.
    """
    given = section.get("init_args") or {}
    name = root or given.get("root") or ""
    place = Path(name).expanduser()
    within = name and given.get("archive") is None and (place / _ARCHIVE_FILE).is_file()
    if not (said is not None or place.is_file() or within) or "class_path" not in section:
        return None
    import_torchmetrics()
    module, _, name = str(section["class_path"]).rpartition(".")
    try:
        read = getattr(getattr(import_module(module), name), "archive_options", None)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"There is no data module {section['class_path']} (data.class_path).") from error
    found_options: tuple[dict[str, Any], Path] | None = None if read is None else read(said or str(place), given)
    return found_options


def with_archive_file(arguments: Sequence[str]) -> tuple[list[str], Path | None]:
    """Lay what an archive file says over the configurations of a command line, under the options that follow them.

    Args:
        arguments: The command line, configurations with their bases filled in.

    Returns:
        The command line, and the file; None where there is none.

    Raises:
        UserError: the file cannot be used.
    """
    words = [part for word in arguments for part in _split_option(word)]
    section: dict[str, Any] = {}
    last, root = 0, None
    for place, (word, value) in enumerate(pairwise([*words, ""])):
        if word in ("--config", "-c"):
            content = json.loads(value) if value.startswith("{") else read_config(Path(value))
            section, last = merge(section, content.get("data") or {}), place + 2
        elif word in _ROOTS:
            root = value
        elif word in ("--data", "--data.class_path"):
            section = merge(section, {"class_path": value})
    found = archive_options(section, root)
    if found is None:
        return list(arguments), None
    options, file = found
    last = last or next((place + 1 for place, word in enumerate(words) if not word.startswith("-")), 0)
    laid = ["--config", json.dumps({"data": {"init_args": options}})]
    rest = list(words[last:])
    for place, word in enumerate(rest[:-1]):
        rest[place + 1] = options["root"] if word in _ROOTS else rest[place + 1]
    return [*words[:last], *laid, *rest], file


def data_options(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return what options of ``lightning`` say of the data: the root, and the settings as ``NAME=VALUE``.

    Args:
        words: Options such as ``--data.root=DIR``, ``--data.batch_size 4`` or ``--trainer.max_steps=9``; those of
            other sections say nothing of the data.

    Raises:
        UsageError: one is none, or has no value.
    """
    root, settings, rest = None, [], list(words)
    while rest:
        word = rest.pop(0)
        name, sign, value = word.partition("=")
        section = name.removeprefix("--").partition(".")[0]
        if not word.startswith("--") or section not in _SECTIONS:
            raise UsageError(f"There is no option {word}; those of lightning begin with --data. and the like.")
        if not sign:
            if not rest or rest[0].startswith("--"):
                raise UsageError(f"{name} needs a value.")
            value = rest.pop(0)
        if name in _ROOTS:
            root = value
        elif section == "data":
            settings.append(f"{name.removeprefix('--data.').removeprefix('init_args.')}={value}")
    return root, settings


def _split_option(word: str) -> list[str]:
    """Return a configuration or a root that is given with ``=`` as two words, and any other word as it is."""
    name, sign, value = word.partition("=")
    return [name, value] if sign and name in ("--config", *_ROOTS, "--data", "--data.class_path") else [word]


@dataclass(frozen=True)
class Archive:
    """An archive as given to a command. Creating one reads the configurations, before any large import.

    Attributes:
        configs: Configurations, later ones over earlier ones.
        root: Its folder, or an archive file; None: the configuration's.
        layout: Its layout; None: the configuration's.
        settings: Further data settings, each as ``NAME=VALUE``.
        said: An archive file that is not written yet, in place of a root.
        section: The data section that they come to: ``class_path`` and ``init_args``.

    Raises:
        UserError: a configuration is missing or none names a data module, or a setting has no ``=``.
    """

    configs: Sequence[str]
    root: str | None = None
    layout: str | None = None
    settings: Sequence[str] = ()
    said: Any = None
    section: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        section: dict[str, Any] = {}
        for name in self.configs:
            section = merge(section, read_config(find_config(name)).get("data") or {})
        if "class_path" not in section:
            raise UserError(f"{', '.join(self.configs)} names no data module (data.class_path).")
        found = archive_options(section, self.root, self.said)
        options = merge({}, section.get("init_args") or {})
        given = {"root": self.root, "layout": self.layout}
        if found is not None:
            options = merge(options, found[0])
            del given["root"]
        options |= {name: value for name, value in given.items() if value is not None}
        for setting in self.settings:
            name, sign, value = setting.partition("=")
            if not sign:
                raise UserError(f"--set takes NAME=VALUE, got {setting!r}.")
            *above, last = name.removeprefix("data.").split(".")
            nested: dict[str, Any] = {last: yaml.safe_load(value)}
            for part in reversed(above):
                nested = {part: nested}
            options = merge(options, nested)
        object.__setattr__(self, "section", section | {"init_args": options})

    def datamodule(self) -> Any:
        """Instantiate its data module.

        Raises:
            UserError: unknown setting or invalid value.
        """
        import_torchmetrics()
        from lightning.pytorch import LightningDataModule

        parser = ArgumentParser(exit_on_error=False)
        parser.add_subclass_arguments(LightningDataModule, "data", fail_untyped=False)
        try:
            datamodule = parser.instantiate(parser.parse_object({"data": self.section})).data
        except (ArgumentError, ValueError) as error:
            raise UserError(f"{one_line(str(error))}.") from error
        folder = Path(self.configs[0]).resolve().parent
        if folder.name == "configs":
            datamodule.purpose = folder.parent.name
        return datamodule
