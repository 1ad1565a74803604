import json
import sys
from types import SimpleNamespace

import pytest

from common.commands import execute
from common.sweeps import bench
from common.sweeps.results import update_readme


@pytest.fixture
def rows(monkeypatch):
    module = SimpleNamespace(ROWS=[
        lambda: [bench.Row("cached against decoded", 21.62, 20.0, "CPU time")],
        lambda: [bench.Row("peak", 5.44, None, unit="GiB")],
        lambda: [bench.Row("bf16 against fp32", None, 2.3, "this CPU has no bf16")],
    ])  # fmt: skip
    monkeypatch.setitem(sys.modules, "rows_of_a_test", module)
    monkeypatch.setattr(bench, "bench_modules", lambda experiment: ["rows_of_a_test"])


@pytest.mark.usefixtures("rows")
def test_rows_are_said_with_what_they_should_be(capsys, tmp_path):
    execute(["bench", "--exp", "e_mim", "--out", str(tmp_path / "bench.json")])
    assert capsys.readouterr().out.splitlines()[1:] == [
        "cached against decoded: 21.62 x (at least 20: yes); CPU time",
        "peak: 5.44 GiB",
        "bf16 against fp32: not applicable; this CPU has no bf16",
    ]
    result = json.loads((tmp_path / "bench.json").read_text())
    assert result["command"] == "medmim bench --exp e_mim"
    assert {"environment", "date"} <= result.keys()


@pytest.mark.usefixtures("rows")
def test_a_readme_shows_them_as_a_table(tmp_path):
    execute(["bench", "--out", str(tmp_path / "bench.json")])
    readme = tmp_path / "README.md"
    readme.write_text("<!-- results: bench.json -->\n<!-- end -->\n")
    assert update_readme(readme).splitlines()[3:-1] == [
        "| cached against decoded | 21.62 x | 20 | CPU time |",
        "| peak | 5.44 GiB |  |  |",
        "| bf16 against fp32 | not applicable | 2.3 | this CPU has no bf16 |",
    ]


def test_a_value_below_its_target_is_said():
    assert bench.Row("a", 2.24, 2.3).line() == "a: 2.24 x (at least 2.3: NO)"


def test_a_speedup_is_the_median_of_pairs():
    assert bench.speedup([2.0, 9.0, 4.0], [1.0, 3.0, 1.0]) == 3.0
