"""Plain images: any tree of images, and trees whose folders are classes.

Where a folder holds several images, only the user knows whose they are: splits are made by patient, so nothing is
assumed.
"""

import re
from collections.abc import Iterable, Sequence

from common.errors import DataError
from datamodules.registry import NO_SETTINGS, Evidence, Layout, Listing, Record, Settings, foreign_marker, shortened
from datamodules.subjects import Owner, needs_rule, owner_of
from datamodules.tree import Tree, TreeFile

#: Name of the target defined by class folders.
CLASS = "class"
_SPLITS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test",
    "testing": "test",
}  # fmt: skip
_MAX_CLASSES = 1000


def pictures(tree: Tree) -> list[TreeFile]:
    """Return the images of a tree, without the ``._`` files that macOS leaves behind."""
    return [file for file in tree.images if file.kind == "image"]


def natural_order(names: Iterable[str]) -> list[str]:
    """Return distinct names in natural order: 2 before 10."""

    def key(name: str) -> list[tuple[int, int, str]]:
        return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]

    return sorted(set(names), key=key)


def _owners(tree: Tree, files: Sequence[TreeFile], settings: Settings) -> list[Owner]:
    """Return the owner of each file: as the settings say, or its folder if every folder holds one file.

    Raises:
        DataError: a folder holds several files, and no setting says whose they are.
    """
    names = [file.name for file in files]
    if settings.subject is not None:
        return [owner_of(name, settings.subject) for name in names]
    if folder := needs_rule(names):
        count = len(tree.listed("" if folder == "." else folder))
        raise DataError(f"{shortened(str(tree), 80)} does not say whose its {len(names)} images are ({count} lie in "
                        f"{shortened(folder, 40)}): set subject: file, folder or {{regex: ...}}; medmim init DIR "
                        f"proposes one.")  # fmt: skip
    return [owner_of(name, "folder") for name in names]


def find_images(tree: Tree, settings: Settings = NO_SETTINGS) -> Listing:
    """List the images of a tree, at any depth.

    Args:
        tree: The tree.
        settings: ``subject`` says how to find an image's owner; see :func:`datamodules.subjects.owner_of`.

    Raises:
        DataError: a folder holds several images, and no setting says whose they are.
    """
    files = pictures(tree)
    owners = _owners(tree, files, settings)
    return Listing([
        Record(file.name, owner.subject, owner.session, images=((tree / file.name, owner.view),))
        for file, owner in zip(files, owners, strict=True)
    ])  # fmt: skip


def _classes(tree: Tree) -> dict[str, list[tuple[str, TreeFile]]]:
    """Return the images of each class folder with their splits; empty if the folders are not classes."""
    tops = tree.folders()
    splits = {name: _SPLITS[name.lower()] for name in tops if name.lower() in _SPLITS}
    bases = {f"{name}/": split for name, split in splits.items()} if splits and len(splits) == len(tops) else {"": ""}
    found: dict[str, list[tuple[str, TreeFile]]] = {}
    for base, split in bases.items():
        for name in tree.folders(base):
            files = [file for file in tree.under(f"{base}{name}") if file.kind == "image" and not file.hidden]
            found.setdefault(name, []).extend((split, file) for file in files)
    found = {name: files for name, files in found.items() if files}
    classes = 2 <= len(found) <= _MAX_CLASSES and all(len(files) > 1 for files in found.values())
    return found if classes else {}


def find_class_folders(tree: Tree, settings: Settings = NO_SETTINGS) -> Listing:
    """List the images of ``[train|val|test/]CLASS/...`` with their classes.

    Args:
        tree: The tree.
        settings: ``subject`` says how to find an image's owner; see :func:`datamodules.subjects.owner_of`.

    Raises:
        DataError: no setting says whose the images are.
    """
    found = _classes(tree)
    members = [(name, split, file) for name in natural_order(found) for split, file in found[name]]
    owners = _owners(tree, [file for _, _, file in members], settings)
    records = [
        Record(
            file.name,
            owner.subject,
            owner.session,
            images=((tree / file.name, owner.view),),
            targets={CLASS: name},
            split=split or None,
        )
        for (name, split, file), owner in zip(members, owners, strict=True)
    ]
    classes: dict[str, set[str]] = {}
    for record in records:
        classes.setdefault(record.patient_id, set()).add(record.targets[CLASS])
    several = sum(len(names) > 1 for names in classes.values())
    notes = [f"{several} of {len(classes)} subjects have images in several classes"] if several else []
    return Listing(records, notes=notes)


def _recognise_images(tree: Tree) -> Evidence:
    if marker := foreign_marker(tree):
        return Evidence(0, missing=f"{marker} says that it is another archive")
    count = len(pictures(tree))
    return Evidence(1, f"{count} images") if count else Evidence(0, missing="images such as .png or .jpg")


def _recognise_classes(tree: Tree) -> Evidence:
    if marker := foreign_marker(tree):
        return Evidence(0, missing=f"{marker} says that it is another archive")
    found = _classes(tree)
    if not found:
        return Evidence(0, missing="2 to 1,000 folders at one level with several images each")
    return Evidence(1, f"{len(found)} folders of classes, such as {natural_order(found)[0]}")


IMAGES = Layout(
    name="images",
    tree="ROOT/**/*.{png,jpg,tif,bmp,webp}, and subject: in archive.yaml where a folder holds several",
    find=find_images,
    evidence=_recognise_images,
    takes=("subject",),
    public=False,
    prefer=-3,
)
CLASS_FOLDERS = Layout(
    name="class_folders",
    tree="ROOT/[train|val|test/]CLASS/**/*.{png,jpg,...}, and subject: in archive.yaml",
    find=find_class_folders,
    evidence=_recognise_classes,
    takes=("subject",),
    public=False,
)
