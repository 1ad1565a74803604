"""Locates the voxels of MetaImage and NRRD files and checks that there are as many as the header promises.

ITK reads as many bytes as it needs and ignores the rest; this module reads the text header itself and then to the end
of the file.
"""

import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple

from datamodules.limits import MAX_HEADER_BYTES
from datamodules.volumes.headers import VolumeError, check_end

#: Bytes read and decompressed at a time.
_PIECE = 2**20


class Stream(NamedTuple):
    """Where voxels lie.

    Attributes:
        path: File that holds them.
        offset: Offset of the first byte.
        compressed: Whether they are a stream of zlib or gzip.
        length: Length of that stream in bytes, if the header gives it.
    """

    path: Path
    offset: int
    compressed: bool
    length: int | None = None


def _fields(file: BinaryIO, separator: bytes, last: str) -> dict[str, str]:
    """Read the lines of a header, up to an empty one or the one with the field ``last``; names in lower case."""
    fields: dict[str, str] = {}
    while file.tell() < MAX_HEADER_BYTES:
        line = file.readline(2**16)
        name, found, value = line.partition(separator)
        if not line.strip() or not line.endswith(b"\n"):
            break
        if found:
            fields[name.decode("latin-1").strip().lower()] = value.decode("latin-1").strip()
        if name.strip().lower() == last.encode():
            break
    return fields


def _meta_stream(path: Path) -> Stream:
    with path.open("rb") as file:
        fields = _fields(file, b"=", "elementdatafile")
        offset = file.tell()
    place, skip = fields.get("elementdatafile", ""), fields.get("headersize", "")
    if fields.get("binarydata", "true").lower() not in ("true", "t", "1") or skip not in ("", "0"):
        raise VolumeError("unreadable", "MetaImage with text voxels or HeaderSize is not supported: save it as binary")
    compressed = fields.get("compresseddata", "").lower() in ("true", "t", "1")
    length = fields.get("compresseddatasize", "")
    known = int(length) if compressed and length.isdecimal() else None
    if place == "LOCAL":
        return Stream(path, offset, compressed, known)
    if not place or Path(place).name != place or place in ("LIST", "..") or "%" in place or " " in place:
        raise VolumeError("unreadable", f"its voxels must be in one file beside it, ElementDataFile is {place!r}")
    return Stream(path.with_name(place), 0, compressed, known)


def _nrrd_stream(path: Path) -> Stream:
    with path.open("rb") as file:
        fields = _fields(file, b":", "")
        offset = file.tell()
    encoding = fields.get("encoding", "").lower()
    skips = {name for name in ("data file", "datafile", "line skip", "byte skip") if fields.get(name, "0") != "0"}
    if encoding not in ("raw", "gzip", "gz") or skips:
        found = f"{', '.join(sorted(skips))}" if skips else f"encoding {encoding or 'unknown'}"
        raise VolumeError("unreadable", f"NRRD files with {found} are not supported: save it raw or gzip, in one file")
    return Stream(path, offset, encoding != "raw")


def find_stream(path: Path) -> Stream:
    """Find the voxels of a ``.mha``, ``.mhd`` or ``.nrrd``.

    Raises:
        VolumeError: ``unreadable`` if they lie elsewhere or in an unsupported form, ``missing`` if the file named in
            the header does not exist.
        OSError: the file cannot be opened.
    """
    stream = _nrrd_stream(path) if path.suffix.lower() == ".nrrd" else _meta_stream(path)
    if not stream.path.is_file():
        raise VolumeError("missing", f"the file {stream.path.name} that its header names is not there")
    return stream


def source_files(path: Path) -> list[Path]:
    """Return the files of a volume: its own, and that of its voxels if they are stored separately."""
    if path.suffix.lower() != ".mhd" or not path.is_file():
        return [path]
    try:
        return [path, _meta_stream(path).path]
    except (VolumeError, OSError):
        return [path]


def _inflated_bytes(file: BinaryIO, limit: int) -> int:
    """Count the bytes of a compressed stream, at most a few more than ``limit``, and verify its check sum."""
    member, count = zlib.decompressobj(wbits=47), 0
    try:
        while not member.eof and count <= limit and (rest := member.unconsumed_tail or file.read(_PIECE)):
            count += len(member.decompress(rest, _PIECE))
    except zlib.error as error:
        raise VolumeError("checksum", f"the compressed data are damaged ({error})") from error
    if not member.eof and count <= limit:
        raise VolumeError("unreadable", "the file ends early (truncated)")
    return count + len(member.unused_data) + len(file.read(1))


def check_stream(stream: Stream, promised: int) -> None:
    """Compare the stored voxels with what the header promises.

    Args:
        stream: Where they are stored.
        promised: Their size in bytes.

    Raises:
        VolumeError: ``unreadable`` if bytes are missing, ``size`` if some are left over, ``checksum``.
        OSError: the file cannot be opened.
    """
    size = stream.path.stat().st_size - stream.offset
    if not stream.compressed:
        check_end(promised, size)
        return
    if stream.length is not None:
        check_end(stream.length, size)
    with stream.path.open("rb") as file:
        file.seek(stream.offset)
        check_end(promised, _inflated_bytes(file, promised))
