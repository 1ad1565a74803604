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
from datamodules.brain.sequences import canonical_name, split_name
from datamodules.registry import Evidence, Listing, described
from datamodules.tree import Tree
from datamodules.volumes.cases import Case, patient_of

NAME = "datalist.json"
_PUBLISHED = "dataset_*.json"
_SPLITS = {"training": "train", "validation": "val", "test": "test", "testing": "test"}


def _manifests(tree: Tree) -> list[Path]:
    """Return the files that are manifests: of the published ones, those that list studies and describe nothing else."""
    if tree.is_file(NAME):
        return [tree / NAME]
    return [path for path in tree.glob(_PUBLISHED) if _lists_studies(described(tree, path.name, "training"))]


def _lists_studies(content: Mapping[str, Any] | None) -> bool:
    studies = (content or {}).get("training")
    listed = isinstance(studies, list) and all(isinstance(entry, dict) and "image" in entry for entry in studies)
    return listed and bool(studies) and "BIDSVersion" not in (content or {})


def find_manifest(tree: Tree) -> Listing:
    """List the studies of the manifests of a tree; none where there is no manifest.

    Raises:
        DataError: a manifest is no such JSON, or names paths outside the root.
    """
    files = _manifests(tree)
    return Listing([case for path in files for case in read_manifest(path, tree.root)], tables=[p.name for p in files])


def recognise_manifest(tree: Tree) -> Evidence:
    """Say whether a tree has a manifest."""
    files = _manifests(tree)
    return Evidence(3, files[0].name) if files else Evidence(0, missing=NAME)


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
        sequence = sequence or str(given).lower()
        if sequence in images:
            raise DataError(f"{where} lists {sequence} twice: {images[sequence].name} and {Path(name).name}.")
        images[sequence] = _inside(root, str(name), where)
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
