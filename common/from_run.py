"""``medmim predict`` and ``medmim evaluate``: a run says by itself what it is about; no configuration is asked for."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lightning.pytorch import Trainer

from common.callbacks.prediction_pictures import PredictionPictures
from common.checkpoint import read_checkpoint, resolve_checkpoint
from common.cli import MedmimCLI
from common.cli import execute as lightning
from common.errors import UserError
from common.modalities import canonical_name
from common.names import safe_name
from common.runtime.process import silence_advice
from common.runtime.reporting import print_line
from common.types import InputSpec, TaskState


class Run:
    """A trained task: its checkpoint, and the configuration that it keeps.

    Args:
        path: The run folder, or a checkpoint in it.

    Raises:
        UserError: there is no such, or it is no downstream task.
    """

    def __init__(self, path: str) -> None:
        self.checkpoint = resolve_checkpoint(path)
        self.config = self.checkpoint.parent.parent / "config.yaml"
        if not self.config.is_file():
            raise UserError(f"There is no config.yaml beside {self.checkpoint}: give the run folder that the training "
                            f"wrote, with its checkpoints in it.")  # fmt: skip
        spec = TaskState.read(read_checkpoint(self.checkpoint)).spec
        if spec is None or not (spec.regions or spec.classes):
            raise UserError(f"{path} is no run of a downstream task: it knows neither classes nor regions. Give one of "
                            f"`make finetune`.")  # fmt: skip
        self.spec: InputSpec = spec

    def arguments(self, command: str) -> list[str]:
        """Return what ``lightning`` is called with; the encoder's architecture and weights come with the checkpoint."""
        return [command, "--config", str(self.config), "--ckpt_path", str(self.checkpoint), "--model.pretrained=null"]


class _Predicting(MedmimCLI):
    """Predicts every member of an archive into a folder of the person's choice."""

    def __init__(self, run: Run, arguments: list[str], out: Path) -> None:
        self._run, self._out = run, out
        super().__init__(arguments)

    def run_folder(self) -> Path:
        """Return the folder."""
        self._out.mkdir(parents=True, exist_ok=True)
        return self._out

    def instantiate_classes(self) -> None:
        """Have all members predicted."""
        super().instantiate_classes()
        if not hasattr(self.datamodule, "predict_all"):
            raise UserError(f"{type(self.datamodule).__name__} cannot predict an archive without labels.")
        self.datamodule.predict_all(self._run.spec)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer, with a callback that draws some of the predictions."""
        trainer = super().instantiate_trainer(**kwargs)
        trainer.callbacks.append(PredictionPictures(self._out / "pictures"))  # type: ignore[attr-defined]
        return trainer


def _channel_of(path: Path, channels: Sequence[str]) -> tuple[str, str] | None:
    """Return case and channel that a file's name says, such as ``case1_t1.nii.gz``; None where it says none."""
    stem = path.name.split(".")[0]
    case, _, name = stem.replace("-", "_").rpartition("_")
    if case and canonical_name(name) in channels:
        return stem[: len(case)], canonical_name(name)
    return (stem, channels[0]) if len(channels) == 1 else None


def _staged(files: Sequence[Path], spec: InputSpec) -> dict[str, Path]:
    """Return where single files go so that they make an archive: ``CASE/CHANNEL.nii.gz``, or images by their names."""
    found: dict[str, Path] = {}
    for path in files:
        place = safe_name(path.name)
        if len(spec.image_size) == 3:
            said = _channel_of(path, spec.channels)
            if said is None:
                raise UserError(f"{path.name} does not say which of {', '.join(spec.names or spec.channels)} it is: "
                                f"name files CASE_{spec.channels[0]}.nii.gz and so on, or give a folder.")  # fmt: skip
            # Of "t1.v2.nii.gz" only what says the format.
            suffixes = path.suffixes[-2:] if path.suffix.lower() == ".gz" else path.suffixes[-1:]
            place = f"{safe_name(said[0])}/{said[1]}{''.join(suffixes)}"
        if place in found:
            raise UserError(f"{path} and {found[place]} would both be {place}: predict them one after the other.")
        found[place] = path
    return found


@contextmanager
def _root_of(data: Sequence[str], spec: InputSpec) -> Iterator[Path]:
    """Yield an archive: the one that is given, or one of links to single files."""
    paths = [Path(name).expanduser() for name in data]
    for path in paths:
        if not path.exists():
            raise UserError(f"There is nothing at {path} to predict: give a folder, or files.")
    if len(paths) == 1 and (paths[0].is_dir() or paths[0].suffix in (".yaml", ".yml")):
        yield paths[0]
        return
    if folders := [path for path in paths if path.is_dir()]:
        raise UserError(f"{folders[0]} is a folder among files: give one folder, or files alone.")
    with TemporaryDirectory() as folder:
        for place, path in _staged(paths, spec).items():
            link = Path(folder, place)
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(path.resolve())
        yield Path(folder)


def predict(ckpt: str, data: Sequence[str], out: str, settings: Sequence[str] = ()) -> None:
    """Predict any archive, or single files, by a run: masks on the source grid or probabilities, and pictures.

    Args:
        ckpt: Run folder or checkpoint of a downstream task.
        data: A folder, an archive file, or single files.
        out: Folder to write, which is made.
        settings: Further switches of ``lightning predict``.

    Raises:
        UserError: the run is none, there is nothing to predict, or the folder holds something already.
    """
    run, folder = Run(ckpt), Path(out).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} holds something already: give a new folder as OUT=.")
    silence_advice()
    with _root_of(data, run.spec) as root:
        own = ["--data.root", str(root), "--trainer.logger=false", "--return_predictions=false"]
        own += ["--data.cache.format=none"] if root not in map(Path, data) else []
        _Predicting(run, [*run.arguments("predict"), *own, *settings], folder)
    print_line(f"predictions: {folder}")


def evaluate(ckpt: str, data: str | None = None, labels: str | None = None, settings: Sequence[str] = ()) -> None:
    """Score a run on its own test split, or on another archive with the same labels.

    Args:
        ckpt: Run folder or checkpoint of a downstream task.
        data: Another archive; None takes the run's.
        labels: Another table of labels; None takes the run's.
        settings: Further switches of ``lightning test``.

    Raises:
        UserError: the run is none, or its data cannot be read.
    """
    run = Run(ckpt)
    arguments = run.arguments("test")
    if data is not None:
        arguments += ["--data.root", data]
    if labels is not None:
        arguments += ["--data.target.file", labels]
    if run.spec.target.get("kind") in ("classes", "ordinal"):
        arguments.append(f"--data.target.classes={json.dumps(list(run.spec.classes))}")
    print_line(f"results: {lightning([*arguments, *settings])}")
