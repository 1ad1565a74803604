"""Summaries of scored runs: means over seeds, comparisons case by case, and the tables of a README.

A result is a JSON file that ``medmim study`` writes: a row per arm, seed and score, and their summaries.
"""

import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from common.errors import UserError
from common.files import write_text
from common.metrics import bootstrap_auroc, central_interval, resampled_counts, weighted_mean, weighted_quadratic_kappa
from common.runtime.reporting import markdown_table, print_line
from common.sweeps import bench
from common.sweeps.inference import Difference, holm, judge, verdict


@dataclass
class Pool:
    """How the scores of all folds are pooled into one figure.

    Attributes:
        score: Column of ``per_case.csv`` with the score.
        target: Column with the truth, 0 or 1.
    """

    score: str
    target: str

    def metrics(self, folders: Sequence[Path]) -> dict[str, float]:
        """Return the AUROC over the cases of all folds with the bounds of its 95 % interval, people resampled.

        Scores of different folds come from different models, so each is replaced by its rank within its fold.
        """
        tables = [pd.read_csv(folder / "per_case.csv").dropna(subset=[self.target]) for folder in folders]
        for table in tables:
            table["rank"] = table[self.score].rank(pct=True)
        cases = pd.concat(tables)
        twice = cases.loc[cases["subject_id"].duplicated(), "subject_id"]
        if len(twice):
            raise UserError(f"{twice.iloc[0]} was tested in two folds.")
        low, high = bootstrap_auroc(cases["rank"], cases[self.target], cases["patient_id"])
        auroc = float(roc_auc_score(cases[self.target], cases["rank"]))
        by_fold = [float(roc_auc_score(table[self.target], table[self.score])) for table in tables]
        return {"auroc": auroc, "auroc_low": low, "auroc_high": high, "auroc_folds": statistics.fmean(by_fold),
                "cases": float(len(cases)), "patients": float(cases["patient_id"].nunique())}  # fmt: skip


COSTS = ("samples", "train_seconds", "flops_per_sample")


def _over_seeds(values: Sequence[float]) -> dict[str, Any]:
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": spread, "n": len(values)}


def summarise(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return mean and standard deviation over seeds, one entry per arm and score."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["arm"], row["score"]), []).append(row)
    result = []
    for (arm, score), members in groups.items():
        entry: dict[str, Any] = {"arm": arm, "score": score, "seeds": [row["seed"] for row in members]}
        for name in columns:
            values = [row["metrics"][name] for row in members if name in row["metrics"]]
            if values:
                entry[name] = _over_seeds(values)
        entry["cost"] = {name: statistics.fmean(row["cost"][name] for row in members) for name in COSTS}
        result.append(entry)
    return result


@dataclass
class Comparison:
    """How arms are compared case by case.

    Attributes:
        title: Over the table.
        unit: Column of ``per_case.csv`` with the units, such as people or images, that are resampled with their cases.
        reference: Arm that all others are compared with; empty compares none.
        score: Score of that arm.
        metric: ``mean`` of a column, or ``quadratic_kappa`` between two.
        value: Column whose mean is taken.
        baseline: Column that is subtracted from it; empty subtracts nothing.
        where: Cases to keep: the value that a column must have.
        pred: Column with the predicted grade.
        target: Column with the true grade.
    """

    title: str
    unit: str
    reference: str = ""
    score: str = ""
    metric: Literal["mean", "quadratic_kappa"] = "mean"
    value: str = "value"
    baseline: str = ""
    where: dict[str, Any] = field(default_factory=dict)
    pred: str = "pred"
    target: str = "target"

    def __post_init__(self) -> None:
        """Check the metric."""
        if self.metric not in get_args(Comparison.__annotations__["metric"]):
            raise UserError(f"paired.metric is mean or quadratic_kappa, got {self.metric!r}.")

    def of(self, cases: pd.DataFrame, counts: NDArray[Any]) -> NDArray[np.float64]:
        """Return the metric ``(draws,)`` where each case counts as often as ``counts`` ``(draws, S)`` says."""
        if self.metric == "mean":
            values = cases[self.value] - cases[self.baseline] if self.baseline else cases[self.value]
            return weighted_mean(values, counts)
        return weighted_quadratic_kappa(cases[self.pred], cases[self.target], counts)

    def table(self, folders: Sequence[Path], cases: pd.Index | None = None) -> list[pd.DataFrame]:
        """Read ``per_case.csv`` of each folder by ``subject_id``, in the order of ``cases`` or else of the first.

        Raises:
            UserError: they are not the same cases.
        """
        tables = [pd.read_csv(folder / "per_case.csv").set_index("subject_id") for folder in folders]
        for column, wanted in self.where.items():
            tables = [table[table[column] == wanted] for table in tables]
        order = tables[0].index if cases is None else cases
        for folder, table in zip(folders, tables, strict=True):
            if set(table.index) != set(order):
                raise UserError(f"{folder} was not scored on the same cases as the others, so they cannot be paired.")
        return [table.reindex(order) for table in tables]

    def by_seed(self, tables: Sequence[pd.DataFrame], draws: int = 2000) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return the metric of every seed ``(N,)``, and of every resampling ``(N, draws)``, the same for all arms."""
        counts = resampled_counts(tables[0][self.unit].tolist(), draws)
        whole = np.ones((1, counts.shape[1]))
        values, drawn = (np.array([self.of(table, each) for table in tables]) for each in (whole, counts))
        return values[:, 0], drawn


@dataclass
class Breakdown:
    """A table that scored runs leave behind, such as one line per set of sequences, over arms and seeds.

    Attributes:
        file: Name of the CSV in the run folder.
        by: Its column that names the lines.
        columns: Its columns that are wanted, with their titles.
    """

    file: str
    by: str
    columns: dict[str, str]

    def over_seeds(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return mean and standard deviation over the seeds of ``rows``, one entry per line, arm and score."""
        groups: dict[tuple[str, str, str], list[dict[str, float]]] = {}
        for row in rows:
            wanted = pd.read_csv(row["folder"] / self.file).set_index(self.by)[list(self.columns)]
            for line, values in wanted.to_dict("index").items():
                groups.setdefault((str(line), row["arm"], row["score"]), []).append(values)
        return [
            {
                **dict(zip(("line", "arm", "score"), key, strict=True)),
                **{name: _over_seeds([values[name] for values in members]) for name in self.columns},
            }
            for key, members in groups.items()
        ]

    def table(self, entries: Sequence[Mapping[str, Any]], digits: int) -> list[str]:
        """Return the lines of a Markdown table: one per line of the file, every arm's columns side by side."""
        arms = list(dict.fromkeys(entry["arm"] for entry in entries))
        header = [self.by, *(f"{title}, {arm}" for title in self.columns.values() for arm in arms)]
        rows = []
        for line in dict.fromkeys(entry["line"] for entry in entries):
            found = {entry["arm"]: entry for entry in entries if entry["line"] == line}
            rows.append([line, *(_cell(found.get(arm, {}).get(name), digits) for name in self.columns for arm in arms)])
        return ["", *markdown_table(header, rows)]


def compare(rows: Sequence[Mapping[str, Any]], comparison: Comparison) -> dict[str, list[dict[str, Any]]]:
    """Return each arm's mean over seeds, and how much the reference is above it, with 95 % intervals.

    Cases are matched by ``subject_id`` and resampled alike for all arms and seeds. The interval of an arm shows how
    much other cases would change it; that of a difference, and its P, other cases and other seeds together. P values
    are corrected (Holm) over the arms of one score.

    Args:
        rows: With ``arm``, ``score``, ``seed`` and ``folder``.
        comparison: What is compared.

    Returns:
        ``intervals`` of every arm and score, over the seeds it has; ``paired`` differences over the seeds that both
        have.
    """
    folders: dict[tuple[str, str], dict[int, Path]] = {}
    for row in rows:
        folders.setdefault((row["arm"], row["score"]), {})[row["seed"]] = row["folder"]
    reference = folders.get((comparison.reference, comparison.score), {})
    result: dict[str, list[dict[str, Any]]] = {"intervals": [], "paired": []}
    for (arm, score), found in folders.items():
        try:
            values, drawn = comparison.by_seed(comparison.table(list(found.values())))
            low, high = central_interval(drawn.mean(0))
            entry = {"arm": arm, "score": score, "seeds": list(found), "mean": float(values.mean())}
            result["intervals"].append(entry | {"low": low, "high": high})
            seeds = sorted(reference.keys() & found.keys())
            if not seeds or found is reference:
                continue
            ours = comparison.table([reference[seed] for seed in seeds])
            others = comparison.table([found[seed] for seed in seeds], ours[0].index)
        except UserError as error:
            print_line(f"note: {arm}, {score} is not compared: {error}")
            continue
        (values, drawn), (other, other_drawn) = comparison.by_seed(ours), comparison.by_seed(others)
        difference = judge((values - other).tolist(), float(np.nanstd((drawn - other_drawn).mean(0), ddof=1)))
        result["paired"].append({"arm": arm, "score": score, "seeds": seeds, "difference": difference})
    for score in dict.fromkeys(entry["score"] for entry in result["paired"]):
        _correct([entry for entry in result["paired"] if entry["score"] == score])
    return result


def _correct(entries: Sequence[dict[str, Any]]) -> None:
    """Write the differences of one score out, their P values corrected for their number."""
    differences: list[Difference] = [entry.pop("difference") for entry in entries]
    for entry, difference, p in zip(entries, differences, holm([each.p for each in differences]), strict=True):
        interval = {name: getattr(difference, name) for name in ("mean", "low", "high")}
        entry |= interval | {"p_holm": p, "verdict": verdict(difference, p)}


def _cell(value: Mapping[str, Any] | None, digits: int) -> str:
    if value is None:
        return "not run"
    spread = "" if value["std"] is None else f" ± {value['std']:.{digits}f}"
    return f"{value['mean']:.{digits}f}{spread}"


def table(result: Mapping[str, Any]) -> str:
    """Return a result as a Markdown table: one line per arm and score, mean ± standard deviation over seeds."""
    columns, digits = result["columns"], result.get("digits", 3)
    paper = result.get("paper", {})
    header = ["arm", "scored on", *columns.values(), "samples", "training TFLOP", "training s"]
    if paper:
        header.append("paper")
    rows = []
    for entry in result["summary"]:
        cost = entry["cost"]
        operations = cost["samples"] * cost["flops_per_sample"] / 1e12
        cells = [entry["arm"], entry["score"], *(_cell(entry.get(name), digits) for name in columns)]
        cells += [f"{cost['samples']:.0f}", f"{operations:.0f}", f"{cost['train_seconds']:.0f}"]
        if paper:
            cells.append(paper.get(entry["arm"], "-"))
        rows.append(cells)
    lines = markdown_table(header, rows)
    if result.get("intervals"):
        lines += _interval_lines(result["intervals"], "arm", result["metric"].replace("_", " "), f".{digits}f")
    if result.get("paired"):
        lines += _interval_lines(result["paired"], result["paired_title"], "difference", f"+.{digits}f")
    if result.get("gain"):
        lines += _interval_lines(result["gain"], result["gain_title"], "gain", f"+.{digits}f")
    if result.get("breakdown"):
        lines += Breakdown(**result["breakdown"]).table(result["lines"], digits)
    return "\n".join(lines)


def _interval_lines(entries: Sequence[Mapping[str, Any]], first: str, value: str, style: str) -> list[str]:
    judged = all("verdict" in entry for entry in entries)
    header = [first, "scored on", value, "95 % from", "to", *(["P (Holm)", "reference is"] if judged else [])]
    rows = []
    for entry in entries:
        cells = [entry["arm"], entry["score"], *(format(entry[name], style) for name in ("mean", "low", "high"))]
        if judged:
            cells += [f"{entry['p_holm']:.2g}", entry["verdict"]]
        rows.append(cells)
    return ["", *markdown_table(header, rows)]


def update_readme(readme: Path) -> str:
    """Return a README with every table between its markers regenerated from the results.

    A marker is ``<!-- results: FILE -->`` ... ``<!-- end -->``, where FILE is relative to the README.
    """
    parts = readme.read_text().split("<!-- results: ")
    text = parts[0]
    for part in parts[1:]:
        name, rest = part.split(" -->", 1)
        _, tail = rest.split("<!-- end -->", 1)
        result = json.loads((readme.parent / name).read_text())
        body = table(result) if "summary" in result else bench.table(result)
        text += f"<!-- results: {name} -->\n{body}\n<!-- end -->{tail}"
    return text


def _plain(value: Any) -> Any:
    """Round floats for the file, and refuse values that JSON cannot represent."""
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        return None if not math.isfinite(value) else float(f"{value:.6g}")
    return value


def further_tables(study: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the further tables that a study requests, read from the files of its scored runs."""
    tables: dict[str, Any] = {}
    if "paired" in study:
        comparison = Comparison(**study["paired"])
        tables |= {**compare(rows, comparison), "paired_title": comparison.title, "metric": comparison.metric}
    if "gain" in study:
        gain = Comparison(**study["gain"])
        tables |= {"gain": compare(rows, gain)["intervals"], "gain_title": gain.title}
    if "breakdown" in study:
        breakdown = Breakdown(**study["breakdown"])
        tables |= {"breakdown": asdict(breakdown), "lines": breakdown.over_seeds(rows)}
    return tables


def write_result(
    out: Path, study: Mapping[str, Any], command: str, facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Write the result of a study and return it.

    Args:
        out: JSON file.
        study: What ``read_study`` returned.
        command: What was run.
        facts: Code, versions and machine.
        rows: With ``arm``, ``seed``, ``score``, ``metrics``, ``cost`` and ``folder``, the run (pooled folds have none).
    """
    result = {
        **{name: study[name] for name in ("title", "columns", "digits", "paper", "notes") if name in study},
        "command": command,
        "environment": facts,
        "date": time.strftime("%Y-%m-%d"),
        "rows": [{**row, "folder": str(row["folder"])} if "folder" in row else row for row in rows],
        **further_tables(study, rows),
        "summary": summarise(rows, study["columns"]),
    }
    write_text(out, json.dumps(_plain(result), indent=1) + "\n")
    return result


def _read_result(path: Path) -> dict[str, Any]:
    """Read the result of a study."""
    if not path.is_file():
        raise UserError(f"There is no result at {path}.")
    try:
        result = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not a result of medmim study: {error}") from None
    if not isinstance(result, dict) or not {"columns", "rows", "environment"} <= result.keys():
        raise UserError(f"{path} is not a result of medmim study.")
    return result


def refuse_loss(out: Path, wanted: Sequence[tuple[int, str]]) -> None:
    """Refuse to write over a result with seeds or arms that the new one would not have.

    Raises:
        UserError: it has.
    """
    if not out.is_file():
        return
    for row in _read_result(out)["rows"]:
        if (row["seed"], row["arm"]) not in wanted:
            raise UserError(
                f"{out} holds {row['arm']!r} with seed {row['seed']}, which would be lost: name another file by --out; "
                "--merge puts both together."
            )


def merge(study: Mapping[str, Any], parts: Sequence[Path]) -> tuple[dict[str, Any], str, list[dict[str, Any]]]:
    """Return environment, commands and rows of results that are parts of one study.

    Args:
        study: What ``read_study`` returned.
        parts: Results, from the folder that their runs lie below.

    Raises:
        UserError: a part is missing or of another study or other code, two have the same row, or a run whose cases are
            compared is gone.
    """
    compares = bool({"paired", "gain", "breakdown"} & study.keys())
    results: list[dict[str, Any]] = []
    rows: dict[tuple[int, int, str], dict[str, Any]] = {}
    for part in parts:
        result = _read_result(part)
        results.append(result)
        if result["columns"] != study["columns"] or any(row["arm"] not in study["arms"] for row in result["rows"]):
            raise UserError(f"{part} is not a result of this study, or the study has changed since.")
        for name in ("commit", "versions"):
            if result["environment"][name] != results[0]["environment"][name]:
                raise UserError(f"{part} and {parts[0]} were made with different {name}: run one of them again.")
        for row in result["rows"]:
            key = (row["seed"], list(study["arms"]).index(row["arm"]), row["score"])
            if key in rows:
                raise UserError(f"{part} holds {row['arm']!r} with seed {row['seed']}, and so does a part before it.")
            if "folder" in row:
                row["folder"] = Path(row["folder"])
            if compares and not row.get("folder", Path("nowhere")).is_dir():
                raise UserError(
                    f"{part}: the run folder of {row['arm']!r} with seed {row['seed']} is not there "
                    f"({row.get('folder', 'none is named')}), and its cases are compared: run that arm again."
                )
            rows[key] = row
    command = " && ".join(result["command"] for result in results)
    return results[0]["environment"], command, [rows[key] for key in sorted(rows, key=lambda key: key[:2])]
