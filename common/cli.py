"""The ``lightning`` command: LightningCLI with our defaults, run folder and one-sentence refusals."""

from common.runtime.lean_imports import import_torchmetrics

import_torchmetrics()  # before anything imports Lightning

import json
import os
import signal
import sys
import threading
import time
from importlib.resources import files
from itertools import count, pairwise
from pathlib import Path
from typing import Any, NoReturn

import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from common.callbacks.fault_report import FaultReport
from common.callbacks.finite_check import FiniteCheck
from common.callbacks.last_checkpoint import Cadence, LastCheckpoint, Safety
from common.callbacks.membership import MembershipRecord
from common.callbacks.preemption import Preemption, slurm_job
from common.callbacks.run_record import RunRecord, personal_settings
from common.checkpoint import read_checkpoint, resolve_checkpoint, run_tokenizer, stored_membership
from common.checkpoint_io import AtomicCheckpointIO
from common.distributed import launched_rank
from common.errors import InterruptedRun, PreemptedError, UsageError, UserError
from common.files import is_about_storage, remove_empty_folders, storage_sentence, whole_file
from common.module import BuiltFromData
from common.names import printable, safe_name
from common.pseudonyms import public_name
from common.randomness import DEFAULT_SEED
from common.runtime.configs import expand_config_arguments
from common.runtime.data_config import one_line
from common.runtime.loggers import RunCSVLogger, RunTensorBoardLogger, SummaryLogger
from common.runtime.process import silence_advice
from common.runtime.reporting import is_dry_run, say
from common.types import TaskState

INTERRUPTED = 130


def run_name(arguments: list[str], class_path: str) -> tuple[str, str]:
    """Return experiment and stage of a run.

    They are read off the first configuration, ``experiments/<experiment>/configs/<stage>.yaml``; the config of an
    earlier run, ``runs/<experiment>/<stage>/<time>/config.yaml``, keeps its names; else the model's package serves.
    """
    configs = [value for name, value in pairwise(arguments) if name in ("--config", "-c")]
    configs += [a.partition("=")[2] for a in arguments if a.startswith("--config=")]
    for config in (Path(name).resolve() for name in configs):
        parts = config.parts
        if config.name == "config.yaml" and len(parts) > 4:
            return parts[-4], parts[-3]
        if config.parent.name == "configs":
            return safe_name(config.parent.parent.name), safe_name(config.name.split(".")[0])
    package = class_path.split(".")
    return (safe_name(package[1]) if package[0] == "experiments" and len(package) > 1 else "custom"), "run"


def supports_bfloat16(device_type: str) -> bool:
    """Whether bfloat16 matrix products are faster than float32's on the device."""
    if device_type != "cpu":
        return True
    features = torch.cpu.get_capabilities()
    return bool(
        features.get("avx512_bf16") or features.get("amx_bf16") or features.get("arm_bf16") or features.get("bf16")
    )


class RunConfig(SaveConfigCallback):
    """Saves the resolved configuration as ``config.yaml`` in the run folder."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the file once, whole or not at all (Lightning hook)."""
        if self.already_saved or not trainer.is_global_zero or is_dry_run(trainer):
            return
        config = self.config.clone()
        options = (config.get("data") or {}).get("init_args") or {}
        for name in personal_settings(trainer):
            if options.get(name):  # jsonargparse's namespaces take dotted names
                options[name] = public_name(options[name])
        with whole_file(Path(trainer.default_root_dir) / "config.yaml") as temporary:
            self.parser.save(config, str(temporary), skip_unset=False, skip_validation=True, overwrite=True)
        self.already_saved = True


class OneLineParser(LightningArgumentParser):
    """Says what is wrong with the usage in one line, without the page of all options."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong and exit with 2."""
        if not self.exit_on_error:
            super().error(message, ex)
        command = getattr(ex, "subcommand_parser", self).prog.replace(" [options]", "")
        print(f"error: {one_line(message)}. `{command} --help` lists the options.", file=sys.stderr, flush=True)
        sys.exit(2)


class MedmimCLI(LightningCLI):
    """LightningCLI that owns the run folder and what must never be switched off by another callback list."""

    def __init__(self, arguments: list[str]) -> None:
        self._arguments = arguments  # as given: they name the run
        self._made: Path | None = None
        self._state = TaskState()
        self._members: dict[str, Any] | None = None
        defaults = str(files("experiments").joinpath("configs/defaults.yaml"))
        try:
            super().__init__(
                save_config_callback=RunConfig,
                seed_everything_default=DEFAULT_SEED,
                parser_kwargs={name: {"default_config_files": [defaults]} for name in self.subcommands()},
                auto_configure_optimizers=False,
                parser_class=OneLineParser,
                args=expand_config_arguments(arguments),
            )
        except BaseException:
            if self._made is not None:
                remove_empty_folders(self._made, Path())
            raise

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Declare when checkpoints are written and what a run forgives (CLI hook)."""
        parser.add_class_arguments(Cadence, "checkpoint")
        parser.add_class_arguments(Safety, "safety")

    def _parse_ckpt_path(self) -> None:
        """Let a run folder stand for its checkpoint, and take what the network was built for from it.

        A folder means the last checkpoint to resume and the best for all else. Everything but what the weights' shapes
        depend on stays as the configuration has it, so that a model can be scored under other settings.
        """
        command = self.config["subcommand"]
        config = self.config[command]
        if command == "fit" and not config.get("ckpt_path") and int(os.environ.get("SLURM_RESTART_COUNT", "0")):
            config["ckpt_path"] = self._requeued_run(config["model"].get("class_path", ""))
        if not config.get("ckpt_path"):
            return
        path = resolve_checkpoint(config["ckpt_path"], "last" if command == "fit" else "best")
        config["ckpt_path"] = str(path)
        checkpoint = read_checkpoint(path)
        class_path = config["model"].get("class_path")
        if class_path == checkpoint.get("hyper_parameters", {}).get("_class_path", class_path):
            self._state = TaskState.read(checkpoint)
        self._members = checkpoint.get("membership")

    def before_instantiate_classes(self) -> None:
        """Give the data the tokenizer of the run that weights are from, unless one is asked for (CLI hook)."""
        config = self.config[self.config["subcommand"]]
        text = ((config.get("data") or {}).get("init_args") or {}).get("text")
        if text is None or "tokenizer" not in text or text["tokenizer"]:
            return
        source = config["model"].get("init_args", {}).get("pretrained")
        if self.config["subcommand"] != "fit" and config.get("ckpt_path"):
            source = config["ckpt_path"]
        if source and (found := run_tokenizer(Path(source))) is not None:
            text["tokenizer"] = str(found)

    def _requeued_run(self, class_path: str) -> str | None:
        """Return the folder of this SLURM job's run before it was requeued, if that run saved anything."""
        for record in Path("runs", *run_name(self._arguments, class_path)).glob("*/environment.json"):
            saved = (record.parent / "checkpoints/last.ckpt").is_file()
            if saved and json.loads(record.read_text()).get("slurm_job") == slurm_job():
                return str(record.parent)
        return None

    def instantiate_classes(self) -> None:
        """Make model, data and trainer; a value that one of them refuses is the user's to change."""
        try:
            super().instantiate_classes()
            if self.datamodule is not None:
                self.datamodule.purpose = run_name(self._arguments, "")[0]
                self.datamodule.described = self._described()
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"{one_line(str(error))}.") from error
        if isinstance(self.model, BuiltFromData):
            self.model.state = self._state
        self._recall_members()

    def _described(self) -> str:
        """Return the settings of model and data as text, without those that change no sample and no target."""
        parts = {name: self._get(self.config, name).as_dict() for name in ("model", "data")}
        for part, name in (("model", "optimization"), ("data", "num_workers"), ("data", "seed")):
            parts[part].get("init_args", {}).pop(name, None)
        return json.dumps(parts, sort_keys=True, default=str)

    def _recall_members(self) -> None:
        """Tell the data who was in which split of the runs that this one goes on from (those that keep it)."""
        recall = getattr(self.datamodule, "recall", None)
        if recall is None:
            return
        pretrained = (self._get(self.config, "model").get("init_args") or {}).get("pretrained")
        started_from = stored_membership(pretrained) if pretrained else None
        if pretrained and started_from is None and not self._members:
            say(f"note: whether patients were seen in pre-training cannot be checked: {pretrained} keeps no membership")
        kind = "resumed" if self.subcommand == "fit" else "weights"
        recall(**{"started_from": started_from, kind: self._members})

    def run_folder(self) -> Path:
        """Return the folder of this run; a resumed run continues in its own.

        The first rank makes it, so that of two runs of one second each has its own.
        """
        ckpt_path = self._get(self.config, "ckpt_path")
        if self.subcommand == "fit" and ckpt_path and Path(ckpt_path).parent.name == "checkpoints":
            return Path(ckpt_path).parent.parent
        class_path = self._get(self.config, "model").get("class_path", "")
        experiment, stage = run_name(self._arguments, class_path)
        if self.subcommand != "fit":
            stage = f"{'evaluate' if self.subcommand == 'test' else self.subcommand}_{stage.removeprefix('finetune_')}"
        # Ranks that this process starts inherit the name through the environment.
        stamp = safe_name(os.environ.setdefault("MEDMIM_RUN_TIME", time.strftime("%Y-%m-%d_%H-%M-%S")))
        folder = Path("runs") / experiment / stage / stamp
        if launched_rank() == 0 and not self._get(self.config_init, "trainer")["fast_dev_run"]:
            for number in count(2):
                try:
                    folder.mkdir(parents=True)
                    break
                except FileExistsError:
                    folder = folder.with_name(f"{stamp}_{number}")
                except OSError as error:
                    raise UserError(f"The run folder {folder.absolute()} cannot be made ({error.strerror}): "
                                    "start the command where files can be written.") from error  # fmt: skip
            self._made = folder
        os.environ["MEDMIM_RUN_TIME"] = folder.name
        return folder

    def _check_precision(self, trainer_config: dict[str, Any]) -> None:
        """Refuse float16 on a CPU, and fall back to float32 where bfloat16 is only emulated."""
        on_cpu = trainer_config["accelerator"] == "cpu" or (
            trainer_config["accelerator"] == "auto" and not torch.accelerator.is_available()
        )
        precision = str(trainer_config["precision"])
        if on_cpu and precision in ("16", "16-mixed", "16-true"):
            raise UserError(
                f"Precision {precision} is float16, which CPUs do not compute fast: use bf16-mixed or 32-true."
            )
        if on_cpu and precision == "bf16-mixed" and not supports_bfloat16("cpu"):
            say("precision: this CPU has no bfloat16 instructions, training in 32-true instead of bf16-mixed")
            trainer_config["precision"] = "32-true"

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer with our loggers, checkpoints and callbacks."""
        folder = self.run_folder()
        config = dict(self._get(self.config_init, "trainer"))
        self._check_precision(config)
        if config["logger"] in (None, True):
            config["logger"] = [RunTensorBoardLogger(str(folder)), RunCSVLogger(str(folder))]
        if config["logger"]:
            given = config["logger"] if isinstance(config["logger"], list) else [config["logger"]]
            config["logger"] = [*given, SummaryLogger(str(folder))]
        config["default_root_dir"] = str(folder)
        config["plugins"] = [*(config["plugins"] or []), AtomicCheckpointIO()]
        if SLURMEnvironment.detect():
            config["plugins"].append(SLURMEnvironment(auto_requeue=False))
        callbacks: list[Any] = [RunRecord(folder), MembershipRecord(folder), FaultReport(folder)]
        if config["enable_progress_bar"] is not False and not any(
            isinstance(c, ProgressBar) for c in config["callbacks"]
        ):
            # Every refresh reads values off the device, so not at every step.
            callbacks.append(TQDMProgressBar(refresh_rate=10))
        if self.subcommand == "fit":
            safety = self._get(self.config_init, "safety")
            callbacks.append(FiniteCheck(safety.agree_every, safety.max_skipped_steps))
            callbacks[2].agree_every = safety.agree_every
            if config["enable_checkpointing"] is not False:
                callbacks += self._checkpoint_callbacks(folder, safety)
        self.trainer_defaults = {"callbacks": callbacks}
        trainer = self._instantiate_trainer({**config, **kwargs}, [])
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise UserError(
                f"The strategy {config['strategy']} splits the model over devices; losses over all ranks and exact "
                f"resuming do not allow that: use ddp."
            )
        return trainer

    def _checkpoint_callbacks(self, folder: Path, safety: Safety) -> list[Any]:
        every = safety.agree_every
        last = LastCheckpoint(folder / "checkpoints", self._get(self.config_init, "checkpoint"), every)
        monitor, mode = getattr(self.model, "monitor", ("val/loss", "min"))
        best = ModelCheckpoint(
            dirpath=folder / "checkpoints",
            filename="best",
            monitor=monitor,
            mode=mode,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
            auto_insert_metric_name=False,
        )
        return [best, last, Preemption(last, every)]


def _fail(error: Exception) -> NoReturn:
    """Print one line and exit: with 2 for wrong usage, else with 1."""
    print(f"error: {printable(' '.join(str(error).split()))}", file=sys.stderr, flush=True)
    sys.exit(2 if isinstance(error, UsageError) else 1)


def execute(arguments: list[str]) -> Path:
    """Run a command inside this process and return its run folder.

    Raises:
        UserError: refused.
        PreemptedError: stopped on request; the state is saved.
    """
    silence_advice()
    os.environ.pop("MEDMIM_RUN_TIME", None) if launched_rank() == 0 else None
    return Path(MedmimCLI(arguments).trainer.default_root_dir)


def _interrupt(number: int, frame: Any) -> NoReturn:
    raise InterruptedRun


def main(args: list[str] | None = None) -> None:
    """Run ``lightning {fit,validate,test,predict}``.

    Exit codes: 0 done, 1 refused or failed with one line, 2 wrong usage, 130 after Ctrl-C, 143
    pre-empted. ``--debug`` shows tracebacks.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in arguments
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _interrupt)
    try:
        execute([argument for argument in arguments if argument != "--debug"])
    except PreemptedError as stop:
        sys.exit(stop.code)
    except InterruptedRun:
        print("stopped by Ctrl-C outside training: nothing new was saved", file=sys.stderr, flush=True)
        sys.exit(INTERRUPTED)
    except (UserError, MisconfigurationException) as error:
        if debug:
            raise
        _fail(error)
    except OSError as error:
        if debug or not is_about_storage(error):
            raise
        _fail(UserError(storage_sentence(Path(error.filename or "A file of the run"), error, "written or read")))


if __name__ == "__main__":
    main()
