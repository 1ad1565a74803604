"""``medmim study``: comparisons over arms and seeds, from one file, into one result.

A study is a YAML file: arms, each a list of steps (``fit``, ``validate``, ``test``), run once per seed, and the
configurations and arguments that all steps share. All arms see the same samples because they share these; the cost of
each arm stands beside its score. Results are JSON rows, and the tables of an experiment's README are generated from
them alone. ``--merge`` combines jobs that each ran one arm or seed (``--arms``, ``--seeds``, ``--out``).
"""

import itertools
import json
import shlex
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from common.errors import UserError
from common.files import write_text
from common.runtime.configs import package_file
from common.runtime.provenance import environment
from common.runtime.reporting import print_line
from common.sweeps.progress import Progress
from common.sweeps.results import COSTS, Pool, merge, refuse_loss, table, update_readme, write_result

_EXAMPLE = "experiments/e_mim/configs/studies/collapse.yaml"


@dataclass
class Step:
    """One command of an arm.

    Attributes:
        run: ``fit``, ``validate`` or ``test``, or a subcommand of ``medmim``.
        config: Configurations, in order, relative to the experiment's ``configs`` folder.
        args: Further arguments; ``{name}`` stands for the run folder of an earlier step, ``{data}`` for the archive,
            ``{seed}`` for the seed, ``{fold}`` for the fold, ``{folder}`` for a folder of the study's own.
        name: How later steps refer to this one.
        score: Name under which its metrics are reported; None reports nothing.
        beside: Metrics of this step that are reported beside every later score of its arm.
    """

    run: str
    config: list[str]
    args: list[str]
    name: str = ""
    score: str | None = None
    beside: list[str] = field(default_factory=list)

    def arguments(self, configs: Path, places: Mapping[str, str]) -> list[str]:
        """Return the command line."""
        given = [argument.format(**places) for argument in self.args]
        return [self.run, *(word for name in self.config for word in ("--config", str(configs / name))), *given]


def read_study(path: Path) -> dict[str, Any]:
    """Read a study and its steps.

    Raises:
        UserError: the file is missing, or an arm has no step with a score.
    """
    if not path.is_file():
        raise UserError(f"The study {path} does not exist.")
    study = yaml.safe_load(path.read_text())
    config, args = study.get("config", []), study.get("args", [])

    def make(entry: dict[str, Any]) -> Step:
        entry = {"config": [], "args": [], **entry}
        return Step(**entry | {"config": config + entry["config"], "args": args + entry["args"]})

    study["arms"] = {name: [make(entry) for entry in steps] for name, steps in study["arms"].items()}
    silent = [name for name, steps in study["arms"].items() if not any(step.score for step in steps)]
    if silent:
        raise UserError(f"{path}: the arm {silent[0]} has no step with a score.")
    return study


def _metrics(folder: Path, columns: Mapping[str, str]) -> dict[str, float]:
    """Collect the wanted metrics of a run: scalars by name, ``metrics.json`` by dotted path."""
    found: dict[str, Any] = {}
    if (folder / "metrics.json").is_file():
        for name, value in json.loads((folder / "metrics.json").read_text()).items():
            if isinstance(value, dict) and "mean" in value:
                found[name] = value["mean"]
            elif isinstance(value, int | float):
                found[name] = value
    if (folder / "summary.json").is_file():
        scalars = json.loads((folder / "summary.json").read_text())["scalars"]
        found |= {name: value["final"] for name, value in scalars.items() if name not in found}
    return {name: float(found[name]) for name in columns if found.get(name) is not None}


def run_arm(
    steps: list[Step], configs: Path, places: Mapping[str, str], columns: Mapping[str, str], progress: Progress
) -> list[dict[str, Any]]:
    """Run the steps of one arm and return one row per score: its metrics, what its last fit cost and its folder.

    Args:
        steps: The steps.
        configs: Folder of the configurations.
        places: Values of the names in arguments.
        columns: Metrics that are wanted.
        progress: Commands that were run before: arms that begin alike share their beginning, and a study that was
            stopped goes on.
    """
    from common.cli import execute
    from common.commands import COMMANDS
    from common.commands import execute as execute_medmim

    places = dict(places)
    rows: list[dict[str, Any]] = []
    cost: dict[str, float] = dict.fromkeys(COSTS, 0.0)
    beside: dict[str, float] = {}
    for step in steps:
        arguments = step.arguments(configs, places)
        if step.run in COMMANDS:
            execute_medmim(arguments)
            continue
        folder = progress.run(arguments, execute)
        places[step.name or step.run] = str(folder)
        if step.run == "fit":
            summary = json.loads((folder / "summary.json").read_text())
            cost = {name: float(summary.get(name) or 0) for name in COSTS}
        if step.score:
            metrics = beside | _metrics(folder, columns)
            rows.append({"score": step.score, "metrics": metrics, "cost": cost, "folder": folder})
        beside |= _metrics(folder, dict.fromkeys(step.beside, ""))
    return rows


def run_folds(
    steps: list[Step], configs: Path, places: Mapping[str, str], folds: int, pool: Pool, progress: Progress
) -> list[dict[str, Any]]:
    """Run one arm on every fold and return one row per score, its metrics those of all folds together."""
    parts: dict[str, list[dict[str, Any]]] = {}
    for fold in range(folds):
        print_line(f"fold {fold} of {folds}")
        for row in run_arm(steps, configs, {**places, "fold": str(fold)}, {}, progress):
            parts.setdefault(row["score"], []).append(row)
    return [
        {
            "score": score,
            "metrics": pool.metrics([row["folder"] for row in rows]),
            "cost": {
                "samples": sum(row["cost"]["samples"] for row in rows),
                "train_seconds": sum(row["cost"]["train_seconds"] for row in rows),
                "flops_per_sample": statistics.fmean(row["cost"]["flops_per_sample"] for row in rows),
            },
        }
        for score, rows in parts.items()
    ]


def _rows(
    study: Mapping[str, Any], arm: str, configs: Path, places: Mapping[str, str], progress: Progress
) -> list[dict[str, Any]]:
    """Run one arm, on every fold if there are folds, and return its rows with their run folders."""
    steps = study["arms"][arm]
    if "folds" in study:
        return run_folds(steps, configs, places, study["folds"], Pool(**study["pool"]), progress)
    return run_arm(steps, configs, places, study["columns"], progress)


def run(
    study: str | None,
    data: str | None,
    out: str | None,
    arms: Sequence[str] | None,
    seeds: Sequence[int] | None,
    parts: Sequence[str] | None,
    readmes: Sequence[str] | None,
) -> None:
    """Carry out ``medmim study``, whose help explains the arguments; ``parts`` are those of ``--merge``.

    Raises:
        UserError: the study, its data or an arm is missing, a result would be lost, or parts do not fit together.
    """
    if readmes:
        _update_readmes(readmes)
        return
    if not study:
        raise UserError(f"medmim study needs a study file, such as {_EXAMPLE}; that folder and its siblings hold more.")
    if not (data or parts):
        raise UserError(
            f"The study {study} also needs --data FOLDER, its archive, or --merge with parts of its result."
        )
    path = Path(package_file(study)).resolve()
    content = read_study(path)
    unknown = set(arms or []) - content["arms"].keys()
    if unknown:
        raise UserError(f"{path.name} has no arm {sorted(unknown)[0]!r}; it has {', '.join(content['arms'])}.")
    configs = path.parent.parent
    facts = environment(torch.device("cpu"))
    if parts:
        facts, command, rows = merge(content, [Path(part) for part in parts])
        wanted = [(row["seed"], row["arm"]) for row in rows]
    else:
        command = _command(configs.parent.name, path.name, arms, seeds)
        wanted = list(itertools.product(seeds or content["seeds"], arms or content["arms"]))
    folder = Path("runs") / configs.parent.name / f"study_{path.stem}"
    target = Path(out) if out else folder / _file_name(path.stem, facts)
    refuse_loss(target, wanted)
    if parts:
        result = write_result(target, content, command, facts, rows)
    else:
        rows = []
        progress = Progress(folder)
        for seed, arm in wanted:
            print_line(f"study {path.stem}: seed {seed}, {arm}")
            places = {"data": str(data), "seed": str(seed), "folder": str(folder)}
            rows += [{"arm": arm, "seed": seed, **row} for row in _rows(content, arm, configs, places, progress)]
            # After every arm, so that a study that is stopped keeps what it has.
            result = write_result(target, content, command, facts, rows)
    for line in table(result).splitlines():
        print_line(line)
    print_line(f"written to {target}")


def _update_readmes(readmes: Sequence[str]) -> None:
    for readme in map(Path, readmes):
        if not readme.is_file():
            raise UserError(f"There is no README at {readme}.")
        write_text(readme, update_readme(readme))
        print_line(f"tables of {readme} made anew")


def _command(experiment: str, name: str, arms: Sequence[str] | None, seeds: Sequence[int] | None) -> str:
    """Return the command that reproduces the result, given the archive."""
    words = ["medmim", "study", f"experiments/{experiment}/configs/studies/{name}", "--data", "DATA"]
    for option, values in (("--arms", arms), ("--seeds", seeds)):
        if values:
            words += [option, *map(str, values)]
    return shlex.join(words)


def _file_name(task: str, facts: Mapping[str, Any]) -> str:
    hardware = "-".join(word for word in facts["device"].replace("(R)", "").split() if word not in ("Processor", "CPU"))
    torch_version = facts["versions"]["torch"].split("+")[0]
    return f"{task}_{hardware}_torch{torch_version}_{time.strftime('%Y-%m-%d')}.json".lower()
