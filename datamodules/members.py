"""File names in archives: which formats are read, and why others are not."""

from pathlib import Path

NIFTI = (".nii.gz", ".nii")
#: Volumes, in any case.
VOLUMES = (*NIFTI, ".mha", ".mhd", ".nrrd", ".mgz")
#: Images, in any case; DICOM is also recognised by content.
PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".dcm", ".dicom")
#: Formats of volumes that are listed as faults with a reason, but not read.
REFUSED = {
    ".img": "Analyze stores no orientation: convert it to NIfTI with the orientation you know",
    ".hdr": "Analyze stores no orientation: convert it to NIfTI with the orientation you know",
    ".img.gz": "Analyze stores no orientation: convert it to NIfTI with the orientation you know",
    ".hdr.gz": "Analyze stores no orientation: convert it to NIfTI with the orientation you know",
    ".nhdr": "a NRRD header with its voxels elsewhere is not read: save it as one .nrrd",
    ".mnc": "MINC is not read: convert it with mnc2nii",
    ".dcm.gz": "compressed DICOM is not read: gunzip it",
}
#: First bytes of a Git LFS pointer, and the largest size of such a file.
_POINTER, _POINTER_BYTES = b"version https://git-lfs", 1024


def suffix_of(path: Path) -> str:
    """Return the suffix of a volume in lower case, or an empty text."""
    name = path.name.lower()
    return next((suffix for suffix in (*VOLUMES, *REFUSED) if name.endswith(suffix)), "")


def refusal_of(path: Path) -> str:
    """Return why a volume's format is not supported; empty if it is."""
    return REFUSED.get(suffix_of(path), "") if suffix_of(path) else f"none of {', '.join(VOLUMES)} ends its name"


def is_pointer(path: Path) -> bool:
    """Whether a file is a Git LFS pointer.

    Raises:
        OSError: the file cannot be opened.
    """
    if path.stat().st_size > _POINTER_BYTES:
        return False
    with path.open("rb") as file:
        return file.read(len(_POINTER)) == _POINTER


def why_missing(path: Path) -> str:
    """Return why a file is missing."""
    if path.is_symlink() and not path.exists():
        return "a link without content (git-annex, DataLad): run datalad get ."
    if path.is_dir():
        return "a folder with the name of a file"
    return "neither a file nor a folder, such as a pipe" if path.exists() else "the file is not there"
