"""What a run that was killed and resumed leaves behind, held against an uninterrupted one."""

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.checkpoint import read_checkpoint
from common.files import is_temporary


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping | list):
        pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, part in pairs:
            yield from _leaves(part, f"{name}.{key}")
    else:
        yield name, value


def _state(folder: Path) -> dict[str, Any]:
    checkpoint = read_checkpoint(folder, "last")
    return dict(_leaves([checkpoint["state_dict"], checkpoint["optimizer_states"]]))


def _same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else bool(a == b)


def _scalars(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Yield step, name and value of every scalar in ``metrics.csv``."""
    with (folder / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            yield from (
                (row["step"], name, value) for name, value in row.items() if value and name not in ("step", "epoch")
            )


def logged_twice(folder: Path) -> str:
    """Return what a log of the run holds twice for one step."""
    seen: set[tuple[str, str]] = set()
    for step, name, _ in _scalars(folder):
        if (step, name) in seen:
            return f"metrics.csv holds {name} of step {step} twice"
        seen.add((step, name))
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    for name in set(events.Tags()["scalars"]) - {"epoch"}:
        steps = [event.step for event in events.Scalars(name)]
        if len(set(steps)) < len(steps):
            return f"TensorBoard holds {name} of one step twice"
    return ""


def judge(run: Path, whole: Path, cache: Path) -> list[str]:
    """Return what is wrong with a run that has ended.

    Args:
        run: Its folder.
        whole: Folder of the uninterrupted run.
        cache: Its cache.
    """
    expected, found = _state(whole), _state(run)
    different = [name for name in expected.keys() | found.keys() if not _same(expected.get(name), found.get(name))]
    faults = [f"{len(different)} of {len(expected)} values differ, such as {min(different)}"] if different else []
    faults += [twice] if (twice := logged_twice(run)) else []
    values = {(step, name): value for step, name, value in _scalars(whole) if name.startswith(("train/", "val/"))}
    other = [(step, name) for step, name, value in _scalars(run) if values.get((step, name), value) != value]
    faults += [f"{other[0][1]} of step {other[0][0]} has another value"] if other else []
    left = [path for store in (run, cache) for path in store.rglob("*")
            if is_temporary(path.name) or path.name == "building.json"]  # fmt: skip
    return faults + ([f"{left[0]} is left"] if left else [])
