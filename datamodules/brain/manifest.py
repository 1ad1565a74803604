"""An archive of several sources described by one manifest: MONAI's JSON datalist, or BrainMVP's published lists.

``ROOT/datalist.json`` has the keys ``training``, ``validation`` and, if wanted, ``test``; an entry is
``{"study": "...", "source": "...", "patient": "...", "image": {"t1": "path", ...}, "label": "path"}`` with paths under
the root; ``label`` may be missing, and so may ``patient``, which is then taken from the name, if public, or
else is the study.
The published ``dataset_NAME.json`` list paths alone (``{"image": [path, ...], "label": path}``), whose names give the
sequences; NAME becomes the source.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import DataError
from common.modalities import canonical_name
from common.pseudonyms import public_name
from datamodules.brain.sequences import split_name
from datamodules.files import read_json, short
from datamodules.ids import check_subjects
from datamodules.listed_files import path_under
from datamodules.registry import Evidence, Listing, described
from datamodules.tree import Tree
from datamodules.volumes.cases import Case, patient_of

NAME = "datalist.json"
_PUBLISHED = "dataset_*.json"
_SPLITS = {"training": "train", "validation": "val", "test": "test", "testing": "test"}


def _manifests(tree: Tree) -> list[Path]:
    """Return the manifest files; of the published ones only those that list studies and nothing else."""
    if tree.is_file(NAME):
        return [tree / NAME]
    return [path for path in tree.glob(_PUBLISHED) if _lists_studies(described(tree, path.name, "training"))]


def _lists_studies(content: Mapping[str, Any] | None) -> bool:
    studies = (content or {}).get("training")
    listed = isinstance(studies, list) and all(isinstance(entry, dict) and "image" in entry for entry in studies)
    return listed and bool(studies) and "BIDSVersion" not in (content or {})


def find_manifest(tree: Tree) -> Listing:
    """List the studies of the manifests of a tree; empty without a manifest.

    Raises:
        DataError: a manifest has another form, or names paths outside the root.
    """
    files = _manifests(tree)
    return Listing([case for path in files for case in read_manifest(path, tree.root)], tables=[p.name for p in files])


def recognise_manifest(tree: Tree) -> Evidence:
    """Return the evidence that a tree has a manifest."""
    files = _manifests(tree)
    return Evidence(3, files[0].name) if files else Evidence(0, missing=NAME)


def read_manifest(path: Path, root: Path) -> list[Case]:
    """Read one manifest.

    Args:
        path: The JSON file.
        root: What its paths are relative to.

    Raises:
        DataError: it has another form, or names paths outside the root.
    """
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("training"), list):
        raise DataError(f"{path} is no datalist: it needs the key training with a list of studies, and may have "
                        f"validation and test.")  # fmt: skip
    source = path.stem.removeprefix("dataset_")
    cases = []
    for key, split in _SPLITS.items():
        entries = content.get(key, [])
        if not isinstance(entries, list):
            raise DataError(f"{path}: {key} must be a list of studies.")
        for number, entry in enumerate(entries):
            where = f"{path}, {key}[{number}]"
            cases.append(_case(entry, _listed_images(entry, where), root, source, split, where))
    check_subjects(path, [case.patient_id for case in cases])
    return cases


def _listed_images(entry: Any, where: str) -> list[tuple[str, str]]:
    """Return the names of a study's sequences with their paths.

    Raises:
        DataError: the entry is not a study, or its images are neither a mapping nor a list of paths.
    """
    listed = entry.get("image") if isinstance(entry, dict) else None
    if isinstance(listed, dict):
        named = list(listed.items())
    elif isinstance(listed, list) and all(isinstance(name, str) for name in listed):
        named = [(split_name(Path(name))[1], name) for name in listed]
    else:
        named = []
    if not named or not all(isinstance(name, str) and name for _, name in named):
        raise DataError(f'{where} needs "image": a mapping of sequence to path, or a list of paths.')
    for name in ("study", "patient", "source", "label"):
        if not isinstance(entry.get(name), str | None):
            raise DataError(f"{where}: {name} must be one text, and is {short(str(entry[name]))!r}.")
    return named


def _case(
    entry: Mapping[str, Any], named: Sequence[tuple[str, str]], root: Path, source: str, split: str, where: str
) -> Case:
    images: dict[str, Path] = {}
    for given, name in named:
        sequence = canonical_name(given)
        twin = next((path for other, path in images.items() if canonical_name(other) == sequence), None)
        if twin is not None:
            raise DataError(f"{where} lists {sequence} twice: {public_name(twin.name)} and "
                            f"{public_name(Path(name).name)}.")  # fmt: skip
        images[given] = path_under(root, name, where)
    first = named[0][1]
    study = entry.get("study") or Path(first).parent.name or split_name(Path(first))[0]
    label = entry.get("label")
    labels = {"seg": path_under(root, label, where)} if label else {}
    facts = {"source": entry.get("source") or source}
    return Case(study, entry.get("patient") or patient_of(study), images, labels, split, facts)
