"""Genotypes from PLINK 1 (``.bed``) and BGEN files: people, variants, and allele counts.

Letters: P people, V variants.
"""

import re
import sqlite3
import struct
import warnings
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from common.errors import DataError
from common.pseudonyms import public_name
from common.runtime.reporting import contents, say
from datamodules.files import optional_reader
from datamodules.tables import read_positions, read_words

#: Counts of an allele, 0 to 2, where it was not called.
MISSING = -127
CHROMOSOMES = tuple(str(number) for number in range(1, 23))
#: Variants read at once.
_CHUNK = 2048
_BED_MAGIC = b"\x6c\x1b\x01"
_VARIANT_COLUMNS = ["chrom", "id", "pos", "counted", "other"]
_BGEN_COLUMNS = [*_VARIANT_COLUMNS, "alleles", "offset"]
#: The same in an index of BGEN.
_BGI = "chromosome, rsid, position, allele2, allele1, number_of_alleles, file_start_position"


def plain_chromosome(name: str) -> str:
    """Return a chromosome's name without ``chr`` and leading zeros."""
    return str(name).strip().lower().removeprefix("chr").lstrip("0").upper()


class GenotypeFile(ABC):
    """One file of genotypes.

    Attributes:
        path: The file.
        ids: Person of each row; those who withdrew have a negative number.
        variants: A row per variant: chrom, id, pos, counted and other allele.
    """

    path: Path
    ids: list[str]
    variants: pd.DataFrame
    #: Whether counts are whole numbers rather than expectations.
    called: ClassVar[bool] = True

    @abstractmethod
    def counts(self, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return how often the counted allele occurs, ``(P, V)``, NaN where it was not called."""


class BedFile(GenotypeFile):
    """A PLINK 1 triple.

    Args:
        prefix: Path without its suffix.

    Raises:
        DataError: a file of the triple is missing, damaged or of another size than the others say.
    """

    def __init__(self, prefix: Path) -> None:
        self.path = prefix.with_name(prefix.name + ".bed")
        tables = {kind: prefix.with_name(f"{prefix.name}.{kind}") for kind in ("bim", "fam")}
        for path in (self.path, *tables.values()):
            if not path.is_file():
                raise DataError(f"PLINK genotypes are three files, and {path} is missing.")
        self.variants = read_words(tables["bim"], ["chrom", "id", "cm", "pos", "counted", "other"])
        self.variants["pos"] = read_positions(tables["bim"], self.variants["pos"])
        self.variants["chrom"] = self.variants["chrom"].map(plain_chromosome)
        self.variants = self.variants[_VARIANT_COLUMNS]
        self.ids = read_words(tables["fam"], ["family", "person"])["person"].tolist()
        expected = 3 + len(self.variants) * -(-len(self.ids) // 4)
        with self.path.open("rb") as file:
            magic = file.read(3)
        if magic != _BED_MAGIC:
            raise DataError(
                f"{self.path} is not a variant-major PLINK 1 file: it begins with {magic.hex(' ')}, not 6c 1b 01."
            )
        if (size := self.path.stat().st_size) != expected:
            raise DataError(
                f"{self.path} has {size} bytes, but {len(self.ids)} people in {tables['fam'].name} and "
                f"{len(self.variants)} variants in {tables['bim'].name} make {expected}."
            )

    def counts(self, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return how often allele 1 occurs, ``(P, V)``, NaN where it was not called."""
        bed_reader = optional_reader("bed_reader", "PLINK genotypes")
        with bed_reader.open_bed(
            self.path, iid_count=len(self.ids), sid_count=len(self.variants), count_A1=True, properties={}
        ) as file:
            raw = file.read(index=(rows, columns), dtype="int8", num_threads=1)
        counts = raw.astype(np.float32)
        counts[raw == MISSING] = np.nan
        return counts


class BgenFile(GenotypeFile):
    """A BGEN file with its ``.sample`` file beside it, if it holds no names.

    Variants of more than two alleles are left out and counted. Where they begin is read from the ``.bgi`` beside the
    file, which UK Biobank ships, else from the file, once; counts are then read there and nowhere else.

    Args:
        path: The file.

    Raises:
        DataError: it cannot be read.
    """

    called = False

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise DataError(f"There are no genotypes at {path}.")
        try:
            with self._open() as file:
                self.ids = [str(name) for name in file.samples]
                found = self._indexed(file)
                if found is None:
                    found = pd.DataFrame(map(_facts_of, file), columns=_BGEN_COLUMNS)
        except (ValueError, OSError, RuntimeError, IndexError, struct.error, zlib.error) as error:
            raise DataError(f"{path} cannot be read as BGEN: {str(error).splitlines()[0]}") from error
        kept = found[found["alleles"] == 2]
        self.multi_allelic = len(found) - len(kept)
        self._offsets = kept["offset"].to_numpy(np.int64)
        chromosomes = kept["chrom"].map(plain_chromosome)
        self.variants = kept.assign(chrom=chromosomes.where(chromosomes != "", _chromosome_of(path)))
        self.variants = self.variants[_VARIANT_COLUMNS].reset_index(drop=True)

    def _indexed(self, file: Any) -> pd.DataFrame | None:
        """Return all variants from the ``.bgi`` beside the file; None where there is none of this very file."""
        index = self.path.with_name(self.path.name + ".bgi")
        if not index.is_file():
            say(f"genetics: {self.path.name} has no index beside it, so its variants are looked for one by one; "
                f"`bgenix -g {self.path.name} -index` makes one")  # fmt: skip
            return None
        with self.path.open("rb") as content:
            start = content.read(1000)
        try:
            with closing(sqlite3.connect(f"{index.absolute().as_uri()}?mode=ro&immutable=1", uri=True)) as base:
                known = base.execute("SELECT file_size, first_1000_bytes FROM Metadata").fetchone()
                rows = base.execute(f"SELECT {_BGI} FROM Variant ORDER BY file_start_position").fetchall()
        except sqlite3.Error as error:
            raise DataError(f"{index} cannot be read as an index of BGEN ({error}): make it again.") from error
        if known is not None and (known[0] != self.path.stat().st_size or bytes(known[1]) != start):
            raise DataError(f"{index} belongs to another file than {self.path.name}: make it again with bgenix.")
        found = pd.DataFrame(rows, columns=_BGEN_COLUMNS)
        unnamed = np.flatnonzero(found["id"] == "")
        if len(unnamed):
            offsets = found["offset"].iloc[unnamed]
            found.loc[unnamed, "id"] = [variant.varid for variant in self._at(file, offsets)]
        return found

    def _open(self) -> Any:
        sample = self.path.with_suffix(".sample")
        reader = optional_reader("bgen", "BGEN genotypes").BgenReader
        return reader(self.path, sample_path=sample if sample.is_file() else "", delay_parsing=True)

    def counts(self, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the expected number of second alleles, ``(P, V)``, NaN where it is not known."""
        result = np.empty((len(rows), len(columns)), dtype=np.float32)
        with self._open() as file:
            for index, variant in enumerate(self._at(file, self._offsets[columns])):
                result[:, index] = variant.alt_dosage[rows]
        return result

    @staticmethod
    def _at(file: Any, offsets: Iterable[int]) -> Iterator[Any]:
        """Yield the variants that begin at these bytes, and visit no other."""
        first = next(iter(file))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # that it can only be pickled while its file is open
            kind, (handle, _, *settings) = first.__reduce__()
        for offset in offsets:
            yield kind(handle, int(offset), *settings)


def _facts_of(variant: Any) -> tuple[Any, ...]:
    """Return the :data:`_BGEN_COLUMNS` of a variant."""
    reference, alternative = (*variant.alleles, "", "")[:2]
    name = variant.rsid or variant.varid
    return variant.chrom, name, int(variant.pos), alternative, reference, len(variant.alleles), variant.fileoffset


def _chromosome_of(path: Path) -> str:
    """Return the chromosome in a file's name, such as ``ukb_hap_chr7_v2``, whose variants name none."""
    match = re.search(r"(?:^|[_-])c(?:hr)?(\d{1,2})(?=[_-]|$)", path.stem)
    return plain_chromosome(match[1]) if match else ""


def find_genotypes(pattern: str, root: Path | None = None) -> list[Path]:
    """Return the files that match a pattern.

    Args:
        pattern: A PLINK prefix, a ``.bed`` or ``.bgen`` file; ``{chrom}`` stands for 1 to 22, where there is a file.
        root: What a relative pattern is looked for under first; else under the working directory.

    Raises:
        DataError: there is none.
    """
    names = [pattern.format(chrom=name) for name in CHROMOSOMES] if "{chrom}" in pattern else [pattern]
    found = []
    for name in names:
        bases = [base / name for base in ([] if root is None else [root.expanduser()])] + [Path(name).expanduser()]
        for path in bases:
            file = path if path.suffix in (".bed", ".bgen") else path.with_name(path.name + ".bed")
            if file.is_file():
                found.append(file)
                break
    if not found:
        place = Path(pattern).expanduser().parent
        held = f"; {place} holds {contents(place)}" if place.is_dir() else ""
        raise DataError(f"There are no genotypes at {pattern} (.bed or .bgen){held}.")
    return found


class Genotypes:
    """Genotypes of the same people over one or more files.

    Args:
        files: The files, in order.
        step: Use every n-th variant, counted in each file.

    Raises:
        DataError: files disagree on the people, or a person occurs twice.
    """

    def __init__(self, files: Sequence[GenotypeFile], step: int = 1) -> None:
        if step < 1:
            raise ValueError(f"`step` must be at least 1, got {step}.")
        first = files[0]
        for file in files[1:]:
            if file.ids != first.ids:
                raise DataError(f"{file.path} and {first.path} list different people, or the same in another order.")
        twice = [name for name, count in Counter(first.ids).items() if count > 1 and not name.startswith("-")]
        if twice:
            raise DataError(f"{first.path} lists {len(twice)} people twice, first {public_name(twice[0])}: keep one "
                            f"row of each.")  # fmt: skip
        #: People who did not withdraw, and their rows.
        self.rows = np.array([row for row, name in enumerate(first.ids) if not name.startswith("-")], dtype=np.int64)
        self.ids = [first.ids[row] for row in self.rows]
        self.withdrawn = len(first.ids) - len(self.ids)
        self._files = list(files)
        self._columns = [np.arange(0, len(file.variants), step) for file in files]
        tables = [file.variants.iloc[columns] for file, columns in zip(files, self._columns, strict=True)]
        self.variants = pd.concat(tables, ignore_index=True)
        self._starts = np.cumsum([0, *(len(columns) for columns in self._columns)])

    @property
    def paths(self) -> list[Path]:
        """The files."""
        return [file.path for file in self._files]

    def counts(
        self, persons: NDArray[np.int64] | None = None, variants: NDArray[np.int64] | None = None
    ) -> NDArray[np.float32]:
        """Return how often the counted allele occurs, ``(P, V)``, NaN where it was not called.

        Args:
            persons: Places in ``ids``; None: all.
            variants: Places in ``variants``, rising; None: all.
        """
        rows = self.rows if persons is None else self.rows[persons]
        wanted = np.arange(len(self.variants)) if variants is None else np.asarray(variants, dtype=np.int64)
        parts = []
        for index, file in enumerate(self._files):
            inside = wanted[(wanted >= self._starts[index]) & (wanted < self._starts[index + 1])]
            if len(inside):
                parts.append(file.counts(rows, self._columns[index][inside - self._starts[index]]))
        return np.concatenate(parts, axis=1) if parts else np.zeros((len(rows), 0), dtype=np.float32)

    def table(self) -> NDArray[Any]:
        """Return all counts ``(P, V)`` in the least memory: int8 with ``MISSING`` where all are calls, else float32."""
        called = all(file.called for file in self._files)
        result = np.empty((len(self.rows), len(self.variants)), dtype=np.int8 if called else np.float32)
        for start in range(0, result.shape[1], _CHUNK):
            part = self.counts(None, np.arange(start, min(start + _CHUNK, result.shape[1])))
            result[:, start : start + _CHUNK] = np.where(np.isnan(part), MISSING, part) if called else part
        return result


def counts_of(table: NDArray[Any]) -> NDArray[np.float32]:
    """Return float32 counts, NaN where there is no call, of a part of what :meth:`Genotypes.table` gives."""
    counts = table.astype(np.float32)
    if table.dtype == np.int8:
        counts[table == MISSING] = np.nan
    return counts


def open_genotypes(pattern: str, root: Path | None = None, step: int = 1) -> Genotypes:
    """Open the genotypes that match a pattern; see :func:`find_genotypes`.

    Raises:
        DataError: there are none, or they are damaged.
    """
    files = find_genotypes(pattern, root)
    return Genotypes(
        [BgenFile(path) if path.suffix == ".bgen" else BedFile(path.with_suffix("")) for path in files], step
    )


def allele_frequencies(counts: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the frequency of the counted allele ``(V,)`` over the people called; NaN where nobody was."""
    called = ~np.isnan(counts)
    total = np.where(called, counts, 0).sum(0, dtype=np.float64)
    number = called.sum(0)
    return np.divide(total, 2.0 * number, out=np.full(counts.shape[1], np.nan), where=number > 0)
