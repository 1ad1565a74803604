import subprocess
import sys
from types import SimpleNamespace

import pytest

from common.runtime import lean_imports


@pytest.mark.slow
def test_the_command_imports_nothing_optional():
    code = """
import sys
import common.cli
import torchmetrics.functional.classification as metrics
import torch
from torchmetrics.utilities.imports import _SCIPY_AVAILABLE
assert bool(_SCIPY_AVAILABLE)
assert metrics.binary_auroc(torch.tensor([0.1, 0.9]), torch.tensor([0, 1])) == 1
print({"torchvision", "transformers", "scipy.signal", "matplotlib", "monai", "sklearn"} & set(sys.modules))
import datamodules.volumes.datamodule
print({"monai"} & set(sys.modules))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == ["set()", "set()"]


def import_with(monkeypatch, asked, torchmetrics):
    """Import where ``lightning_utilities`` is ``asked``, and torchmetrics does what the function says."""
    monkeypatch.delitem(sys.modules, "torchmetrics")
    imported = []

    def import_module(name):
        imported.append(name)
        return asked if name.startswith("lightning_utilities") else torchmetrics()

    monkeypatch.setattr(lean_imports.importlib, "import_module", import_module)
    lean_imports.import_torchmetrics()
    return imported


class Requirement:
    def __init__(self, requirement):
        self.requirement, self.module = requirement, None

    def __bool__(self):
        return True


def test_what_is_absent_for_a_while_is_there_again(monkeypatch):
    asked = SimpleNamespace(package_available=lambda name: True, RequirementCache=Requirement)
    seen = {}

    def torchmetrics():
        names = ("scipy", "scipy>=1.8.0", "transformers>=4.4.0", "torchvision", "matplotlib", "torch>=2.1.0", "tqdm")
        seen.update({name: bool(asked.RequirementCache(name)) for name in names})
        seen.update(package=asked.package_available("scipy"), other=asked.package_available("numpy"))

    import_with(monkeypatch, asked, torchmetrics)
    assert [name for name, there in seen.items() if there] == ["torch>=2.1.0", "tqdm", "other"]
    assert Requirement("scipy")
    assert asked.package_available("scipy")


def test_where_the_private_behaviour_moved_the_import_is_plain(monkeypatch):
    imported = import_with(monkeypatch, SimpleNamespace(), lambda: None)
    assert imported == ["lightning_utilities.core.imports", "torchmetrics"]


def test_a_failure_without_the_optional_libraries_ends_in_a_plain_import(monkeypatch):
    asked = SimpleNamespace(package_available=lambda name: True, RequirementCache=Requirement)

    def torchmetrics():
        if not asked.package_available("scipy"):
            raise NameError("scipy")

    assert import_with(monkeypatch, asked, torchmetrics)[-2:] == ["torchmetrics", "torchmetrics"]
    assert asked.package_available("scipy")


def test_nothing_is_imported_twice(monkeypatch):
    monkeypatch.setattr(lean_imports.importlib, "import_module", lambda name: pytest.fail(name))
    lean_imports.import_torchmetrics()
