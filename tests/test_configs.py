"""Every configuration that is shipped builds what it names."""

from pathlib import Path

import pytest
import yaml
from lightning.pytorch import LightningDataModule, LightningModule

import experiments
from common.cli import MedmimCLI, resolve_config_arguments
from common.commands import COMMANDS
from common.sweeps.runner import read_study

ROOT = Path(next(iter(experiments.__path__)))
CONFIGS = sorted(ROOT.glob("*/configs/*.yaml"))
STAGES = [path for path in CONFIGS if "class_path" in (yaml.safe_load(path.read_text()).get("model") or {})]
OVERLAYS = [path for path in CONFIGS if path not in STAGES]
STUDIES = sorted(ROOT.glob("*/configs/studies/*.yaml"))


def name_of(path):
    return f"{path.parent.parent.name}-{path.name.removesuffix('.yaml')}"


def build(monkeypatch, *configs):
    """Parse and instantiate, as the command does, and stop before anything runs."""
    monkeypatch.setattr(MedmimCLI, "_run_subcommand", lambda self, subcommand: None)
    arguments = ["fit", *(word for config in configs for word in ("--config", str(config)))]
    return MedmimCLI(resolve_config_arguments([*arguments, "--trainer.logger=false"]))


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
    plain = yaml.safe_load(path.read_text())
    assert plain.keys() <= {"model", "data", "trainer"}
    assert isinstance(cli.model, LightningModule)


@pytest.mark.parametrize("path", STUDIES, ids=name_of)
def test_studies_name_configurations_that_exist(path):
    for steps in read_study(path)["arms"].values():
        for step in steps:
            assert step.run in ("fit", "validate", "test") or step.run in COMMANDS
            assert all((path.parent.parent / config).is_file() for config in step.config)


@pytest.mark.parametrize("experiment", sorted({path.parent.parent.name for path in STAGES}))
def test_every_experiment_has_what_the_contract_asks_for(experiment):
    names = {path.name for path in (ROOT / experiment / "configs").glob("*.yaml")}
    assert {"pretrain.yaml", "small.yaml", "smoke.yaml"} <= names
    for name in names:
        if name.startswith("finetune_") and name.count(".") == 1:
            assert {name.replace(".yaml", f".{size}.yaml") for size in ("smoke", "small")} <= names
