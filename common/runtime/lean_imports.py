"""Lightning without what it does not need at its import: three quarters of a short command's time are imports."""

import contextlib
import importlib
import sys
from collections.abc import Iterator
from typing import Any

#: Optional libraries that torchmetrics looks for, imports when it finds them, and none of our metrics uses.
_OPTIONAL = ("scipy", "torchvision", "transformers", "matplotlib")


@contextlib.contextmanager
def _optional_absent() -> Iterator[None]:
    """Let torchmetrics believe, for a while, that the optional libraries are absent.

    It asks through ``lightning_utilities``, by a function and by a class that looks when its truth is taken. What was
    answered is not stored, so that both say the truth again afterwards.
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

    To be called before the first import of Lightning. It changes private behaviour for the time of that import; where
    that behaviour has moved, torchmetrics is imported as it is.
    """
    if "torchmetrics" in sys.modules:
        return
    try:
        with _optional_absent():
            importlib.import_module("torchmetrics")
    except (ImportError, AttributeError, NameError, TypeError):
        importlib.import_module("torchmetrics")
