"""``medmim export``: an encoder for use without this project, with a card that says where it came from."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import save
from torch import Tensor

from common.checkpoint import StoredEncoder, read_encoder, resolve_checkpoint, run_tokenizer
from common.errors import UserError
from common.files import whole_file, whole_folder, write_text
from common.finite import check_finite
from common.runtime.experiments import experiment_module, experiment_names
from common.runtime.provenance import source_state
from common.runtime.reporting import print_line


class Part(NamedTuple):
    """A part of an encoder that a library loads from a folder of its own.

    Attributes:
        tensors: Weights under the library's names.
        config: Its ``config.json``.
    """

    tensors: dict[str, Tensor]
    config: dict[str, Any]


class Exported(NamedTuple):
    """The result of a format's writer.

    Attributes:
        tensors: Weights under the target library's names.
        config: The target library's arguments.
        usage: Python that loads the result, run inside the export's folder.
        save: Writes further files into that folder.
        parts: Parts by the name of their folder.
    """

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    usage: str
    save: Callable[[Path], None] | None = None
    parts: Mapping[str, Part] = {}


Writer = Callable[[StoredEncoder], Exported]
_Arguments = Mapping[str, Any]


def renaming_writer(
    rename: Callable[[Mapping[str, Tensor], _Arguments], dict[str, Tensor]],
    configure: Callable[[_Arguments], dict[str, Any]],
    usage: str,
) -> Writer:
    """Return the writer of a format that is a library's own encoder under other names.

    Args:
        rename: Makes the library's weights from our weights and arguments; ValueError: it has no such encoder.
        configure: Makes the library's arguments from ours; likewise.
        usage: Python that loads the result.
    """

    def write(stored: StoredEncoder) -> Exported:
        try:
            return Exported(rename(stored.state, stored.init_args), configure(stored.init_args), usage)
        except ValueError as error:
            raise UserError(str(error)) from error

    return write


def formats_of(experiment: str) -> dict[str, Writer]:
    """Return the formats that an experiment can be exported to.

    Raises:
        UserError: the experiment does not exist, or has no formats.
    """
    module = experiment_module(experiment, "export")
    if module is None:
        raise UserError(f"The experiment {experiment!r:.60} does not exist or has no export; there are "
                        f"{', '.join(experiment_names())}.")  # fmt: skip
    return module.FORMATS


def export(experiment: str, checkpoint: Path, format: str, out: Path) -> Path:
    """Write an encoder as safetensors, ``config.json`` and a card.

    Args:
        experiment: Whose encoder it is.
        checkpoint: A run folder or checkpoint.
        format: One of the experiment's formats.
        out: Folder to write.

    Raises:
        UserError: the experiment does not have the format; names those it has.
        CheckpointError: there is no encoder in the checkpoint.
    """
    writers = formats_of(experiment)
    if format not in writers:
        raise UserError(f"{experiment} cannot be exported as {format!r}; valid formats: {', '.join(sorted(writers))}.")
    stored, tokenizer = read_encoder(checkpoint), run_tokenizer(checkpoint)
    return write_export(stored, experiment, format, out, resolve_checkpoint(checkpoint).name, tokenizer)


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    content = {key: value.detach().contiguous().clone() for key, value in tensors.items()}
    with whole_file(path) as temporary:
        temporary.write_bytes(save(content, {"format": "pt"}))


def write_export(
    stored: StoredEncoder, experiment: str, format: str, out: Path, source: str, tokenizer: Path | None = None
) -> Path:
    """Write an encoder as safetensors, ``config.json`` and a card: all of it, or nothing.

    Args:
        stored: The encoder.
        experiment: Whose encoder it is.
        format: One of the experiment's formats.
        out: Folder to write.
        source: The file it came from, for the card.
        tokenizer: The tokenizer of its texts, to be written too.

    Raises:
        StorageError: it cannot be written; an export that was there before is still whole.
        CheckpointError: its weights are not finite.
    """
    check_finite(stored.state | stored.rest, source)
    exported = formats_of(experiment)[format](stored)
    with whole_folder(out, "config.json") as folder:
        _write_parts(exported, folder)
        if tokenizer is not None:
            write_text(folder / "tokenizer.json", tokenizer.read_text(encoding="utf-8"))
        facts = {
            "format": format,
            "experiment": experiment,
            "arguments": exported.config,
            "encoder": {"class_path": stored.class_path, "init_args": stored.init_args},
            "channels": stored.channels,
            "names": stored.names,
            "preprocessing": stored.preprocessing,
            "sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
            **source_state(),
        }
        write_text(folder / "config.json", json.dumps(facts, indent=2))
        write_text(folder / "README.md", _card(facts, source, exported.usage))
    return out


def _write_parts(exported: Exported, out: Path) -> None:
    _save(exported.tensors, out / "model.safetensors")
    for name, part in exported.parts.items():
        _save(part.tensors, out / name / "model.safetensors")
        write_text(out / name / "config.json", json.dumps(part.config, indent=2))
    if exported.save is not None:
        exported.save(out)


def _named(channels: Sequence[str], names: Sequence[str]) -> str:
    """Return channels with what their archive calls them."""
    pairs = zip(channels, names or channels, strict=True)
    return ", ".join(name if name == shown else f"{name} ({shown} in the archive)" for name, shown in pairs)


def _card(facts: dict[str, Any], source: str, usage: str) -> str:
    card = files("common").joinpath("help", "export_card.txt").read_text(encoding="utf-8")
    return card.format(
        experiment=facts["experiment"],
        format=facts["format"],
        weights_file="model.safetensors",
        sha256=facts["sha256"],
        channels=_named(facts["channels"], facts["names"]) or "unknown",
        image_size=" x ".join(map(str, facts["encoder"]["init_args"]["image_size"])),
        preprocessing=json.dumps(facts["preprocessing"]),
        checkpoint=source,
        commit=facts["commit"] or "unknown",
        dirty=" (with local changes)" if facts["dirty"] else "",
        usage=usage.strip(),
    )


def run(exp: str, ckpt: str, format: str, out: str) -> None:
    """Carry out ``medmim export``: the encoder of a run, in a format of its experiment, into a folder."""
    print_line(f"exported to {export(exp, Path(ckpt), format, Path(out))}")
