"""The data section of configurations, for commands that need an archive but no model."""

from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from common.errors import UserError
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


@dataclass(frozen=True)
class Archive:
    """An archive as given to a command. Creating one reads the configurations, before any large import.

    Attributes:
        configs: Configurations, later ones over earlier ones.
        root: The root folder; None: the configuration's.
        layout: Its layout; None: the configuration's.
        settings: Further data settings, each as ``NAME=VALUE``.
        section: The resulting data section: ``class_path`` and ``init_args``.

    Raises:
        UserError: a configuration is missing or none names a data module, or a setting has no ``=``.
    """

    configs: Sequence[str]
    root: str | None = None
    layout: str | None = None
    settings: Sequence[str] = ()
    section: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        section: dict[str, Any] = {}
        for name in self.configs:
            section = merge(section, read_config(find_config(name)).get("data") or {})
        if "class_path" not in section:
            raise UserError(f"{', '.join(self.configs)} defines no data module (data.class_path).")
        given = {"root": self.root, "layout": self.layout}
        options = section.get("init_args", {}) | {name: value for name, value in given.items() if value is not None}
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
