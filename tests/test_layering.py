"""Arrows: experiments -> common <- datamodules; experiments never import each other."""

import ast
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

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


#: Rooms of datamodules by floor; arrows go down, or to a neighbour without a way back.
FLOORS = (
    {"commands"},
    {"brain", "labelled", "reports", "pairs", "genetics", "synthetic"},
    {"volumes", "images", "dicom"},
    {"base", "examination", "controls"},
    {"account", "archive_file", "configs", "loading", "membership", "registry", "splits", "subjects", "targets"},
    {"files", "ids", "limits", "listed_files", "members", "notes", "storage", "tables", "tree"},
)


def module_of(path):
    """Return a file's module."""
    for name, root in ROOTS.items():
        if path.is_relative_to(root):
            parts = [name, *path.relative_to(root).with_suffix("").parts]
            return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    raise AssertionError(path)


def arrows():
    """Return the modules that each module imports."""
    modules = {module_of(path): path for path in FILES}
    found = {}
    for name, path in modules.items():
        tree = ast.walk(ast.parse(path.read_text()))
        names = [
            f"{node.module}.{alias.name}" for node in tree if isinstance(node, ast.ImportFrom) for alias in node.names
        ]
        wanted = {*names, *(name.rpartition(".")[0] for name in names), *imported(path)}
        found[name] = (wanted & modules.keys()) - {name}
    return found


def circles(graph):
    """Return the groups of nodes that lead back to themselves."""
    names = sorted(graph)
    edges = [(names.index(node), names.index(other)) for node, others in graph.items() for other in others & {*names}]
    matrix = coo_array((np.ones(len(edges)), tuple(np.array(edges).T)), shape=(len(names), len(names)))
    _, labels = connected_components(matrix, connection="strong")
    groups = [[name for name, label in zip(names, labels, strict=True) if label == one] for one in set(labels)]
    return sorted(group for group in groups if len(group) > 1)


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_module_imports_itself_by_way_of_others():
    assert circles(arrows()) == []


def test_rooms_of_datamodules_look_down():
    """Commands know every kind of archive, kinds know volumes and images, and those what all archives share."""
    floors = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
    rooms = {}
    for name, others in arrows().items():
        if not name.startswith("datamodules."):
            continue
        room = name.split(".")[1]
        assert room in floors, f"{room} has no floor"
        for other in others:
            if other.startswith("datamodules.") and (below := other.split(".")[1]) != room:
                assert floors[room] <= floors[below], f"{name} imports {other}, which is above it"
                rooms.setdefault(room, set()).add(below)
    assert circles(rooms) == []


def test_no_folder_is_a_drawer():
    counts = Counter(path.parent for path in FILES)
    assert {str(folder): count for folder, count in counts.items() if count > 24} == {}


def test_layouts_are_imported_when_they_are_asked_for():
    """The registry names every layout and imports none."""
    assert {name for name in imported(ROOTS["datamodules"] / "registry.py") if name.startswith("datamodules.")} == {
        "datamodules.files",
        "datamodules.tree",
    }
