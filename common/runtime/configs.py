"""Configuration files: finding them and merging their bases.

A configuration may begin with ``base:``, a list of files whose settings it inherits: names relative to its own folder,
or ``experiments/...`` for a file of the package. Bases are merged in order and the file itself comes last, so later
values win; lists are replaced, except that ``callbacks+`` appends; a different ``class_path`` drops the old class's
arguments. Merging precedes parsing, so that ``--print_config`` and the ``config.yaml`` of a run show every value and
no ``base``. A task also inherits its family's overlays: if ``finetune_x.small.yaml`` does not exist, the name stands
for ``families/y.small.yaml``, where ``families/y.yaml`` is a base of ``finetune_x.yaml``.
"""

import json
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader

from common.errors import UsageError

_PACKAGE = "experiments/"


def package_file(path: str) -> str:
    """Resolve ``experiments/...`` against the installed package if the working directory does not contain it."""
    if not Path(path).exists() and path.startswith(_PACKAGE):
        installed = Path(str(files("experiments"))).joinpath(path.removeprefix(_PACKAGE))
        if installed.parent.is_dir():
            return str(installed)
    return path


def merge(base: dict[str, Any], overlay: dict[str, Any]) -> dict[str, Any]:
    """Merge two nested mappings; the overlay takes precedence.

    A different ``class_path`` replaces a mapping, and ``name+`` appends to the list ``name``.
    """
    if base.get("class_path", overlay.get("class_path")) != overlay.get("class_path", base.get("class_path")):
        return overlay
    result = dict(base)
    for key, value in overlay.items():
        if key.endswith("+"):
            target = key[:-1] if key[:-1] in result else key
            result[target] = [*(result.get(target) or []), *value]
            continue
        result.pop(f"{key}+", None)
        old = result.get(key)
        result[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def _load(path: Path) -> dict[str, Any]:
    """Read one file without merging its bases.

    Raises:
        UsageError: it is not a YAML mapping, or its ``base`` is not a list of names.
    """
    try:
        content = get_loader("yaml")(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not a valid YAML file: {' '.join(str(error).split())[:160]}.") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} must map names (model, data, trainer) to settings.")
    bases = content.get("base", [])
    if not isinstance(bases, list) or not all(isinstance(name, str) for name in bases):
        raise UsageError(f"{path}: base must be a list of configuration files, got {bases!r}.")
    return content


def _bases(path: Path, content: dict[str, Any]) -> Iterator[Path]:
    for name in content.get("base", []):
        yield Path(package_file(name)) if name.startswith(_PACKAGE) else path.parent / name


def _family_overlay(path: Path) -> Path | None:
    """Return the family's overlay for a task without an overlay of this name."""
    stage, _, size = path.stem.rpartition(".")
    task = path.with_name(f"{stage}.yaml")
    if not stage or not task.is_file():
        return None
    for base in reversed(list(_bases(task, _load(task)))):
        overlay = base.with_name(f"{base.stem}.{size}.yaml")
        found = overlay if overlay.is_file() else _family_overlay(overlay)
        if found is not None:
            return found
    return None


def find_config(name: str) -> Path:
    """Return the file for a name on the command line: that path, the package's, or an overlay of the family.

    Raises:
        UsageError: no such file.
    """
    path = Path(package_file(name))
    found = path if path.is_file() else _family_overlay(path)
    if found is None:
        raise UsageError(f"The configuration {name} does not exist.")
    return found


def read_config(path: Path, above: Sequence[Path] = ()) -> dict[str, Any]:
    """Read a configuration and merge its bases.

    Args:
        path: The file.
        above: The chain of files whose bases led here.

    Raises:
        UsageError: a file is missing or malformed, or is its own base.
    """
    chain = [*above, path.resolve()]
    if path.resolve() in above:
        raise UsageError(f"{path} is its own base: {' -> '.join(file.name for file in chain)}.")
    if not path.is_file():
        raise UsageError(f"{above[-1]}: its base {path} does not exist." if above else f"{path} does not exist.")
    content = _load(path)
    result: dict[str, Any] = {}
    for base in _bases(path, content):
        result = merge(result, read_config(base, chain))
    return merge(result, {key: value for key, value in content.items() if key != "base"})


def expand_config_arguments(arguments: Sequence[str]) -> list[str]:
    """Resolve every ``--config`` from any folder, and replace files that have bases by the merged settings as JSON.

    Raises:
        UsageError: as :func:`find_config` and :func:`read_config`.
    """
    result = list(arguments)
    for index, argument in enumerate(result):
        if argument in ("--config", "-c") and index + 1 < len(result):
            result[index + 1] = _expand(result[index + 1])
        elif argument.startswith("--config="):
            result[index] = "--config=" + _expand(argument.removeprefix("--config="))
    return result


def _expand(name: str) -> str:
    if name.startswith("{"):  # settings in place of a file
        return name
    path = find_config(name)
    return json.dumps(read_config(path)) if "base" in _load(path) else str(path)
