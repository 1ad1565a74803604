"""Every configuration that is shipped builds what it names."""

from pathlib import Path

import pytest
import yaml
from lightning.pytorch import LightningDataModule, LightningModule

import experiments
from common.cli import MedmimCLI
from common.commands import COMMANDS, build_parser
from common.runtime.configs import find_config, read_config
from common.sweeps.runner import read_study

ROOT = Path(next(iter(experiments.__path__)))
CONFIGS = sorted(ROOT.glob("*/configs/*.yaml"))
STAGES = [
    path for path in CONFIGS if all("class_path" in (read_config(path).get(part) or {}) for part in ("model", "data"))
]
OVERLAYS = [path for path in CONFIGS if path not in STAGES]
FAMILIES = sorted([*ROOT.glob("*/configs/families/*.yaml"), *ROOT.glob("configs/*.yaml")])
TASKS = [path for path in STAGES if path.name.startswith("finetune_")]
INHERITED = [
    (path, size)
    for path in TASKS
    for size in ("smoke", "small")
    if not path.with_name(f"{path.stem}.{size}.yaml").is_file()
]
STUDIES = sorted(ROOT.glob("*/configs/studies/*.yaml"))


def name_of(path):
    return f"{path.parent.parent.name}-{path.name.removesuffix('.yaml')}"


def build(monkeypatch, *configs):
    """Parse and instantiate, as the command does, and stop before anything runs."""
    monkeypatch.setattr(MedmimCLI, "_run_subcommand", lambda self, subcommand: None)
    arguments = ["fit", *(word for config in configs for word in ("--config", str(config)))]
    return MedmimCLI([*arguments, "--trainer.logger=false"])


def stack_of(path):
    """Return what a configuration is laid on, and itself: `a.b.yaml` on `a.yaml`, another overlay on pre-training."""
    if path in STAGES:
        return [path]
    own, _, _ = path.stem.rpartition(".")
    return [*stack_of(path.with_name(f"{own}.yaml") if own else path.with_name("pretrain.yaml")), path]


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=[pytest.mark.slow] if p.name.startswith("finetune") else []) for p in STAGES],
    ids=[name_of(p) for p in STAGES],
)
def test_stages_build(monkeypatch, path):
    cli = build(monkeypatch, path)
    assert isinstance(cli.model, LightningModule)
    assert isinstance(cli.datamodule, LightningDataModule)


@pytest.mark.slow
@pytest.mark.parametrize("path", OVERLAYS, ids=name_of)
def test_overlays_build_on_their_stage(monkeypatch, path):
    cli = build(monkeypatch, *stack_of(path))
    assert read_config(path).keys() <= {"model", "data", "trainer"}
    assert isinstance(cli.model, LightningModule)


@pytest.mark.parametrize("path", STUDIES, ids=name_of)
def test_studies_name_configurations_that_exist(path):
    for steps in read_study(path)["arms"].values():
        for step in steps:
            assert step.run in ("fit", "validate", "test") or step.run in COMMANDS
            assert all(find_config(str(path.parent.parent / config)).is_file() for config in step.config)


@pytest.mark.slow
@pytest.mark.parametrize("path", STUDIES, ids=name_of)
def test_the_commands_of_studies_parse(monkeypatch, path):
    """Every option of every step exists and takes its value; nothing is built, so no checkpoint is needed."""
    for hook in ("_parse_ckpt_path", "before_instantiate_classes", "instantiate_classes", "_run_subcommand"):
        monkeypatch.setattr(MedmimCLI, hook, lambda self, *_: None)
    study = read_study(path)
    names = {step.name for steps in study["arms"].values() for step in steps} | {"fit", "fold", "folder", "data"}
    places = dict.fromkeys(names, "runs/example") | {"seed": str(study["seeds"][0]), "fold": "0"}
    commands = {tuple(step.arguments(path.parent.parent, places)) for steps in study["arms"].values() for step in steps}
    for command in sorted(commands):
        build_parser().parse_args(command) if command[0] in COMMANDS else MedmimCLI(list(command))


@pytest.mark.parametrize("experiment", sorted({path.parent.parent.name for path in STAGES}))
def test_every_experiment_has_what_the_contract_asks_for(experiment):
    names = {path.name for path in (ROOT / experiment / "configs").glob("*.yaml")}
    assert {"pretrain.yaml", "small.yaml", "smoke.yaml"} <= names


@pytest.mark.slow
@pytest.mark.parametrize(("path", "size"), INHERITED, ids=[f"{name_of(path)}.{size}" for path, size in INHERITED])
def test_tasks_take_over_the_overlays_of_their_family(monkeypatch, path, size):
    cli = build(monkeypatch, path, path.with_name(f"{path.stem}.{size}.yaml"))
    assert isinstance(cli.model, LightningModule)


def test_every_file_is_used():
    """A family or a shared file that nothing names is a copy waiting to differ."""
    named = {find_config(str(path)).resolve() for path in CONFIGS}
    named |= {find_config(str(path.with_name(f"{path.stem}.{size}.yaml"))).resolve() for path, size in INHERITED}
    for path in [*CONFIGS, *FAMILIES]:
        for base in yaml.safe_load(path.read_text()).get("base", []):
            named.add((ROOT.parent / base if base.startswith("experiments/") else path.parent / base).resolve())
    unused = {path.resolve() for path in FAMILIES} - named - {(ROOT / "configs/defaults.yaml").resolve()}
    assert not unused


def test_a_data_set_costs_ten_lines():
    """Comments and model settings aside: what a task adds to its family says where the data are and what they hold."""
    plain = [path for path in TASKS if "model" not in yaml.safe_load(path.read_text())]
    assert len(plain) > len(TASKS) / 2
    for path in plain:
        lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
        assert len(lines) <= 10, path


def test_configurations_stay_short():
    """Settings stand once: 4,351 lines before there were families, and fifteen baselines fewer."""
    assert sum(len(path.read_text().splitlines()) for path in [*CONFIGS, *FAMILIES]) < 2100
