"""The experiments of this installation, by name: names from outside are never used as import paths directly."""

import importlib
import pkgutil
from importlib.resources import files
from pathlib import Path
from types import ModuleType


def experiment_names() -> list[str]:
    """Return the names of all experiments."""
    return sorted(module.name for module in pkgutil.iter_modules([str(files("experiments"))]) if module.ispkg)


def experiment_module(experiment: str, name: str) -> ModuleType | None:
    """Return the module ``experiments.<experiment>.<name>``; None if there is no such experiment or module."""
    if experiment not in experiment_names():
        return None
    if not Path(str(files("experiments")), experiment, f"{name}.py").is_file():
        return None
    return importlib.import_module(f"experiments.{experiment}.{name}")
