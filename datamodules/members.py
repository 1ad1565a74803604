"""Names of the files that archives consist of: which of them are read, and why one is not."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from common.errors import DataError
from common.runtime.reporting import say
from datamodules.notes import note

NIFTI = (".nii.gz", ".nii")
#: Volumes, in any case.
VOLUMES = (*NIFTI, ".mha", ".mhd", ".nrrd", ".mgz")
#: Pictures, in any case; DICOM is known by its content too.
PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".dcm", ".dicom")
#: Volumes that are listed, so that they are a fault with a reason, and not read.
REFUSED = {
    ".img": "Analyze stores no orientation: convert it to NIfTI with the orientation you know",
    ".hdr": "Analyze stores no orientation: convert it to NIfTI with the orientation you know",
    ".nhdr": "a NRRD header with its voxels elsewhere is not read: save it as one .nrrd",
    ".mnc": "MINC is not read: convert it with mnc2nii",
    ".dcm.gz": "compressed DICOM is not read: gunzip it",
}
#: First bytes of what Git LFS leaves in place of a file, and the most that such a file holds.
_POINTER, _POINTER_BYTES = b"version https://git-lfs", 1024
#: Files that are looked at to find out whether an archive has content, and the share that may have none.
_SAMPLE, _MAX_EMPTY = 1000, 0.05


def suffix_of(path: Path) -> str:
    """Return the suffix of a volume in lower case, or an empty text."""
    name = path.name.lower()
    return next((suffix for suffix in (*VOLUMES, *REFUSED) if name.endswith(suffix)), "")


def is_member(name: str, suffixes: Sequence[str], folder: str | Path = "") -> bool:
    """Whether a name has one of the suffixes, in any case; what begins with a dot has not.

    Args:
        name: A file's name.
        suffixes: In lower case.
        folder: Where it lies, so that litter is counted once.
    """
    if not name.lower().endswith(tuple(suffixes)):
        return False
    if name.startswith("._"):
        note("litter of file systems was ignored (._*)", os.path.join(folder, name))
    return not name.startswith(".")


def members_of(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """List what lies in a folder under a name with one of the suffixes, by name.

    Links without content, folders and pipes with such a name are among them: they are faults, and must not vanish.
    """
    return sorted(path for path in folder.iterdir() if is_member(path.name, suffixes, folder))


def refusal_of(path: Path) -> str:
    """Say why a volume of some format is never read; empty where it is."""
    return REFUSED.get(suffix_of(path), "") if suffix_of(path) else f"none of {', '.join(VOLUMES)} ends its name"


def is_pointer(path: Path) -> bool:
    """Whether a file is what Git LFS leaves in place of one.

    Raises:
        OSError: the file cannot be opened.
    """
    if path.stat().st_size > _POINTER_BYTES:
        return False
    with path.open("rb") as file:
        return file.read(len(_POINTER)) == _POINTER


def why_missing(path: Path) -> str:
    """Say why there is no file of a name."""
    if path.is_symlink() and not path.exists():
        return "a link without content (git-annex, DataLad): run datalad get ."
    if path.is_dir():
        return "a folder with the name of a file"
    return "neither a file nor a folder, such as a pipe" if path.exists() else "the file is not there"


def check_content(paths: Iterable[Path], root: str | Path) -> None:
    """Refuse an archive of which more than 5 % are links without content or pointers of Git LFS; fewer are faults.

    Of more than 1,000 files, as many are looked at, spread over all.

    Args:
        paths: The files that are in use.
        root: The archive.

    Raises:
        DataError: with how many there are, and the command that fetches them.
    """
    listed = list(paths)
    looked_at = listed[:: max(1, -(-len(listed) // _SAMPLE))]
    links = sum(path.is_symlink() and not path.exists() for path in looked_at)
    pointers = sum(path.is_file() and is_pointer(path) for path in looked_at)
    for count, what, command in ((links, "links", "datalad get ."), (pointers, "Git LFS pointers", "git lfs pull")):
        sentence = f"{count} of {len(looked_at)} files are {what} without content: run {command} in {root}"
        if count > _MAX_EMPTY * len(looked_at):
            raise DataError(f"{sentence}.")
        if count:
            say(f"note: {sentence}")
