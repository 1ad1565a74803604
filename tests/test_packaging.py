"""What a wheel holds, and who owns the commands."""

import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import pytest

import common
import datamodules
import experiments

REPOSITORY = Path(__file__).parent.parent


def test_the_distribution_owns_both_commands():
    scripts = {e.name: e.value for e in distribution("medmim").entry_points if e.group == "console_scripts"}
    assert scripts == {"lightning": "common.entry:main", "medmim": "common.commands:main"}


def test_the_lightning_command_is_ours():
    """Two distributions ship a command of this name; the one on the path must be this project's."""
    script = Path(sys.executable).with_name("lightning")
    assert "common.entry" in script.read_text()


@pytest.mark.parametrize("package", [common, datamodules, experiments], ids=lambda package: package.__name__)
def test_imports_come_from_this_checkout_and_no_one_else_owns_the_name(package):
    assert Path(next(iter(package.__path__))).resolve() == (REPOSITORY / package.__name__).resolve()
    assert set(packages_distributions().get(package.__name__, ["medmim"])) == {"medmim"}


def test_the_lock_covers_every_requirement():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(r for group in project["optional-dependencies"].values() for r in group)]
    locked = {
        line.split("==")[0].lower()
        for line in (REPOSITORY / "requirements.lock").read_text().splitlines()
        if "==" in line
    }
    for requirement in wanted:
        name = requirement
        for sign in "[<>=!~; ":
            name = name.split(sign)[0]
        assert name.lower() in locked, name


@pytest.mark.slow
def test_the_wheel_holds_packages_configurations_and_results(tmp_path):
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir",
                    str(tmp_path), str(REPOSITORY)], check=True)  # fmt: skip
    (wheel,) = tmp_path.glob("medmim-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for pattern in (
        "common/**/*.py",
        "datamodules/**/*.py",
        "experiments/**/*.py",
        "experiments/**/*.yaml",
        "datamodules/**/*.yaml",
        "common/help/*.txt",
        "datamodules/**/*.csv",
        "datamodules/**/*.yaml",
    ):
        for path in REPOSITORY.glob(pattern):
            assert path.relative_to(REPOSITORY).as_posix() in names
    assert not any(name.startswith("tests/") for name in names)
