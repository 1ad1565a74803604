"""Medical Decathlon and nnU-Net: ``dataset.json`` beside imagesTr, labelsTr, imagesTs and, if there, labelsTs.

A Medical Decathlon image is one file, 4-D where there are several modalities (medicaldecathlon.com). nnU-Net writes
``CASE_0000.nii.gz``, ``CASE_0001.nii.gz`` and so on, one file per channel (``documentation/dataset_format.md``); a list
of label values is a region (``region_based_training.md``).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib

from common.errors import DataError
from datamodules.account import UNLISTED
from datamodules.listed_files import path_under
from datamodules.registry import Evidence, Facts, FileRef, Layout, Listing, Record, described
from datamodules.tree import Tree, TreeFile, stem_of

_FILE = "dataset.json"
_TASK = re.compile(r"(Dataset\d{3}|Task\d{2,3})_.+")
_CHANNEL = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})")
#: Number of 4-D files whose headers are checked first, spread over the cases.
_LOOKED_AT = 8
#: Labels that do not define a region.
_BACKGROUND = "background"
_IGNORED = "ignore"


class _Place(NamedTuple):
    """A data set in a tree.

    Attributes:
        folder: Its folder under the root, ending in ``/``; empty: the root.
        content: Content of its ``dataset.json``.
    """

    folder: str
    content: dict[str, Any]


def _places(tree: Tree) -> list[_Place]:
    """Return the data sets of a tree: the one in its root, or those in folders such as ``Dataset004_Hippocampus``."""
    folders = ["", *(f"{name}/" for name in tree.folders() if _TASK.fullmatch(name))]
    found = [(folder, described(tree, f"{folder}{_FILE}")) for folder in folders if tree.is_dir(f"{folder}imagesTr")]
    return [_Place(folder, content) for folder, content in found if content is not None]


def _the_place(tree: Tree) -> _Place | None:
    """Return the one data set of a tree.

    Raises:
        DataError: there are several.
    """
    places = _places(tree)
    if len(places) > 1 and places[0].folder:
        names = ", ".join(place.folder.rstrip("/") for place in places[:4])
        raise DataError(f"{tree} holds {len(places)} data sets ({names}): give one of these folders as DATA=.")
    return places[0] if places else None


def _is_nnunet(tree: Tree, place: _Place) -> bool:
    """Whether images are named ``CASE_0000``: always if channels are named, else if the files are."""
    if "channel_names" in place.content:
        return True
    files = _images(tree, f"{place.folder}imagesTr")
    return bool(files) and all(_CHANNEL.fullmatch(file.stem) for file in files) and "modality" in place.content


def _images(tree: Tree, folder: str) -> list[TreeFile]:
    return [file for file in tree.listed(folder) if file.kind in ("volume", "image") and not file.hidden]


def _numbered(names: Any, where: Path) -> list[str]:
    """Return channel names in numeric order.

    Raises:
        DataError: they are not numbered from 0.
    """
    if not isinstance(names, Mapping) or sorted(names) != sorted(str(number) for number in range(len(names))):
        raise DataError(f'{where} must number its channels from 0, such as {{"0": "T1"}}; it has {str(names)[:80]}.')
    return [str(names[str(number)]) for number in range(len(names))]


def read_labels(labels: Any, where: Path) -> tuple[dict[str, tuple[int, ...]], frozenset[int]]:
    """Return the meaning of label values, given in either form, and all values that may occur.

    Args:
        labels: ``{value: name}`` as Medical Decathlon and nnU-Net 1 write it, or ``{name: value or values}``.
        where: The file, for error messages.

    Raises:
        DataError: the labels have neither form, or one must be ignored in the loss.
    """
    if not isinstance(labels, Mapping) or not labels:
        raise DataError(f'{where} needs labels, such as {{"0": "background", "1": "lesion"}}.')
    by_value = all(str(key).isdigit() for key in labels)
    pairs = [(str(name), value) for value, name in labels.items()] if by_value else list(labels.items())
    regions: dict[str, tuple[int, ...]] = {}
    for name, value in pairs:
        values = value if isinstance(value, list) else [value]
        if not values or not all(str(number).isdigit() for number in values):
            raise DataError(f"{where} gives the label {name} the value {str(value)[:40]!r}, not a whole number.")
        if name.lower() == _IGNORED:
            raise DataError(f"{where} has the label ignore, which the loss here cannot ignore: set "
                            f"those voxels to a label, or drop these cases.")  # fmt: skip
        regions[name] = tuple(int(number) for number in values)
    known = frozenset({0, *(number for values in regions.values() for number in values)})
    kept = {name: values for name, values in regions.items() if name.lower() != _BACKGROUND and set(values) != {0}}
    return kept, known


class _Listed(NamedTuple):
    """One case of a list in ``dataset.json``: names of its image and label, and its split."""

    image: str
    label: str | None
    split: str


def _listed(place: _Place, where: Path) -> Iterator[_Listed]:
    """Yield the cases that ``dataset.json`` lists.

    Raises:
        DataError: an entry has no image.
    """
    for key, split in (("training", "train"), ("test", "test")):
        for entry in place.content.get(key) or []:
            image = entry.get("image") if isinstance(entry, dict) else entry
            label = entry.get("label") if isinstance(entry, dict) else None
            if not isinstance(image, str) or not isinstance(label, str | None):
                raise DataError(f"{where}: every entry of {key} needs an image, and may have a label.")
            yield _Listed(image.removeprefix("./"), label and label.removeprefix("./"), split)


def _check_count(names: Sequence[str], cases: Sequence[tuple[str, Path]], where: Path) -> None:
    """Check a few headers: each image must hold one volume per modality.

    Raises:
        DataError: the first image that does not.
    """
    step = max(len(cases) // _LOOKED_AT, 1)
    for case, path in cases[::step][:_LOOKED_AT]:
        if not path.is_file():
            continue
        try:
            shape = nib.load(path).shape  # type: ignore[attr-defined]
        except Exception:  # its reader reports faults of a file, case by case
            continue
        count = shape[3] if len(shape) > 3 else 1
        if count != len(names):
            raise DataError(f"{case} holds {count} volumes, {where} names {len(names)} modalities "
                            f"({', '.join(names)}): correct one of them.")  # fmt: skip


def find_msd(tree: Tree) -> Listing:
    """List the cases of Medical Decathlon: imagesTr is split by case, imagesTs is for testing.

    Raises:
        DataError: several data sets, a damaged list, or images whose number of volumes is not the number of modalities.
    """
    place = _the_place(tree)
    if place is None:
        return Listing([])
    folder, where = place.folder, tree / f"{place.folder}{_FILE}"
    names = _numbered(place.content.get("modality"), where)
    regions, values = read_labels(place.content.get("labels"), where)
    records, images = [], []
    for entry in _listed(place, where):
        image = path_under(tree.root, f"{folder}{entry.image}", where)
        case = stem_of(entry.image)
        label = entry.label or f"labelsTs/{entry.image.rpartition('/')[2]}"
        mask = path_under(tree.root, f"{folder}{label}", where)
        masks = {"label": FileRef(mask)} if entry.label or tree.is_file(mask) else {}
        places = range(len(names)) if len(names) > 1 else [None]
        volumes = {name: FileRef(image, number) for name, number in zip(names, places, strict=True)}
        records.append(Record(case, case, volumes=volumes, masks=masks, split=entry.split))
        images.append((case, image))
    _check_count(names, images, where)
    facts = Facts(tuple(names), regions, values, cut_validation=True)
    return Listing(records, facts, _unlisted(tree, folder, records), [f"{folder}{_FILE}"])


def _unlisted(tree: Tree, folder: str, records: Sequence[Record]) -> dict[str, list[str]]:
    """Return the files in the data set's folders that belong to no case."""
    used = {tree.name_of(path) for record in records for _, path in record.files()}
    files = [file.name for part in ("imagesTr", "labelsTr", "imagesTs", "labelsTs")
             for file in _images(tree, f"{folder}{part}")]  # fmt: skip
    return {UNLISTED: [name for name in files if name not in used]}


def find_nnunet(tree: Tree) -> Listing:
    """List the cases of nnU-Net: volumes by channel, or 2D images with masks.

    Raises:
        DataError: several data sets, or a ``dataset.json`` without numbered channels or named labels.
    """
    place = _the_place(tree)
    if place is None:
        return Listing([])
    folder, where = place.folder, tree / f"{place.folder}{_FILE}"
    names = _numbered(place.content.get("channel_names") or place.content.get("modality"), where)
    regions, values = read_labels(place.content.get("labels"), where)
    records: list[Record] = []
    for part, split in (("Tr", "train"), ("Ts", "test")):
        channels: dict[str, dict[int, TreeFile]] = {}
        for file in _images(tree, f"{folder}images{part}"):
            if match := _CHANNEL.fullmatch(file.stem):
                channels.setdefault(match["case"], {})[int(match["channel"])] = file
        labels = {file.stem: file for file in _images(tree, f"{folder}labels{part}")}
        records += [_case(tree, case, files, labels.get(case), names, split) for case, files in channels.items()]
    facts = Facts(tuple(names), regions, values, cut_validation=True)
    return Listing(records, facts, _unlisted(tree, folder, records), [f"{folder}{_FILE}"])


def _case(
    tree: Tree, case: str, files: Mapping[int, TreeFile], label: TreeFile | None, names: Sequence[str], split: str
) -> Record:
    """Build a case from its channels.

    Raises:
        DataError: it has a channel without a name.
    """
    if strange := [number for number in files if number >= len(names)]:
        raise DataError(f"{files[strange[0]].name} is of channel {strange[0]}, and {_FILE} names {len(names)}: "
                        f"{', '.join(names)}.")  # fmt: skip
    masks = {"label": FileRef(tree / label.name)} if label is not None else {}
    first = next(iter(files.values()))
    if first.kind == "image":
        images = tuple((tree / file.name, "") for file in files.values())
        return Record(case, case, images=images, masks=masks, split=split)
    volumes = {names[number]: FileRef(tree / file.name) for number, file in sorted(files.items())}
    return Record(case, case, volumes=volumes, masks=masks, split=split)


def _recognised(tree: Tree, nnunet: bool) -> Evidence:
    missing = f"{_FILE} with {'channel_names' if nnunet else 'modality and training'} beside imagesTr"
    places = _places(tree)
    if not places:
        near = 0.5 if tree.is_dir("imagesTr") or tree.is_file(_FILE) else 0.0
        return Evidence(0, missing=missing, near=near)
    place = places[0]
    if _is_nnunet(tree, place) != nnunet or not (nnunet or "modality" in place.content):
        return Evidence(0, missing=missing, near=0.6)
    return Evidence(3, f"{place.folder}{_FILE} beside imagesTr")


def _recognise_msd(tree: Tree) -> Evidence:
    return _recognised(tree, nnunet=False)


def _recognise_nnunet(tree: Tree) -> Evidence:
    return _recognised(tree, nnunet=True)


MSD = Layout(
    name="msd",
    tree="ROOT/{dataset.json, imagesTr/CASE.nii.gz, labelsTr/CASE.nii.gz, imagesTs/CASE.nii.gz}",
    find=find_msd,
    evidence=_recognise_msd,
    public=False,
)
NNUNET = Layout(
    name="nnunet",
    tree="ROOT/{dataset.json, imagesTr/CASE_0000.nii.gz, labelsTr/CASE.nii.gz, imagesTs/CASE_0000.nii.gz}",
    find=find_nnunet,
    evidence=_recognise_nnunet,
    public=False,
)
