"""``medmim evaluate-encoder``: frozen encoders beside each other, and beside controls, on one archive's labels.

Every encoder reads the same cases once; its scores are chosen on validation patients, written down, and only then are
test cases scored. What such a number of test patients can decide stands above the table.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from common.blocks.registry import build_encoder, build_recorded
from common.checkpoint import load_encoder
from common.downstream.encoder import encoder_architecture, meet_encoder
from common.downstream.frozen import Array, Choice, Features, choose, mean_auroc
from common.errors import UserError
from common.files import make_folder, write_text
from common.metrics import central_interval, resampled_counts
from common.randomness import stable_hash
from common.runtime.data_config import Archive
from common.runtime.provenance import environment
from common.runtime.reporting import print_line, write_rows
from common.sweeps.inference import ExpectedAUROC, difference_of, holm, smallest_difference, verdict
from common.types import InputSpec

#: Encoders that learn nothing from images, by name.
CONTROLS = {
    "grey_histogram": "experiments.mrm_record.baselines.GrayHistogram",
    "colour_grid": "experiments.mrm_genetics.baselines.ColourGrid",
}
_RANDOM = "random"


class Arm(NamedTuple):
    """An encoder and the cases as it sees them.

    Attributes:
        name: In the table.
        encoder: With ``num_features`` and ``forward_features``.
        datamodule: Gives the channels that it knows.
    """

    name: str
    encoder: nn.Module
    datamodule: Any


def _open(archive: Archive) -> Any:
    datamodule = archive.datamodule()
    datamodule.prepare_data()
    datamodule.setup("predict")
    return datamodule


def _untrained(encoder: nn.Module) -> nn.Module:
    """Return an encoder of the same architecture with random weights, the same ones every time."""
    with torch.random.fork_rng():
        torch.manual_seed(stable_hash("untrained encoder"))
        return build_recorded(encoder_architecture(encoder))


def _arms(archive: Archive, checkpoints: Sequence[str], controls: bool) -> Iterator[Arm]:
    """Yield the encoders one after the other: those of files, the first of them untrained, and the controls."""
    first: nn.Module | None = None
    spec: InputSpec | None = None
    for checkpoint in checkpoints:
        datamodule = _open(archive)
        spec = meet_encoder(datamodule, checkpoint, "refuse")
        encoder = load_encoder(checkpoint, image_size=spec.image_size, channels=spec.channels)
        first = first or encoder
        yield Arm(checkpoint, encoder, datamodule)
    if not controls or first is None or spec is None:
        return
    yield Arm(_RANDOM, _untrained(first), datamodule)
    datamodule = _open(archive)
    spec = datamodule.input_spec
    for name, path in CONTROLS.items():
        arguments = {"in_channels": len(spec.channels), "image_size": list(spec.image_size)}
        yield Arm(name, build_encoder(path, arguments), datamodule)


@torch.no_grad()
def encode(arm: Arm, split: str, folder: Path) -> Features:
    """Encode the central crop of every case of a split, once.

    Args:
        arm: The encoder and its cases.
        split: ``train``, ``val`` or ``test``.
        folder: Where tokens are kept, in half precision, so that they need not fit into memory.

    Raises:
        UserError: the split is empty, its cases have no labels, or features are not finite.
    """
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    encoder = arm.encoder.eval().to(device)
    prefix = getattr(encoder, "num_prefix_tokens", 0)
    channels = getattr(encoder, "config", {}).get("in_channels")
    pooled, labels, names, patients, shape = [], [], [], [], (0, 0)
    place = folder / f"{split}_tokens.f16"
    with place.open("wb") as file:
        for batch in arm.datamodule.central_samples((split,)):
            if "target" not in batch:
                raise UserError("These data give no labels to score features by: use the configuration of a task, such "
                                "as finetune_idrid.yaml.")  # fmt: skip
            image = batch["image"].to(device)
            if image.shape[1] == 1 < (channels or 1):
                image = image.expand(-1, channels, *image.shape[2:])
            tokens = encoder.forward_features(image)[:, prefix:].float()  # type: ignore[operator]
            finite = tokens.isfinite().flatten(1).all(1)
            if not bool(finite.all()):
                raise UserError(f"The features that {arm.name} gives {batch['subject_id'][int(finite.int().argmin())]} "
                                f"are not finite: check the image (`medmim prepare`) and the encoder.")  # fmt: skip
            pooled.append(tokens.mean(1).double().cpu().numpy())
            file.write(tokens.half().cpu().numpy().tobytes())
            labels.append(batch["target"].double().reshape(len(image), -1).numpy())
            names += batch["subject_id"]
            patients += batch["patient_id"]
            shape = (tokens.shape[1], tokens.shape[2])
    if not names:
        raise UserError(f"The {split} split of {arm.datamodule.root} has no usable case.")
    stored = np.memmap(place, np.float16, "r", shape=(len(names), *shape))
    return Features(np.concatenate(pooled), stored, np.concatenate(labels), names, patients)


class Result(NamedTuple):
    """One encoder's test scores.

    Attributes:
        choices: By score, what was chosen on validation patients.
        values: By score, the mean AUROC of the test cases.
        drawn: By score, the same under resampling of patients ``(draws,)``.
    """

    choices: dict[str, Choice]
    values: dict[str, float]
    drawn: dict[str, Array]


def _write_choices(path: Path, choices: dict[str, dict[str, Choice]]) -> None:
    plain = {
        arm: {
            score: {"setting": c.setting, "validation": c.score, "tried": {str(k): v for k, v in c.tried.items()}}
            for score, c in by_score.items()
        }
        for arm, by_score in choices.items()
    }
    write_text(path, json.dumps(plain, indent=1) + "\n")


def _score(arm: Arm, scores: Sequence[str], folder: Path, choices: dict[str, dict[str, Choice]]) -> Result:
    """Choose on validation patients, write that down, then score test cases."""
    make_folder(folder)
    train, val = encode(arm, "train", folder), encode(arm, "val", folder)
    chosen = {score: choose(score, train, val) for score in scores}
    choices[arm.name] = chosen
    _write_choices(folder.parent / "choices.json", choices)
    test = encode(arm, "test", folder)
    counts = resampled_counts(test.patients, key="bootstrap")
    predicted = {score: choice.predict(test) for score, choice in chosen.items()}
    values = {score: float(mean_auroc(found, test.labels)[0]) for score, found in predicted.items()}
    drawn = {score: mean_auroc(found, test.labels, counts) for score, found in predicted.items()}
    rows = []
    for index, (name, patient) in enumerate(zip(test.names, test.patients, strict=True)):
        row: dict[str, Any] = {"subject_id": name, "patient_id": patient}
        row |= {f"target_{column}": value for column, value in enumerate(test.labels[index])}
        for score, found in predicted.items():
            row |= {f"{score}_{column}": value for column, value in enumerate(found[index])}
        rows.append(row)
    write_rows(folder / "per_case.csv", rows)
    return Result(chosen, values, drawn)


def _power(datamodule: Any, arms: int) -> str:
    """Say what the test patients can decide, before anything has run: by the column of labels that is best balanced."""
    cases = datamodule.splits["test"]
    patients = len({case.patient_id for case in cases})
    counts = []
    for column in zip(*(getattr(case, "targets", ()) for case in cases), strict=False):
        of = [
            {case.patient_id for case, label in zip(cases, column, strict=True) if label == value} for value in (1, 0)
        ]
        counts.append((len(of[0]), len(of[1] - of[0])))
    positives, negatives = max(counts, key=min, default=(0, 0))
    if not min(positives, negatives):
        return f"{patients} test patients"
    least = ExpectedAUROC(positives, negatives).smallest_difference(arms)
    return (f"{patients} test patients ({positives} positive, {negatives} negative where it is most even): differences "
            f"below about {least:.2f} AUROC cannot be told from chance here")  # fmt: skip


def compare(results: dict[str, Result], score: str, reference: str = _RANDOM) -> list[dict[str, Any]]:
    """Compare every encoder with the reference on the same resampled patients, P values corrected for their number."""
    others = [name for name in results if name != reference]
    base = results[reference]
    found = []
    for name in others:
        gap = results[name].values[score] - base.values[score]
        error = float(np.nanstd(results[name].drawn[score] - base.drawn[score], ddof=1))
        found.append(difference_of([gap], error))
    rows = []
    for name, difference, p in zip(others, found, holm([each.p for each in found]), strict=True):
        row = {"encoder": name, "reference": reference, "mean": difference.mean, "low": difference.low}
        row |= {"high": difference.high, "p_holm": p, "verdict": verdict(difference, p)}
        rows.append(row | {"smallest": smallest_difference(difference.standard_error, len(others))})
    return rows


def table(results: dict[str, Result], comparisons: Sequence[dict[str, Any]]) -> list[str]:
    """Return the lines of a Markdown table: an encoder per line, its scores with 95 % intervals over patients."""
    scores = list(next(iter(results.values())).values)
    header = ["encoder", *(f"{score} [95 %]" for score in scores), f"against {_RANDOM}, {scores[0]}"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    said = {row["encoder"]: f"{row['mean']:+.3f}, P {row['p_holm']:.2g}: {row['verdict']}" for row in comparisons}
    for name, result in results.items():
        cells = []
        for score in scores:
            low, high = central_interval(result.drawn[score])
            cells.append(f"{result.values[score]:.3f} [{low:.2f}, {high:.2f}]")
        lines.append("| " + " | ".join([name, *cells, said.get(name, "-")]) + " |")
    return lines


def run(archive: Archive, ckpt: Sequence[str], out: str, scores: Sequence[str], controls: bool) -> None:
    """Carry out ``medmim evaluate-encoder``.

    Args:
        archive: The archive, by the configuration of a task, whose split and labels are used.
        ckpt: Run folders, checkpoints or exports.
        out: Folder to write: ``results.json``, ``table.md``, ``choices.json`` and, per encoder, ``per_case.csv``.
        scores: Of ``attentive``, ``linear`` and ``knn``; the first is the one that is tested.
        controls: Whether the untrained encoder and encoders that learn nothing stand beside.

    Raises:
        UserError: an encoder does not fit the data, there are no labels, or ``out`` holds results already.
    """
    target = Path(out)
    if (target / "results.json").exists():
        raise UserError(f"{target} holds results already: name another folder.")
    make_folder(target)
    results: dict[str, Result] = {}
    choices: dict[str, dict[str, Choice]] = {}
    expected = len(ckpt) + (len(CONTROLS) if controls else 0)
    for number, arm in enumerate(_arms(archive, ckpt, controls)):
        if not number:
            print_line(_power(arm.datamodule, max(expected, 1)))
        results[arm.name] = _score(arm, scores, target / f"encoder_{number}", choices)
        said = "  ".join(f"{score} {value:.3f}" for score, value in results[arm.name].values.items())
        print_line(f"{arm.name}: {said}")
        for score, choice in results[arm.name].choices.items():
            if choice.at_edge and score != "attentive":
                print_line(f"note: {arm.name}, {score}: the best setting {choice.setting:g} is the last that was tried")
    comparisons = compare(results, scores[0]) if _RANDOM in results else []
    lines = table(results, comparisons)
    notes = ["one training of each encoder: nothing here says what another seed would give"]
    content = {
        "scores": {name: result.values for name, result in results.items()},
        "intervals": {n: {s: central_interval(d) for s, d in r.drawn.items()} for n, r in results.items()},
        "comparisons": comparisons,
        "notes": notes,
        "environment": environment(torch.device("cpu")),
    }
    write_text(target / "results.json", json.dumps(content, indent=1) + "\n")
    write_text(target / "table.md", "\n".join([*lines, "", *notes]) + "\n")
    for line in [*lines, *notes]:
        print_line(line)
    print_line(f"written to {target}")
