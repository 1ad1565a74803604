"""``medmim torture``: real runs are stopped in many ways and started again, and must end as if nothing had happened.

A run of tiny sizes (``configs/torture.yaml``) saves every few steps. Signals reach it at random times or at chosen
places of the program, drawn by a seed; then the documented command, RESUME, goes on, until the run is done. Its weights
and the optimiser's state must equal those of an uninterrupted run bit by bit, its logs must hold no step twice, and
neither temporary files, nor processes, nor a run folder too many may be left. Commands run in children forked from this
process, which has imported what they import: importing takes longer than all they do.
"""

import functools
import itertools
import logging
import multiprocessing
import os
import pkgutil
import random
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM, SIGUSR1
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only

from common import entry
from common.commands import execute
from common.errors import UserError
from common.files import is_temporary, make_folder, write_text
from common.runtime.configs import package_file, read_config
from common.runtime.experiments import experiment_names
from common.runtime.reporting import print_line
from common.sweeps.torture_checks import judge

#: Exit codes of a run that was asked to stop; before there is anything to save, the signal itself ends it.
_CODES = {SIGTERM: (143, -SIGTERM), SIGUSR1: (143, -SIGUSR1), SIGINT: (130,)}
#: Seconds in which a run must end after a signal, in which the other ranks must follow one that has died, and in which
#: the processes it has started must be gone.
_PATIENCE, _FOLLOW, _GONE = 180.0, 10.0, 15.0
_PAIRS = ((SIGTERM, SIGTERM), (SIGINT, SIGTERM), (SIGTERM, SIGUSR1), (SIGUSR1, SIGKILL), (SIGINT, SIGINT))
_SAVE = ("common.checkpoint_io.seal", "common.checkpoint_io._keep_previous", "common.checkpoint_io.trust",
         "common.files._flush")  # fmt: skip
_VALIDATION = ("common.callbacks.preemption.Preemption.on_validation_batch_start",
               "common.module.SSLModule.on_validation_epoch_end")  # fmt: skip


@dataclass(frozen=True)
class Blow:
    """What happens to a run, once.

    Attributes:
        signals: What is sent, in this order.
        gap: Seconds between two of them.
        victims: The ranks they are sent to.
        seconds: When, after the start; where there is no ``point``.
        point: Function that sends them to its own process as it is called.
        nth: At which call.
    """

    signals: tuple[signal.Signals, ...]
    gap: float
    victims: tuple[int, ...]
    seconds: float
    point: str = ""
    nth: int = 1


def _blow(kind: str, rng: random.Random, ranks: int, seconds: float) -> Blow:
    """Draw what happens to a run that takes so many seconds."""
    everyone, when, gap = tuple(range(ranks)), rng.uniform(0.2, 0.8 * seconds), rng.uniform(0, 0.2)
    mostly = rng.choice((SIGKILL, SIGKILL, SIGTERM, SIGINT))
    match kind:
        case "two signals":
            return Blow(rng.choice(_PAIRS), gap, everyone, when)
        case "in a save":
            return Blow((mostly,), gap, everyone, when, rng.choice(_SAVE), rng.randint(1, 6))
        case "in validation":
            return Blow((mostly,), gap, everyone, when, rng.choice(_VALIDATION), rng.randint(1, 4))
        case "while the cache is built":
            return Blow((mostly,), gap, everyone, when, "common.files.temporary_beside", rng.randint(1, 30))
        case "one rank of two":
            return Blow((rng.choice((SIGKILL, SIGKILL, SIGTERM)),), gap, (rng.choice((1, 1, 0)),), when)
    return Blow((signal.Signals[kind.split(",")[0]],), gap, everyone, when)


KINDS = ("SIGKILL, any time", "SIGTERM, any time", "in a save", "one rank of two", "SIGINT, any time", "in validation",
         "while the cache is built", "SIGUSR1, any time", "two signals", "SIGKILL, any time", "in a save",
         "one rank of two")  # fmt: skip


@dataclass
class Tally:
    """What became of one kind of event.

    Attributes:
        kills: Signals, or pairs of them, that met a run.
        resumed: How often a run went on from a checkpoint after one.
        equal: How many of them lie in runs whose end equals the uninterrupted run's.
        faults: What was wrong, with the seed of the run.
    """

    kills: int = 0
    resumed: int = 0
    equal: int = 0
    faults: list[str] = field(default_factory=list)


def table(tallies: Mapping[tuple[str, str], Tally]) -> str:
    """Return the results as a Markdown table, by experiment and kind of event, with their sum."""
    lines = ["| experiment | event | kills | resumed | equal | faults |", "|---|---|---|---|---|---|"]
    rows = [(*names, tally.kills, tally.resumed, tally.equal, len(tally.faults)) for names, tally in tallies.items()]
    sums = [sum(int(row[column]) for row in rows) for column in range(2, 6)]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in [*rows, ("all", "", *sums)])])


def _armed(function: Callable[..., Any], blow: Blow) -> Callable[..., Any]:
    """Return the function, but at its n-th call the process first sends itself the signals."""
    calls = itertools.count(1)

    @functools.wraps(function)
    def armed(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == blow.nth:
            for number in blow.signals:
                os.kill(os.getpid(), number)
        return function(*args, **kwargs)

    return armed


def _command(
    arguments: Sequence[str], folder: Path, log: Path, environment: Mapping[str, str], blow: Blow | None
) -> None:
    """Be the ``lightning`` command: what a forked child does."""
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.chdir(folder)
    os.environ.update(environment)
    # Lightning read it at its import, in the parent.
    rank_zero_only.rank = int(environment.get("LOCAL_RANK", "0"))  # type: ignore[attr-defined]
    sys.argv = ["lightning", *arguments]
    torch.set_num_threads(1)
    if blow is not None and blow.point:
        owner, _, name = blow.point.rpartition(".")
        place = pkgutil.resolve_name(owner)
        setattr(place, name, _armed(getattr(place, name), blow))
    entry.main()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _warm_up(value: Any) -> None:
    """Import every class that a configuration names, and what a run imports late."""
    if isinstance(value, Mapping):
        for name, part in value.items():
            if name == "class_path":
                pkgutil.resolve_name(part)
            _warm_up(part)
    elif isinstance(value, list):
        for part in value:
            _warm_up(part)


def _members(processes: Sequence[Any]) -> list[int]:
    """Return what is left of the sessions that processes lead (Linux)."""
    sessions, found = {process.pid for process in processes}, []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
            if int(session) in sessions and state != "Z":
                found.append(int(stat.parent.name))
    return found


class Victim:
    """Runs of one experiment that are tortured.

    Args:
        experiment: Its name.
        folder: Where everything is written.
        seed: Seed of all events.
    """

    def __init__(self, experiment: str, folder: Path, seed: int) -> None:
        self.experiment, self.folder, self.seed = experiment, folder, seed
        configs = [f"experiments/{experiment}/configs/{name}.yaml" for name in ("pretrain", "torture")]
        content = read_config(Path(package_file(configs[0])))
        _warm_up(content)
        layout = Path(content["data"]["init_args"]["root"]).name
        execute(["synthesize", layout, "--out", str(folder / "data"), "--cases", "10"])
        self.arguments = ["fit", *(word for config in configs for word in ("--config", config)),
                          f"--data.root={folder / 'data'}", "--checkpoint.every_n_steps=2", "--safety.agree_every=2",
                          "--trainer.log_every_n_steps=1", "--trainer.enable_progress_bar=false",
                          "--trainer.accelerator=cpu"]  # fmt: skip
        self._references: dict[int, tuple[Path, float]] = {}

    def reference(self, ranks: int) -> tuple[Path, float]:
        """Return the folder of the uninterrupted run on so many ranks, and how long it took.

        Raises:
            UserError: it did not end well.
        """
        if ranks not in self._references:
            folder = self.folder / f"whole_{ranks}"
            self._begin(folder, self._line(ranks, 0), ranks, None, {})  # fills the cache and the page cache
            begin = time.monotonic()
            codes, fault = self._begin(folder, self._line(ranks, 2), ranks, None, {})
            if fault or any(codes):
                raise UserError(f"The run of {self.experiment} on {ranks} ranks fails without any kill: {fault}")
            self._references[ranks] = (self._newest(folder), time.monotonic() - begin)
        return self._references[ranks]

    def chain(self, number: int, kind: str, tally: Tally, most: int) -> None:
        """Torture one run until it is done.

        Args:
            number: Number of the run; with the seed it determines what happens.
            kind: Kind of events.
            tally: What is counted.
            most: Kills at most.
        """
        rng = random.Random(f"{self.seed}/{self.experiment}/{number}")
        ranks = 2 if kind == "one rank of two" or (rng.random() < 0.1) else 1
        folder = self.folder / f"{number:03d}"
        whole, seconds = self.reference(ranks)
        cache = {"MEDMIM_CACHE": str(folder / "cache")} if kind == "while the cache is built" else {}
        fresh = self._line(ranks, rng.choice((0, 2)))
        line, starts, kills, faults = fresh, 1, 0, []
        done = False
        while not done:
            blow = _blow(kind, rng, ranks, seconds) if kills < most else None
            codes, fault = self._begin(folder, line, ranks, blow, cache)
            faults += [fault] if fault else []
            done = not any(codes) or bool(fault)
            if done:
                break
            kills += 1
            line = self._again(folder) or fresh
            starts += line is fresh
            tally.resumed += line is not fresh
        if not faults:
            store = Path(cache.get("MEDMIM_CACHE", self.folder / "cache"))
            faults += judge(self._newest(folder), whole, store)
            runs = len(list((folder / "runs").glob("*/*/*")))
            faults += [f"{runs} run folders after {starts} starts"] if runs > starts else []
        tally.kills += kills
        tally.equal += 0 if faults else kills
        tally.faults += [f"{self.experiment}, {kind}, run {number} of seed {self.seed}: {fault}" for fault in faults]

    def _line(self, ranks: int, workers: int) -> list[str]:
        several = [f"--trainer.devices={ranks}", "--trainer.strategy=ddp"] if ranks > 1 else []
        return [*self.arguments, f"--data.num_workers={workers}", *several]

    @staticmethod
    def _newest(folder: Path) -> Path:
        return max((folder / "runs").glob("*/*/*"), key=lambda path: path.name)

    def _again(self, folder: Path) -> list[str] | None:
        """Return what `make pretrain RESUME=` runs; None where nothing was saved."""
        found = (folder / "runs").glob("*/*/*/checkpoints/*.ckpt")
        saved = [path.parent.parent for path in found if not is_temporary(path.name)]
        if not saved:
            return None
        run = str(max(saved, key=lambda path: path.name))
        return ["fit", "--config", f"{run}/config.yaml", "--ckpt_path", run]

    def _begin(
        self, folder: Path, line: Sequence[str], ranks: int, blow: Blow | None, cache: Mapping[str, str]
    ) -> tuple[list[int], str]:
        """Run a command to its end, whatever that is; return the exit codes of its ranks, and what was wrong."""
        make_folder(folder)
        log = folder / f"log_{len(list(folder.glob('log_*'))):02d}.txt"
        environment = {"MEDMIM_CACHE": str(self.folder / "cache"), **cache}
        port = str(_free_port())
        processes = []
        for rank in range(ranks):
            if ranks > 1:
                environment |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(ranks),
                                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
            own = blow if blow is not None and rank in blow.victims else None
            process = multiprocessing.get_context("fork").Process(
                target=_command, args=(line, folder, log, dict(environment), own)
            )
            process.start()
            processes.append(process)
        fault = _follow(processes, log, blow)
        text = log.read_text(errors="replace")
        codes = [process.exitcode or 0 for process in processes]
        problem = fault or _look(text, codes, blow)
        return codes, f"{problem}; {log}: {text[-600:]}" if problem else ""


def _follow(processes: Sequence[Any], log: Path, blow: Blow | None) -> str:
    """Wait for the ranks of a run, and strike them when it is time; return what was wrong."""
    begin, struck = time.monotonic(), blow is None or bool(blow.point)
    first_end, problem = None, ""
    while any(process.is_alive() for process in processes):
        now = time.monotonic()
        if not struck and blow is not None and now - begin > blow.seconds:
            _strike([processes[rank] for rank in blow.victims], blow)
            struck = True
        if first_end is None and any(process.exitcode for process in processes):
            first_end = now
        if (first_end is not None and now - first_end > _FOLLOW) or now - begin > _PATIENCE:
            # Before the ranks have met, whoever launches them ends those that wait for one that has died.
            met = "All distributed processes registered" in log.read_text(errors="replace")
            problem = "" if first_end and not met else "a rank does not follow another" if first_end else "it hangs"
            _end(processes)
        time.sleep(0.02)
    for process in processes:
        process.join()
    end = time.monotonic() + _GONE
    while (left := _members(processes)) and time.monotonic() < end:
        time.sleep(0.1)
    _end(processes)
    return problem or (f"{len(left)} processes are left behind" if left else "")


def _end(processes: Sequence[Any]) -> None:
    for pid in _members(processes):
        with suppress(ProcessLookupError):
            os.kill(pid, SIGKILL)


def _strike(victims: Sequence[Any], blow: Blow) -> None:
    for number in blow.signals:
        for victim in victims:
            with suppress(ProcessLookupError):
                os.kill(victim.pid, number)
        time.sleep(blow.gap)


def _look(text: str, codes: Sequence[int], blow: Blow | None) -> str:
    """Return what is wrong with how a run has ended: a traceback, or an exit code that says something else."""
    if "Traceback" in text:
        return "a traceback"
    if blow is None:
        return f"exit codes {codes}" if any(codes) else ""
    allowed = {0, *(code for number in blow.signals for code in _CODES.get(number, ()))}
    if SIGKILL in blow.signals or min(codes) < 0:  # the others follow a rank that has died with 1, or are ended
        allowed |= {-SIGKILL, 1}
    return "" if set(codes) <= allowed else f"exit codes {codes} after {[number.name for number in blow.signals]}"


def run(exp: str | None, kills: int, out: str | None, seed: int) -> None:
    """Carry out ``medmim torture``.

    Args:
        exp: One experiment; None: all.
        kills: How many kills of each.
        out: Folder to write everything to; None: a temporary one.
        seed: Seed of all events.

    Raises:
        UserError: there is no such experiment, or something was wrong.
    """
    if exp is not None and exp not in experiment_names():
        raise UserError(f"There is no experiment {exp!r}; there are {', '.join(experiment_names())}.")
    torch.set_num_threads(1)
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it says what it purges
    tallies: dict[tuple[str, str], Tally] = {}
    with tempfile.TemporaryDirectory(prefix="torture-") as temporary:
        folder = Path(out or temporary).absolute()
        for name in [exp] if exp else experiment_names():
            victim, met = Victim(name, folder / name, seed), 0
            for number, kind in enumerate(itertools.cycle(KINDS)):
                if met >= kills:
                    break
                tally = tallies.setdefault((name, kind), Tally())
                before, faults = tally.kills, len(tally.faults)
                victim.chain(number, kind, tally, min(6, kills - met))
                met += tally.kills - before
                for fault in tally.faults[faults:]:
                    print_line(f"fault: {fault}")
                print_line(f"{name}: {met} of {kills} kills; run {number}, {kind}")
                write_text(folder / "torture.md", table(tallies))
    for line in table(tallies).splitlines():
        print_line(line)
    if faults_found := sum(len(tally.faults) for tally in tallies.values()):
        raise UserError(f"{faults_found} of these runs did not end as they must; the lines above say what was wrong.")
