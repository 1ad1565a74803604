"""Arrows: experiments -> common <- datamodules; experiments never import each other."""

import ast
from pathlib import Path

import pytest

import common
import datamodules
import experiments

ROOTS = {package.__name__: Path(next(iter(package.__path__))) for package in (common, datamodules, experiments)}
FILES = [path for root in ROOTS.values() for path in sorted(root.rglob("*.py"))]


def imported(path):
    """Yield the full names of the modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield node.module
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            yield from (a.value for a in node.args if isinstance(a, ast.Constant))


def place(path):
    """Return the package of a file, and its experiment."""
    for name, root in ROOTS.items():
        if path.is_relative_to(root):
            parts = path.relative_to(root).parts
            return name, parts[0] if name == "experiments" and len(parts) > 1 else None
    raise AssertionError(path)


@pytest.mark.parametrize("path", FILES, ids=lambda path: "/".join(path.parts[-3:]))
def test_arrows(path):
    package, experiment = place(path)
    for name in imported(path):
        top, *rest = name.split(".")
        if top not in ROOTS or top == package != "experiments":
            continue
        if package == "common":
            pytest.fail(f"common imports {name}")
        elif package == "datamodules":
            assert top == "common", f"datamodules imports {name}"
        else:
            assert top == "common" or rest[:1] == [experiment], f"{experiment} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: "/".join(path.parts[-3:]))
def test_no_file_bends_the_import_path_or_leaves_work_undone(path):
    source = path.read_text()
    assert "sys.path" not in source
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Raise):
            assert "NotImplementedError" not in ast.dump(node)


def removals(path):
    """Yield the lines of a file that remove or rename something without asking whose it is."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner, name = getattr(node.func.value, "id", ""), node.func.attr
            system = owner in ("os", "shutil") and name in ("remove", "unlink", "rename", "renames", "replace", "move")
            method = owner != "os" and name in ("unlink", "rmdir")
            method |= name == "rename" and len(node.args) == 1 and not node.keywords  # those of tables have keywords
            if system or method or name in ("rmtree", "removedirs"):
                yield node.lineno


@pytest.mark.parametrize("path", FILES, ids=lambda path: "/".join(path.parts[-3:]))
def test_only_one_module_removes_and_renames(path):
    assert list(removals(path)) == [] or path == ROOTS["common"] / "files.py"


def test_every_module_and_public_name_is_documented():
    for path in FILES:
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), f"{path} has no docstring"
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path}: {node.name} has no docstring"
