"""``medmim bench``: our own pairs, side by side in one run, as ratios.

Rows come from ``datamodules.commands.bench`` and from ``bench.py`` of every experiment. An absolute time means
nothing on a shared machine, so a row compares two things measured in turn, or a rate with the matrix-product rate of
the same run.
"""

import importlib
import importlib.util
import json
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from common.cli import supports_bfloat16
from common.files import write_text
from common.module import SSLModule
from common.optim import param_groups
from common.runtime.provenance import environment
from common.runtime.reporting import markdown_table, print_line


@dataclass
class Row:
    """One line of the benchmark.

    Attributes:
        name: What is compared.
        value: The ratio, or the amount where ``unit`` says so; None: not applicable on this machine.
        target: The smallest acceptable value; None: for information only.
        detail: How it was measured, or why it is not applicable.
        unit: Empty for ratios.
    """

    name: str
    value: float | None
    target: float | None = None
    detail: str = ""
    unit: str = "x"

    def amount(self) -> str:
        """Return the value with its unit."""
        return "not applicable" if self.value is None else f"{self.value:.2f} {self.unit}".rstrip()

    def line(self) -> str:
        """Return the row as text."""
        verdict = ""
        if self.value is not None and self.target is not None:
            verdict = f" (at least {self.target:g}: {'yes' if self.value >= self.target else 'NO'})"
        return f"{self.name}: {self.amount()}{verdict}{'; ' + self.detail if self.detail else ''}"


def table(result: Mapping[str, Any]) -> str:
    """Return what ``medmim bench --out`` wrote as a Markdown table."""
    rows = [Row(**entry) for entry in result["rows"]]
    cells = ((row.name, row.amount(), "" if row.target is None else f"{row.target:g}", row.detail) for row in rows)
    return "\n".join(markdown_table(["what", "value", "at least", "how"], cells))


def seconds(function: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Return how long one call takes by a clock."""
    begin = clock()
    function()
    return clock() - begin


def in_turn(
    *functions: Callable[[], object], rounds: int = 7, calls: int = 1, clock: Callable[[], float] = time.perf_counter
) -> list[list[float]]:
    """Time functions in turn, after one call each to warm up; one list of times per function.

    Args:
        functions: What to time.
        rounds: How often each gets its turn.
        calls: Calls of a turn, one after the other as a training would make them; their median is the turn's time.
        clock: Where the time comes from.
    """
    for function in functions:
        function()
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds):
        for index, function in enumerate(functions):
            times[index].append(statistics.median(seconds(function, clock) for _ in range(calls)))
    return times


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread inside."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def speedup(slow: list[float], fast: list[float]) -> float:
    """Return the median over rounds of slow / fast: pairs of one round share the machine's mood."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def matrix_products(size: int = 2048) -> tuple[Callable[[], None], float]:
    """Return an fp32 product that a step is held against, and its floating-point operations."""
    a, b = torch.randn(size, size), torch.randn(size, size)

    def multiply() -> None:
        torch.mm(a, b)

    return multiply, 2.0 * size**3


def training_step(module: SSLModule, batch: Any, clip: float | None = 1.0) -> Callable[..., None]:
    """Return a whole training step of a built module on one batch: forward, backward, clipping, AdamW.

    The function takes ``bfloat16=True`` for mixed precision.

    Args:
        module: With its network.
        batch: As its data module gives it.
        clip: Norm of all gradients at most; None where the experiment's configuration does not clip.
    """
    optimizer = torch.optim.AdamW(param_groups(module), lr=1e-4, fused=True)
    module.train()

    def step(bfloat16: bool = False) -> None:
        with torch.autocast("cpu", torch.bfloat16) if bfloat16 else nullcontext():
            loss = module.step(batch, sync=False).loss()
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(module.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()

    return step


def training_rows(step: Callable[..., None], what: str, calls: int = 3) -> list[Row]:
    """Compare a training step with the matrix products of the same minutes and with bfloat16; report its memory.

    Products stand on both sides of the steps that are held against them, and each precision runs for several steps on
    end, as in training: a shared machine's clock drifts by a fifth within a minute.

    Args:
        step: Takes ``bfloat16=True`` for mixed precision.
        what: Which step it is.
        calls: Steps on end; 1 where a step takes seconds.
    """
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with FlopCounterMode(display=False) as counter:
        step()
    operations = float(counter.get_total_flops())
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    product, product_operations = matrix_products()
    bfloat16 = supports_bfloat16("cpu")
    turns: list[Callable[[], None]] = [product, step, product, *([partial(step, bfloat16=True)] if bfloat16 else [])]
    before_step, single, after_step, *half = in_turn(*turns, rounds=4, calls=calls)
    around = [(a + b) / 2 for a, b in zip(before_step, after_step, strict=True)]
    per_product = operations / product_operations
    share = speedup(around, single) * per_product
    rate, best = (product_operations / seconds / 1e9 for seconds in (statistics.median(around), min(around)))
    detail = f"{what}: {operations / 1e9:.0f} GFLOP per step, torch.mm {rate:.0f} GFLOP/s, at best {best:.0f}"
    size = f"{before / 2**20:.2f} GiB before it"
    return [
        Row("training step, share of the fp32 torch.mm peak", share, 0.75, detail, ""),
        Row("training step, bf16 against fp32", speedup(single, half[0]), 2.3)
        if half
        else Row("training step, bf16 against fp32", None, 2.3, "this CPU has neither avx512_bf16 nor AMX"),
        *(
            Row("training step in bf16, against the fp32 torch.mm peak", speedup(around, rounds) * per_product)
            for rounds in half
        ),
        Row("training step, peak memory in fp32", memory / 2**20, None, size, "GiB"),
    ]


def bench_modules(experiment: str | None = None) -> list[str]:
    """Return the modules with rows: the data's, and those of one or all experiments."""
    root = importlib.util.find_spec("experiments")
    assert root is not None
    assert root.submodule_search_locations
    names = sorted(p.parent.name for path in root.submodule_search_locations for p in Path(path).glob("*/bench.py"))
    chosen = [name for name in names if experiment in (None, name)]
    return ["datamodules.commands.bench", *(f"experiments.{name}.bench" for name in chosen)]


def run(exp: str | None, out: str | None) -> None:
    """Carry out ``medmim bench`` for one experiment or all; ``out`` names a JSON file to write as well."""
    facts = environment(torch.device("cpu"))
    print_line(f"{facts['device']}, {facts['torch_threads']} threads, torch {facts['versions']['torch']}")
    rows: list[Row] = []
    for name in bench_modules(exp):
        for measure in importlib.import_module(name).ROWS:
            for row in measure():
                rows.append(row)
                print_line(row.line())
    if out:
        chosen = f" --exp {exp}" if exp else ""
        result = {"command": f"medmim bench{chosen}", "environment": facts, "date": time.strftime("%Y-%m-%d"),
                  "rows": [asdict(row) for row in rows]}  # fmt: skip
        write_text(Path(out), json.dumps(result, indent=1) + "\n")
