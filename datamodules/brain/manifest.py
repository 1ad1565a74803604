"""An archive of several sources described by one manifest: MONAI's JSON datalist, or BrainMVP's published lists.

``ROOT/datalist.json`` has the keys ``training``, ``validation`` and, if wanted, ``test``; an entry is
``{"study": "...", "source": "...", "patient": "...", "image": {"t1": "path", ...}, "label": "path"}`` with paths under
the root; ``label`` may be missing, and ``patient``, which then is what a public archive's name says, or else the study.
The published ``dataset_NAME.json`` list paths alone (``{"image": [path, ...], "label": path}``), whose names say the
sequences; NAME becomes the source.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import DataError
from common.modalities import canonical_name
from datamodules.brain.patients import patient_of
from datamodules.brain.sequences import split_name
from datamodules.volumes.cases import Case

NAME = "datalist.json"
_PUBLISHED = "dataset_*.json"
_SPLITS = {"training": "train", "validation": "val", "test": "test", "testing": "test"}


def find_manifest(root: Path) -> list[Case]:
    """List the studies of the manifests under a root; empty where there is none.

    Raises:
        DataError: a manifest is no such JSON, or names paths outside the root.
    """
    files = [root / NAME] if (root / NAME).is_file() else sorted(root.glob(_PUBLISHED))
    return [case for path in files for case in read_manifest(path, root)]


def read_manifest(path: Path, root: Path) -> list[Case]:
    """Read one manifest.

    Args:
        path: The JSON file.
        root: What its paths are relative to.

    Raises:
        DataError: it is no such JSON, or names paths outside the root.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("training"), list):
        raise DataError(f"{path} is no datalist: it needs the key training with a list of studies, and may have "
                        f"validation and test.")  # fmt: skip
    source = path.stem.removeprefix("dataset_")
    cases = []
    for key, split in _SPLITS.items():
        for number, entry in enumerate(content.get(key, [])):
            where = f"{path}, {key}[{number}]"
            if not isinstance(entry, dict) or not entry.get("image"):
                raise DataError(f'{where} needs "image": a mapping of sequence to path, or a list of paths.')
            cases.append(_case(entry, root, source, split, where))
    return cases


def _case(entry: Mapping[str, Any], root: Path, source: str, split: str, where: str) -> Case:
    listed = entry["image"]
    named = listed.items() if isinstance(listed, Mapping) else [(split_name(Path(name))[1], name) for name in listed]
    images: dict[str, Path] = {}
    for given, name in named:
        sequence = canonical_name(str(given))
        twin = next((path for other, path in images.items() if canonical_name(other) == sequence), None)
        if twin is not None:
            raise DataError(f"{where} lists {sequence} twice: {twin.name} and {Path(name).name}.")
        images[str(given)] = _inside(root, str(name), where)
    first = str(next(iter(dict(named).values())))
    source = str(entry.get("source") or source)
    study = str(entry.get("study") or Path(first).parent.name or split_name(Path(first))[0])
    label = entry.get("label")
    labels = {"seg": _inside(root, str(label), where)} if label else {}
    return Case(study, str(entry.get("patient") or patient_of(study)), images, labels, split, {"source": source})


def _inside(root: Path, name: str, where: str) -> Path:
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise DataError(f"{where} names {name}, which does not lie under {root}; paths are relative to it.")
    return root / name
