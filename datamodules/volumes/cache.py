"""A cache of prepared cases: memory-mapped float16, made once, resumable, check-summed.

One folder per case under ``<cache>/volumes/<key>/cases/``: ``image.npy`` (or ``image.b2nd``), ``label.npy``, and
``record.json``, which is written last and names every file with size and xxh3. A case without a valid record does not
exist; one whose files differ from the record is rebuilt. Folders are written under a temporary name and renamed, so an
interrupted run leaves nothing half made.
"""

import errno
import json
import math
import os
import uuid
from collections.abc import Callable, Container, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import blosc2
import numpy as np
import pyarrow
from numpy.typing import NDArray
from pyarrow import parquet
from tqdm import tqdm

from common.errors import StorageError
from common.faults import Fault, SampleFaultError
from common.files import (
    make_folder,
    move,
    remove_leftovers,
    remove_tree,
    storage_errors,
    temporary_beside,
    whole_file,
    write_text,
)
from common.names import safe_name
from common.randomness import stable_hash
from datamodules.checking import CacheCheck, CachedFile, Checked, check_files
from datamodules.storage import cache_root, file_is_good, fingerprint, save_array, sole_builder, source_facts
from datamodules.tree import Tree
from datamodules.volumes.cases import Case, Layout
from datamodules.volumes.headers import VolumeError
from datamodules.volumes.itk_streams import source_files
from datamodules.volumes.prepare import PreparedCase, prepare_case
from datamodules.volumes.reading import DECODERS, read_header

#: One row per valid case: when its folder was last changed, and its record as JSON.
MANIFEST = "manifest.parquet"
_COLUMNS = ("mtime_ns", "record")
CacheFormat = Literal["npy", "b2nd"]
VERSION = 5
#: What a rename says where something lies already: a folder that is not empty, or a file.
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)
#: Labelled voxels kept per region value, for crops that must contain some.
MAX_LABEL_VOXELS = 2048


@dataclass
class Record:
    """What is known of a prepared case.

    Attributes:
        case_id: The case.
        usable: Whether there is an image.
        modality_mask: Per modality, whether it was acquired and readable.
        shape: Space of the stored image.
        affine: Its affine, RAS.
        source_shape: Space of the reference volume (RAS) before cropping or resampling.
        source_affine: Its affine.
        file_affine: Its affine as the file has it, before its axes were turned to RAS.
        offset: First stored voxel in the reference volume; None where it was resampled.
        faults: Broken image members: path, kind, detail.
        label_faults: What is wrong with the label, likewise.
        sources: Path to size, modification time and check sum of each source file.
        files: Name to size and check sum of each cache file.
        label_values: Labelled voxels by value.
        modalities: Names of the image's modalities, in order.
        members: Modality or label to the file it was read from, with its place in a 4-D one.
    """

    case_id: str
    usable: bool
    modality_mask: list[bool] = field(default_factory=list)
    shape: list[int] = field(default_factory=list)
    affine: list[list[float]] = field(default_factory=list)
    source_shape: list[int] = field(default_factory=list)
    source_affine: list[list[float]] = field(default_factory=list)
    file_affine: list[list[float]] = field(default_factory=list)
    offset: list[int] | None = None
    faults: list[tuple[str, str, str]] = field(default_factory=list)
    label_faults: list[tuple[str, str, str]] = field(default_factory=list)
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    label_values: dict[str, int] = field(default_factory=dict)
    modalities: list[str] = field(default_factory=list)
    members: dict[str, str] = field(default_factory=dict)

    @property
    def spacing(self) -> list[float]:
        """Sides of a stored voxel in mm."""
        return _sides(self.affine)

    @property
    def source_diagonal(self) -> float:
        """Diagonal of the reference volume, as its file has it, in mm."""
        return math.hypot(
            *(side * size for side, size in zip(_sides(self.source_affine), self.source_shape, strict=True))
        )

    def image_faults(self) -> list[Fault]:
        """Return the faults of the image members."""
        return [Fault(*fault, self.case_id) for fault in self.faults]

    def all_faults(self) -> list[Fault]:
        """Return the faults of image and label."""
        return [Fault(*fault, self.case_id) for fault in [*self.faults, *self.label_faults]]


class _Kept(NamedTuple):
    """A row of the manifest."""

    mtime_ns: int
    record: Record


def _sides(affine: Sequence[Sequence[float]]) -> list[float]:
    """Return the sides of a voxel in mm."""
    return np.linalg.norm(np.asarray(affine)[:3, :3], axis=0).tolist()


def _written(file: dict[str, Any]) -> tuple[int, str]:
    return file["size"], file["xxh3"]


def _facts_of(source: dict[str, Any]) -> dict[str, Any]:
    return {name: source.get(name) for name in ("size", "mtime_ns")}


def _plain(faults: Iterable[Fault]) -> list[tuple[str, str, str]]:
    return [(fault.path, fault.kind, fault.detail) for fault in faults]


def record_of(prepared: PreparedCase, case: Case) -> Record:
    """Describe a prepared case, without cache files."""
    label = np.zeros(0, np.uint8) if prepared.label is None else prepared.label
    values, counts = np.unique(label, return_counts=True)
    return Record(
        case_id=case.case_id,
        usable=True,
        modality_mask=prepared.modality_mask,
        shape=list(prepared.image.shape[1:]),
        affine=prepared.affine.tolist(),
        source_shape=list(prepared.source_shape),
        source_affine=prepared.source_affine.tolist(),
        file_affine=prepared.file_affine.tolist(),
        offset=None if prepared.offset is None else list(prepared.offset),
        faults=_plain(prepared.faults),
        label_faults=_plain(prepared.label_faults),
        sources=prepared.sources,
        label_values={str(int(v)): int(c) for v, c in zip(values, counts, strict=True) if v},
        modalities=list(prepared.modalities),
    )


def _label_voxels(label: NDArray[np.uint8], case_id: str) -> NDArray[np.int16]:
    """Return a fixed sample of labelled voxels, ``(K, 4)``: value and coordinates."""
    parts = []
    for value in np.unique(label[label > 0]):
        voxels = np.argwhere(label == value)
        chosen = np.random.default_rng(stable_hash("voxels", case_id, int(value))).permutation(len(voxels))
        voxels = voxels[np.sort(chosen[:MAX_LABEL_VOXELS])]
        parts.append(np.column_stack([np.full(len(voxels), value), voxels]))
    return np.concatenate(parts).astype(np.int16) if parts else np.zeros((0, 4), dtype=np.int16)


class OpenCase(NamedTuple):
    """A case ready to be cropped.

    Attributes:
        record: What is known of it.
        image: ``(M, X, Y, Z)``, anything that slices like an array.
        label: ``(X, Y, Z)`` likewise, or None.
        label_voxels: A sample of labelled voxels, ``(K, 4)``: value and coordinates; None without a label.
    """

    record: Record
    image: Any
    label: Any
    label_voxels: NDArray[np.int16] | None


class SourceVolumes:
    """The cases of an archive without a cache: every access reads and prepares the sources anew.

    Args:
        layout: The layout, with settled modalities.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def ensure(
        self, cases: Sequence[Case], workers: int = 1, progress: bool = True, check: CacheCheck = "sampled"
    ) -> dict[str, Record]:
        """Return a record per case without looking at any; what is broken shows when it is read."""
        return {case.case_id: Record(case.case_id, usable=True) for case in cases}

    def open(self, case: Case) -> OpenCase:
        """Read and prepare a case.

        Raises:
            SampleFaultError: nothing of it can be used.
        """
        prepared = prepare_case(case, self.layout, self.layout.modalities)
        voxels = None if prepared.label is None else _label_voxels(prepared.label, case.case_id)
        return OpenCase(record_of(prepared, case), prepared.image, prepared.label, voxels)


class VolumeCache:
    """The prepared cases of one archive under one set of settings.

    Args:
        root: The archive.
        layout: Its layout, with settled modalities.
        format: ``"npy"`` is fast; ``"b2nd"`` (blosc2) is a fraction of the size and slower to cut crops from.
        folder: Where caches live; None means :func:`cache_root`.
        twins: Cases whose names differ in nothing but case; see :func:`common.names.case_twins`.
        tree: The archive's files as they were listed, which saves asking for each of them; None asks.
    """

    def __init__(
        self,
        root: str | Path,
        layout: Layout,
        format: CacheFormat = "npy",
        folder: Path | None = None,
        twins: Container[str] = (),
        tree: Tree | None = None,
    ) -> None:
        if format not in ("npy", "b2nd"):
            raise ValueError(f"The cache format must be 'npy' or 'b2nd', got {format!r}.")
        self.layout = layout
        self.format = format
        self.twins = twins
        key = {
            "version": VERSION,
            "root": str(Path(root).expanduser().resolve()),
            "layout": layout.name,
            "modalities": layout.modalities,
            "preprocessing": layout.preprocessing.as_dict(),
            "label_values": sorted(layout.label_values),
            "decoders": DECODERS,
            "format": format,
        }
        text = json.dumps(key, sort_keys=True)
        self.folder = (folder or cache_root()) / "volumes" / f"{layout.name}-{stable_hash(text):016x}"
        self._key = text
        self._tree = tree
        self._kept: dict[str, _Kept] | None = None
        #: What :meth:`ensure` has read of the cache.
        self.checked = Checked(0, [], 0, frozenset())

    def case_folder(self, case_id: str) -> Path:
        """Return where a case's files lie."""
        return self.folder / "cases" / safe_name(case_id, self.twins)

    def read_record(self, case_id: str) -> Record | None:
        """Return the record of a case, or None where there is none."""
        try:
            record = Record(**json.loads((self.case_folder(case_id) / "record.json").read_text()))
        except (OSError, ValueError, TypeError):
            return None
        return record if record.case_id == case_id else None

    def known_record(self, case_id: str) -> Record | None:
        """Return the record of a case from the manifest, else from its folder; None where there is none."""
        kept = self._manifest().get(case_id)
        return self.read_record(case_id) if kept is None else kept.record

    def _manifest(self) -> dict[str, "_Kept"]:
        """Return what the manifest says of every case, read once; nothing where there is none that can be read."""
        if self._kept is None:
            self._kept = {}
            with suppress(OSError, ValueError, TypeError, KeyError):  # pyarrow's errors are of these kinds
                columns = parquet.read_table(self.folder / MANIFEST).to_pydict()
                rows = zip(*(columns[name] for name in _COLUMNS), strict=True)
                entries = [_Kept(mtime, Record(**json.loads(text))) for mtime, text in rows]
                self._kept = {entry.record.case_id: entry for entry in entries}
        return self._kept

    def _write_manifest(self, records: dict[str, Record]) -> None:
        """Keep the records of valid cases, beside those of others, for the next start."""
        changed = {name: record for name, record in records.items() if self._stamp(name) != self._mtime(name)}
        if not changed:
            return
        kept = self._manifest()
        kept |= {name: _Kept(mtime, record) for name, record in changed.items() if (mtime := self._stamp(name))}
        rows = [(entry.mtime_ns, json.dumps(asdict(entry.record))) for entry in kept.values()]
        table = pyarrow.table(dict(zip(_COLUMNS, map(list, zip(*rows, strict=True)), strict=True)))
        with suppress(StorageError), whole_file(self.folder / MANIFEST, self.folder) as temporary:
            parquet.write_table(table, temporary, compression="zstd")

    def _mtime(self, case_id: str) -> int | None:
        kept = self._manifest().get(case_id)
        return None if kept is None else kept.mtime_ns

    def _stamp(self, case_id: str) -> int:
        """Return when files were last put into, or taken out of, a case's folder; 0 where there is none."""
        try:
            return self.case_folder(case_id).stat().st_mtime_ns
        except OSError:
            return 0

    def _is_as_kept(self, case: Case, kept: "_Kept") -> bool:
        """Whether a case's folder and sources are as the manifest says; with a tree, one look at the folder."""
        record = kept.record
        faults = (*record.faults, *record.label_faults)
        return (
            self._members(case) == record.members
            and not any("cannot be opened" in detail for _, _, detail in faults)
            and self._stamp(case.case_id) == kept.mtime_ns
            and all(self._facts(path) == _facts_of(source) for path, source in record.sources.items())
        )

    def _facts(self, path: str) -> dict[str, int] | None:
        """Return size and modification time of a source, as it was listed; None where it is not there."""
        listed = None if self._tree is None else self._tree.get(path)
        if listed is not None and listed.mtime_ns:
            return {"size": listed.size, "mtime_ns": listed.mtime_ns}
        return source_facts(Path(path)) if os.path.isfile(path) else None

    def is_valid(self, case: Case, record: Record, full: bool = True) -> bool:
        """Whether a record still fits its sources and its files.

        Args:
            case: The case as the archive has it now.
            record: What was stored.
            full: Whether to compare check sums of the cache files, not only their sizes.
        """
        if any("cannot be opened" in detail for _, _, detail in (*record.faults, *record.label_faults)):
            return False  # a mount or a permission, which may have come back without a trace in the file
        if self._members(case) != record.members or {str(path) for path in self._sources(case)} != set(record.sources):
            return False
        for path, source in record.sources.items():
            if not os.path.isfile(path) or source_facts(Path(path)) != _facts_of(source):
                return False
        folder = self.case_folder(record.case_id)
        return all(file_is_good(folder / name, *_written(file), full) for name, file in record.files.items())

    def _members(self, case: Case) -> dict[str, str]:
        """Return what a case is read from; two files that changed their roles make another case."""
        images = {name: path for name, path in case.images.items() if name in self.layout.modalities}
        files = {name: f"{path}[{case.places[name]}]" if name in case.places else str(path)
                 for name, path in images.items()}  # fmt: skip
        return files | {f"label {name}": str(path) for name, path in case.labels.items()}

    def _image_paths(self, case: Case) -> list[Path]:
        return [path for name, path in case.images.items() if name in self.layout.modalities]

    def _sources(self, case: Case) -> list[Path]:
        members = (*self._image_paths(case), *case.labels.values())
        return [path for member in members for path in source_files(member)]

    def build(self, case: Case) -> Record:
        """Prepare one case and store it, whole or not at all.

        Where another process was faster, and what it stored is good, that is kept.

        Raises:
            StorageError: the cache cannot be written.
        """
        final = self.case_folder(case.case_id)
        prepared, record = self._prepare(case)
        temporary = temporary_beside(self.folder / "tmp" / "case")
        make_folder(final.parent)
        make_folder(temporary)
        with storage_errors(final):
            try:
                if prepared is not None:
                    self._write_arrays(prepared, case, temporary)
                    record.files = {path.name: fingerprint(path) for path in sorted(temporary.iterdir())}
                (temporary / "record.json").write_text(json.dumps(asdict(record), indent=1))
                return self._publish(temporary, final, case, record)
            finally:
                remove_tree(temporary, self.folder)

    def _publish(self, temporary: Path, final: Path, case: Case, record: Record) -> Record:
        """Rename a finished case into its place, unless a good one is there."""
        while True:
            try:
                move(temporary, final, self.folder)
                return record
            except OSError as error:
                if error.errno not in _TAKEN:
                    raise
            found = self.read_record(case.case_id)
            if found is not None and self.is_valid(case, found):
                return found
            aside = self.folder / "tmp" / uuid.uuid4().hex
            with suppress(FileNotFoundError):  # another process moves it too
                move(final, aside, self.folder)
            remove_tree(aside, self.folder)

    def _write_arrays(self, prepared: PreparedCase, case: Case, folder: Path) -> None:
        self._write_array(folder / f"image.{self.format}", prepared.image.astype(np.float16))
        if prepared.label is not None:
            self._write_array(folder / f"label.{self.format}", prepared.label)
            save_array(folder / "label_voxels.npy", _label_voxels(prepared.label, case.case_id))

    def _prepare(self, case: Case) -> tuple[PreparedCase | None, Record]:
        """Prepare a case, None where nothing of it can be used, and describe it but for its cache files."""
        prepared = None
        try:
            prepared = prepare_case(case, self.layout, self.layout.modalities)
            record = record_of(prepared, case)
        except SampleFaultError as error:
            record = Record(case.case_id, usable=False, faults=_plain(error.faults))
        record.members = self._members(case)
        for path in self._sources(case):
            source = record.sources.setdefault(str(path), {})
            if path.is_file():
                source.update(source_facts(path))
        return prepared, record

    def _write_array(self, path: Path, array: NDArray) -> None:
        if self.format == "npy":
            save_array(path, array)
            return
        edge = (1,) if array.ndim == 4 else ()
        chunks = (*edge, *(min(64, size) for size in array.shape[-3:]))
        blocks = (*edge, *(min(32, size) for size in array.shape[-3:]))
        packed = blosc2.asarray(
            np.ascontiguousarray(array),
            chunks=chunks,
            blocks=blocks,
            # Inflates three times as fast as Zstandard and is a fifth larger.
            cparams={"codec": blosc2.Codec.LZ4HC, "clevel": 9},
        )
        path.write_bytes(packed.to_cframe())  # blosc2's own writing does not say that a disk is full

    def open_array(self, case_id: str, name: str) -> Any:
        """Open ``image`` or ``label`` for slicing: a slice reads its own voxels only.

        Raises:
            OSError: the cache file is gone.
        """
        path = self.case_folder(case_id) / f"{name}.{self.format}"
        if self.format == "npy":
            return np.load(path, mmap_mode="c")  # private: nothing that is written to it reaches the file
        if not path.is_file():
            raise FileNotFoundError(path)
        return blosc2.open(str(path), mode="r", mmap_mode="r")

    def open(self, case: Case) -> OpenCase:
        """Open a case for cropping; one whose files have gone is built again.

        Raises:
            SampleFaultError: the case has no usable image.
        """
        record = self.read_record(case.case_id)
        try:
            if record is None:
                raise FileNotFoundError(self.case_folder(case.case_id))
            return self._open(record)
        except (
            OSError,
            ValueError,
            EOFError,
            RuntimeError,
        ):  # gone, or cut short
            return self._open(self.build(case))

    def _open(self, record: Record) -> OpenCase:
        if not record.usable:
            raise SampleFaultError(record.image_faults())
        image = self.open_array(record.case_id, "image")
        if f"label.{self.format}" not in record.files:
            return OpenCase(record, image, None, None)
        voxels = np.load(self.case_folder(record.case_id) / "label_voxels.npy")
        return OpenCase(record, image, self.open_array(record.case_id, "label"), voxels)

    def ensure(
        self, cases: Sequence[Case], workers: int = 1, progress: bool = True, check: CacheCheck = "sampled"
    ) -> dict[str, Record]:
        """Make every case's entry valid: verify what is there, build what is not.

        A case that the manifest knows is taken by the times of its folder and its sources; its record is not opened.

        Args:
            cases: The cases.
            workers: Threads; reading and inflating release the interpreter lock.
            progress: Whether to show a bar while cases are built.
            check: How much of the cache is read; see :mod:`datamodules.checking`.
        """
        kept = {} if check == "full" else self._manifest()
        records = {
            case.case_id: kept[case.case_id].record
            for case in cases
            if case.case_id in kept and self._is_as_kept(case, kept[case.case_id])
        }
        records |= self._verified([case for case in cases if case.case_id not in records], workers, check == "full")
        self.checked = check_files(self._files(records), self.folder, check)
        records = {name: record for name, record in records.items() if name not in self.checked.broken}
        built = self._build_missing([case for case in cases if case.case_id not in records], workers, progress)
        count = len(self._files(built))
        self.checked = self.checked.with_built(len(self._files(records)) + count, count)
        self._write_manifest(records | built)
        return records | built

    def _files(self, records: dict[str, Record]) -> list[CachedFile]:
        return [
            CachedFile(name, self.case_folder(name) / file, *_written(facts))
            for name, record in records.items()
            for file, facts in record.files.items()
        ]

    def _build_missing(self, missing: Sequence[Case], workers: int, progress: bool) -> dict[str, Record]:
        if not missing:
            return {}  # and a folder that cannot be written will do
        with sole_builder(self.folder):
            remove_leftovers(self.folder / "tmp")
            write_text(self.folder / "key.json", self._key)
            records = self._verified(missing, workers)  # another process may have built some in the meantime
            missing = [case for case in missing if case.case_id not in records]
            title = f"caching {self.layout.name}" if progress and missing else None
            built = self._map(self.build, missing, workers, title)
        return records | {record.case_id: record for record in built if record is not None}

    def _verified(self, cases: Sequence[Case], workers: int, full: bool = True) -> dict[str, Record]:
        """Return the valid records of some cases, each opened."""

        def verify(case: Case) -> Record | None:
            record = self.read_record(case.case_id)
            return record if record is not None and self.is_valid(case, record, full) else None

        records = self._map(verify, cases, workers, None)
        return {record.case_id: record for record in records if record is not None}

    @staticmethod
    def _map(
        function: Callable[[Case], Record | None], cases: Sequence[Case], workers: int, title: str | None
    ) -> list[Record | None]:
        with ThreadPoolExecutor(max(workers, 1)) as pool:
            results = pool.map(function, cases)
            return list(tqdm(results, total=len(cases), desc=title, unit="case") if title else results)

    def estimated_bytes(self, cases: Sequence[Case]) -> int:
        """Estimate the size of the finished cache from the sources' headers: 2 bytes a voxel, b2nd a third of it."""
        total, voxels = 0, self.layout.preprocessing.voxels
        for case in cases:
            first = next(iter(case.places.values()), None)
            for path in self._image_paths(case)[:1]:
                try:
                    shape = self.layout.preprocessing.size or read_header(path, voxels, first).shape
                except VolumeError:
                    continue
                ragged = self.layout.preprocessing.ragged
                total += int(np.prod(shape)) * 2 * len(self._image_paths(case) if ragged else self.layout.modalities)
        return total if self.format == "npy" else total // 3
