"""No number in a README that no command has written."""

import json
from pathlib import Path

import pytest

from common.sweeps.results import update_readme

REPOSITORY = Path(__file__).parent.parent
EXPERIMENTS = REPOSITORY / "experiments"
RESULTS = sorted(EXPERIMENTS.glob("*/results/*.json"))
READMES = sorted(EXPERIMENTS.glob("*/README.md"))


@pytest.mark.parametrize("path", [REPOSITORY / "README.md", *READMES], ids=lambda path: path.parent.name)
def test_tables_are_those_of_the_results(path):
    assert path.read_text() == update_readme(path)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_results_say_how_they_came_to_be(path):
    result = json.loads(path.read_text())
    assert {"command", "environment", "date"} <= result.keys()
    assert {"versions", "device", "commit"} <= result["environment"].keys()
    assert path.name in (path.parent.parent / "README.md").read_text()


def test_every_experiment_has_a_readme_and_a_line_in_the_table():
    packages = {path.parent for path in EXPERIMENTS.glob("*/__init__.py")}
    assert packages == {path.parent for path in READMES}
    text = (REPOSITORY / "README.md").read_text()
    rows = {line.split("](")[1].split("/")[1] for line in text.splitlines() if line.startswith("| [`")}
    assert rows == {path.name for path in packages}
