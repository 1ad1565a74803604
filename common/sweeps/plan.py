"""``medmim plan``: hours and memory of a pre-training on a machine that is not there yet."""

import importlib
import json
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from common.errors import DataError, UsageError, UserError
from common.files import write_text
from common.module import SSLModule
from common.runtime.configs import find_config, merge, read_config
from common.runtime.data_config import Archive, one_line
from common.runtime.reporting import say
from common.sweeps.cost import StepCost, step_cost

#: Shares of the peak that trainings reach: of six published ones, between 0.09 and 0.37.
UTILISATION = {"low": 0.10, "middle": 0.25, "high": 0.40}
#: Bytes of a parameter in float32: weight, gradient, and two moments of AdamW.
BYTES_PER_PARAMETER = 16
_USABLE, _WORKSPACE = 0.92, 1.5 * 2**30


@dataclass(frozen=True)
class Machine:
    """A node with GPUs.

    Args:
        name: Of the GPU.
        bf16_tflops: Dense peak.
        memory_gib: Of a GPU.
        gpus_per_node: How many a node has.
        node_gb_s: GB/s between the GPUs of a node, in each direction.
        network_gb_s: GB/s between nodes, a GPU.
        cores_per_gpu: CPU cores.
    """

    name: str
    bf16_tflops: float
    memory_gib: float
    gpus_per_node: int
    node_gb_s: float
    network_gb_s: float
    cores_per_gpu: int


@dataclass(frozen=True)
class Schedule:
    """What a configuration asks for.

    Attributes:
        batch_size: Samples of a step on one GPU.
        samples: Training samples of an epoch.
        steps: Optimiser steps on one GPU.
        validations: Times that a tenth of the samples is validated on.
    """

    batch_size: int
    samples: int
    steps: int
    validations: int


@dataclass(frozen=True)
class Line:
    """One row of the plan.

    Attributes:
        gpus: GPUs.
        batch: ``kept``: the configured batch is shared out; ``scaled``: each GPU has it.
        samples_per_gpu: Samples of a step on each GPU.
        steps: Optimiser steps.
        hours: By utilisation.
        gpu_hours: Likewise.
        warnings: What speaks against it.
    """

    gpus: int
    batch: str
    samples_per_gpu: float
    steps: int
    hours: dict[str, float]
    gpu_hours: dict[str, float]
    warnings: list[str] = field(default_factory=list)


def read_machine(name: str) -> Machine:
    """Return a machine by the name of one of ours, or a file.

    Raises:
        UserError: there is none, or it does not say what is needed.
    """
    path = Path(name) if Path(name).is_file() else Path(str(files("common"))) / "machines" / f"{name}.yaml"
    if not path.is_file():
        known = sorted(file.stem for file in path.parent.glob("*.yaml"))
        raise UsageError(f"There is no machine {name}: give a YAML file, or one of {', '.join(known)}.")
    try:
        return Machine(**yaml.safe_load(path.read_text()))
    except (TypeError, yaml.YAMLError) as error:
        wanted = ", ".join(Machine.__dataclass_fields__)
        raise UserError(f"{path} does not describe a machine: it needs {wanted} and nothing else.") from error


def hours(operations: float, tflops: float, share: float, gpus: int = 1) -> float:
    """Return how long operations take at a share of the peak."""
    return operations / (tflops * 1e12 * share * gpus) / 3600


def largest_batch(cost: StepCost, machine: Machine) -> int:
    """Return the largest batch that one GPU holds; 0 where the model alone is too large."""
    free = machine.memory_gib * 2**30 * _USABLE - cost.parameters * BYTES_PER_PARAMETER - _WORKSPACE
    return max(int(free // max(cost.activations, 1)), 0)


def plan_line(cost: StepCost, schedule: Schedule, machine: Machine, gpus: int, kept: bool) -> Line:
    """Work out one row.

    Args:
        cost: Of a step.
        schedule: What is asked for.
        machine: Where.
        gpus: How many GPUs.
        kept: Whether the batch over all GPUs stays what it is on one.
    """
    each = schedule.batch_size / gpus if kept else float(schedule.batch_size)
    steps = schedule.steps if kept else -(-schedule.steps // gpus)
    rate = machine.node_gb_s if gpus <= machine.gpus_per_node else machine.network_gb_s
    network = 2 * (gpus - 1) / gpus * 4 * cost.parameters / (rate * 1e9)
    validated = schedule.validations * schedule.samples / 10 * cost.forward
    taken = {}
    for name, share in UTILISATION.items():
        compute = max(each, 1.0) * cost.operations / (machine.bf16_tflops * 1e12 * share)
        validation = hours(validated, machine.bf16_tflops, share, gpus)
        taken[name] = round(steps * max(compute, network) / 3600 + validation, 2)
    warnings = []
    if each < 1:
        warnings.append(f"batch {schedule.batch_size} in all gives {each:.2f} samples a GPU on {gpus}")
    limit = largest_batch(cost, machine)
    if each > limit:
        warnings.append(f"does not fit: {limit} samples a GPU do; accumulate gradients, or recompute activations")
    if network > each * cost.operations / (machine.bf16_tflops * 1e12 * UTILISATION["middle"]):
        warnings.append("gradients take longer to exchange than to compute")
    total = {name: round(value * gpus, 2) for name, value in taken.items()}
    return Line(gpus, "kept" if kept else "scaled", each, steps, taken, total, warnings)


def make_schedule(config: Mapping[str, Any], samples: int) -> Schedule:
    """Return what a configuration asks for on an archive with so many training cases."""
    data, trainer = config["data"]["init_args"], config["trainer"]
    batch = int(data.get("batch_size", 4)) * int(trainer.get("accumulate_grad_batches") or 1)
    samples *= int((data.get("loader") or {}).get("draws", 1))
    epochs, limit = trainer.get("max_epochs") or -1, trainer.get("max_steps") or -1
    steps = max(samples // batch, 1) * epochs if epochs > 0 else limit
    if epochs > 0 and limit > 0:
        steps = min(steps, limit)
    if every := trainer.get("check_val_every_n_epoch"):
        validations = epochs // every if epochs > 0 else steps * batch // max(samples * every, 1)
    else:
        validations = steps // int(trainer.get("val_check_interval") or steps)
    return Schedule(batch, samples, steps, validations)


def _module(section: Mapping[str, Any]) -> SSLModule:
    from lightning.pytorch import LightningModule

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningModule, "model", fail_untyped=False)
    try:
        module = parser.instantiate(parser.parse_object({"model": dict(section)})).model
    except (ArgumentError, ValueError) as error:
        raise UserError(f"{one_line(str(error))}.") from error
    if not isinstance(module, SSLModule):
        raise UserError(f"{section['class_path']} is no pre-training: take pretrain.yaml of an experiment.")
    return module


def cost_of(config: Mapping[str, Any]) -> StepCost:
    """Count a step of a resolved configuration of one of our experiments.

    Raises:
        UserError: it is of none of them.
    """
    package = str(config["model"]["class_path"]).split(".")
    if package[0] != "experiments":
        raise UserError("medmim plan knows the batches of our own experiments only.")
    example = importlib.import_module(f"experiments.{package[1]}.bench").example
    data = config["data"]["init_args"]
    return step_cost(_module(config["model"]), example(data, 1)[0], lambda count: example(data, count)[1])


def training_cases(archive: Archive) -> int:
    """Return how many training cases an archive has; reads no more than its index."""
    datamodule = archive.datamodule()
    datamodule.index()
    count = len(datamodule.splits["train"])
    if not count:
        raise DataError(f"{datamodule.root} has no training cases.")
    return count


def table(lines: Sequence[Line]) -> str:
    """Return the rows as Markdown."""
    rows = ["| GPUs | batch | a GPU | steps | hours: low, middle, high use | GPU-hours | note |", "|" + "---|" * 7]
    for line in lines:
        times, total = ("{low:g} / {middle:g} / {high:g}".format(**x) for x in (line.hours, line.gpu_hours))
        rows.append(f"| {line.gpus} | {line.batch} | {line.samples_per_gpu:g} | {line.steps} | {times} | {total} | "
                    f"{'; '.join(line.warnings)} |")  # fmt: skip
    return "\n".join(rows)


ASSUMPTIONS = (
    "shares of the peak of 0.10, 0.25 and 0.40 (low, middle, high use), not measured on this machine",
    "data are loaded and the cache is built in no time; train/data_wait_fraction of a run says whether that holds",
    "gradients are exchanged in float32 beside the backward pass; a step takes the longer of the two",
    "a tenth of the samples is validated on, in forward passes alone; checkpoints take no time",
    "the learning rate stays as configured, also where the batch is scaled with the GPUs",
)


def run(config: Sequence[str], machine: str, gpus: str, samples: int | None, root: str | None, out: str | None) -> None:
    """Carry out ``medmim plan``.

    Args:
        config: Configurations, later ones over earlier ones.
        machine: Name or file of a machine.
        gpus: Numbers of GPUs, with commas between.
        samples: Training cases; None: those of the archive at ``root``.
        root: The archive.
        out: JSON file to write as well.

    Raises:
        UserError: neither samples nor an archive is given, or a setting is wrong.
    """
    if (samples is None) == (root is None):
        raise UsageError("medmim plan needs --samples N or --root ARCHIVE, and not both.")
    try:
        numbers = sorted({int(number) for number in gpus.split(",")})
    except ValueError:
        raise UsageError(f"--gpus takes numbers with commas between, such as 1,8,64, got {gpus!r}.") from None
    chosen = read_machine(machine)
    settings: dict[str, Any] = {}
    for name in config:
        settings = merge(settings, read_config(find_config(name)))
    cases = samples if samples is not None else training_cases(Archive(config, root))
    schedule, cost = make_schedule(settings, cases), cost_of(settings)
    lines = [plan_line(cost, schedule, chosen, number, kept)
             for number in numbers for kept in ((True, False) if number > 1 else (True,))]  # fmt: skip
    say(f"model: {cost.parameters / 1e6:.1f} M trained parameters, {cost.operations / 1e9:.0f} GFLOP a sample")
    say(f"memory: {cost.activations / 2**20:.0f} MiB of activations a sample; {chosen.name} holds "
        f"{largest_batch(cost, chosen)}")  # fmt: skip
    say(f"training: {cases} cases, {schedule.steps} steps of {schedule.batch_size} samples")
    for row in table(lines).splitlines():
        say(row)
    for assumption in ASSUMPTIONS:
        say(f"assumed: {assumption}")
    if out:
        facts = {"machine": asdict(chosen), "schedule": asdict(schedule), "cost": cost._asdict(),
                 "assumptions": ASSUMPTIONS, "lines": [asdict(line) for line in lines]}  # fmt: skip
        write_text(Path(out), json.dumps(facts, indent=1, sort_keys=True) + "\n")
