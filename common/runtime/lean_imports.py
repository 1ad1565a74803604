"""Importing Lightning without unneeded libraries: imports are three quarters of a short command's time."""

import contextlib
import importlib
import sys
from collections.abc import Iterator
from typing import Any

#: Optional libraries that torchmetrics imports if present and none of our metrics uses.
_OPTIONAL = ("scipy", "torchvision", "transformers", "matplotlib")


@contextlib.contextmanager
def _optional_absent() -> Iterator[None]:
    """Hide the optional libraries from torchmetrics for a while.

    It asks through ``lightning_utilities``, by a function and by a class that checks when evaluated as a bool. Neither
    stores the answer, so both are right again afterwards.
    """
    asked: Any = importlib.import_module("lightning_utilities.core.imports")
    available, truth = asked.package_available, asked.RequirementCache.__bool__

    def package_available(name: str) -> bool:
        return name not in _OPTIONAL and available(name)

    def is_met(requirement: Any) -> bool:
        name = str(requirement.requirement or requirement.module)
        return not name.startswith(_OPTIONAL) and truth(requirement)

    asked.package_available, asked.RequirementCache.__bool__ = package_available, is_met
    try:
        yield
    finally:
        asked.package_available, asked.RequirementCache.__bool__ = available, truth


def import_torchmetrics() -> None:
    """Import torchmetrics, which Lightning imports, without scipy.signal, torchvision, transformers and matplotlib.

    Call this before the first import of Lightning. It patches private functions during that import; if they have moved,
    torchmetrics is imported unchanged.
    """
    if "torchmetrics" in sys.modules:
        return
    try:
        with _optional_absent():
            importlib.import_module("torchmetrics")
    except (ImportError, AttributeError, NameError, TypeError):
        importlib.import_module("torchmetrics")
