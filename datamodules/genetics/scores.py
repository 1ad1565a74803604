"""Polygenic scores: scoring files of the PGS Catalog applied to genotypes, and tables that plink2 wrote.

Letters: P people, V variants.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from common.errors import DataError
from datamodules.files import listing, read_matrix, read_text
from datamodules.genetics.genotypes import Genotypes, allele_frequencies, plain_chromosome
from datamodules.tables import parse_table, read_numbers, read_positions, read_words

_COMPLEMENT = str.maketrans("ACGT", "TGCA")
_UNSUPPORTED = ("is_haplotype", "is_diplotype", "is_interaction")
_TRUE = ("true", "1", "yes")


class Score(NamedTuple):
    """A polygenic score.

    Attributes:
        name: Its id.
        build: Genome build of its positions; empty if not stated.
        variants: A row per variant: id, chrom, pos, effect, other (empty if not stated), weight, model.
        left_out: Rows that are no weight of one allele, such as haplotypes.
    """

    name: str
    build: str
    variants: pd.DataFrame
    left_out: int


class Matched(NamedTuple):
    """How the rows of a score were matched with variants.

    Attributes:
        rows: Places in the score's table.
        columns: Their variants.
        flipped: bool, whether the effect allele is the one that the genotypes do not count.
        why: Number of rows by outcome: matched, of these strand_flipped and allele_flipped; absent, ambiguous,
            alleles (others than the variant's), duplicate.
    """

    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    flipped: NDArray[np.bool_]
    why: dict[str, int]


def normal_build(name: str) -> str:
    """Return GRCh37 or GRCh38 under any of their names; empty where it is neither."""
    word = name.strip().lower()
    if word in ("grch37", "hg19", "37", "b37", "ncbi37"):
        return "GRCh37"
    return "GRCh38" if word in ("grch38", "hg38", "38", "b38", "ncbi38") else ""


def read_score(path: Path, build: str = "") -> Score:
    """Read a scoring file of the PGS Catalog, with or without gzip.

    Of a harmonised file the positions of ``build`` are taken where it has them.

    Args:
        path: The file.
        build: The build that is wanted; empty: the file's own.

    Raises:
        DataError: it is no scoring file, or a weight is not a number.
    """
    header, table = _header_and_table(path)
    if not {"effect_allele", "effect_weight"} <= set(table.columns):
        raise DataError(
            f"{path} is not a scoring file of the PGS Catalog: it needs the columns effect_allele and effect_weight, "
            f"and has {listing(table.columns)}."
        )
    given, harmonised = normal_build(header.get("genome_build", "")), normal_build(header.get("HmPOS_build", ""))
    moved = bool(build) and harmonised == build and {"hm_chr", "hm_pos"} <= set(table.columns)
    names = ("hm_chr", "hm_pos") if moved else ("chr_name", "chr_position")
    simple = ~_any_true(table, _UNSUPPORTED)
    left_out, table = int((~simple).sum()), table[simple]
    weight = read_numbers(path, table["effect_weight"], "weights")
    if weight.isna().any():
        raise DataError(f"{path} has {int(weight.isna().sum())} rows without a weight: leave them out or correct them.")
    dominant, recessive = _any_true(table, ["is_dominant"]), _any_true(table, ["is_recessive"])
    other = next((name for name in ("other_allele", "hm_inferOtherAllele") if name in table.columns), None)
    variants = pd.DataFrame(
        {
            "id": _column(table, "rsID"),
            "chrom": _column(table, names[0]).map(plain_chromosome),
            "pos": read_positions(path, _column(table, names[1])),
            "effect": table["effect_allele"].str.upper(),
            "other": _column(table, other or "").str.upper(),
            "weight": weight,
            "model": np.where(dominant, "dominant", np.where(recessive, "recessive", "additive")),
        }
    ).reset_index(drop=True)
    name = header.get("pgs_id") or header.get("pgs_name") or path.name.split(".")[0]
    return Score(name, build if moved else given, variants, left_out)


def _header_and_table(path: Path) -> tuple[dict[str, str], pd.DataFrame]:
    """Read the header lines before the table, and the table."""
    text = read_text(path)
    header: dict[str, str] = {}
    start = skipped = 0
    while text.startswith("#", start):
        end = text.find("\n", start) + 1 or len(text)
        name, sign, value = text[start:end].lstrip("#").partition("=")
        if sign:
            header[name.strip()] = value.strip()
        start, skipped = end, skipped + 1
    return header, parse_table(text[start:], str(path), "\t", quotes=False, skipped=skipped)


def _column(table: pd.DataFrame, name: str) -> pd.Series:
    return table[name] if name in table.columns else pd.Series("", index=table.index)


def _any_true(table: pd.DataFrame, columns: Sequence[str]) -> pd.Series:
    found = pd.Series(False, index=table.index)
    for name in columns:
        found |= _column(table, name).str.lower().isin(_TRUE)
    return found


def is_ambiguous(first: str, second: str) -> bool:
    """Whether two alleles are each other's complement, so that the strand is ambiguous."""
    return first.translate(_COMPLEMENT) == second


def match_alleles(effect: str, other: str, counted: str, uncounted: str) -> tuple[str, bool]:
    """Compare a score's alleles with a variant's.

    Args:
        effect: The allele with the weight.
        other: The other one; empty if not stated.
        counted: The allele that the genotypes count.
        uncounted: The one that they do not.

    Returns:
        What was found (``matched``, ``strand_flipped``, ``ambiguous`` or ``alleles``), and whether the effect allele is
        the uncounted one.
    """
    found = {counted, uncounted}
    if is_ambiguous(counted, uncounted):
        same = {effect, other or (uncounted if effect == counted else counted)} == found
        return ("ambiguous" if same else "alleles"), False
    for kind, table in (("matched", {}), ("strand_flipped", _COMPLEMENT)):
        one, two = effect.translate(table), other.translate(table)
        if (two and {one, two} == found) or (not two and one in found):
            return kind, one == uncounted
    return "alleles", False


def match_score(score: Score, variants: pd.DataFrame, build: str = "", keep_ambiguous: bool = False) -> Matched:
    """Find each row's variant: by name and alleles, else by position and alleles where the builds allow it.

    Args:
        score: The score.
        variants: Those of :class:`datamodules.genetics.genotypes.Genotypes`.
        build: Genome build of their positions; empty if unknown, positions are then trusted.
        keep_ambiguous: Whether A/T and C/G variants are taken to lie on the same strand; else they are left out.

    Raises:
        DataError: the builds differ, and rows have no name to go by.
    """
    by_place = not (build and score.build and normal_build(build) != score.build)
    named = score.variants["id"].str.startswith("rs")
    if not by_place and not named.any():
        raise DataError(
            f"The score {score.name} is in {score.build}, the genotypes are in {build}, and it names no variant: "
            f"take the file that is harmonised to {build} from the PGS Catalog."
        )
    places: dict[object, list[int]] = {}
    for index, (chrom, name, pos) in enumerate(zip(variants["chrom"], variants["id"], variants["pos"], strict=True)):
        places.setdefault(name, []).append(index)
        if by_place:
            places.setdefault((chrom, pos), []).append(index)
    counted, uncounted = (variants[name].str.upper().tolist() for name in ("counted", "other"))
    why: Counter[str] = Counter()
    chosen: dict[int, tuple[int, bool]] = {}
    for row, entry in enumerate(score.variants.itertuples(index=False)):
        candidates = (places.get(entry.id, []) if entry.id else []) or places.get((entry.chrom, entry.pos), [])
        outcomes = [
            (index, *match_alleles(entry.effect, entry.other, counted[index], uncounted[index])) for index in candidates
        ]
        wanted = ("matched", "strand_flipped", "ambiguous") if keep_ambiguous else ("matched", "strand_flipped")
        good = next((outcome for outcome in outcomes if outcome[1] in wanted), None)
        if good is None:
            why[outcomes[0][1] if outcomes else "absent"] += 1
        elif good[0] in chosen:
            why["duplicate"] += 1
        else:
            index, kind, flipped = good
            if kind == "ambiguous":
                flipped = entry.effect == uncounted[index]
            chosen[index] = (row, flipped)
            why["matched"] += 1
            why["strand_flipped"] += kind == "strand_flipped"
            why["allele_flipped"] += flipped
    columns = np.array(sorted(chosen), dtype=np.int64)
    rows = np.array([chosen[index][0] for index in columns], dtype=np.int64)
    flips = np.array([chosen[index][1] for index in columns], dtype=bool)
    return Matched(rows, columns, flips, dict(why))


def apply_score(
    score: Score,
    genotypes: Genotypes,
    build: str = "",
    keep_ambiguous: bool = False,
    reference: NDArray[np.int64] | None = None,
) -> tuple[NDArray[np.float64], dict[str, int]]:
    """Sum a score's weights over everyone's effect alleles.

    A genotype that was not called counts as twice the frequency of the allele among the reference people.

    Args:
        score: The score.
        genotypes: The genotypes.
        build: Their genome build; empty if unknown.
        keep_ambiguous: See :func:`match_score`.
        reference: Places of the people that frequencies come from, such as those of the training split; None: all.

    Returns:
        The score of each person ``(P,)``, and the number of rows by outcome, with ``imputed`` genotypes.

    Raises:
        DataError: no row found a variant, or the builds differ.
    """
    match = match_score(score, genotypes.variants, build, keep_ambiguous)
    if not len(match.rows):
        found = ", ".join(f"{count} {name}" for name, count in match.why.items())
        raise DataError(
            f"Of the {len(score.variants)} variants of {score.name} only {len(match.rows)} are among the genotypes "
            f"({found}): check the genome build (the score says {score.build or 'nothing'})."
        )
    counts = genotypes.counts(None, match.columns)
    base = counts if reference is None else counts[reference]
    expected = 2 * np.nan_to_num(allele_frequencies(base))
    absent = np.isnan(counts)
    filled = np.where(absent, expected, counts)
    dosage = np.where(match.flipped, 2 - filled, filled)
    model = score.variants["model"].to_numpy()[match.rows]
    dosage = np.where(model == "dominant", np.minimum(dosage, 1), dosage)
    dosage = np.where(model == "recessive", np.maximum(dosage - 1, 0), dosage)
    weight = score.variants["weight"].to_numpy()[match.rows]
    return dosage @ weight, match.why | {"left_out": score.left_out, "imputed": int(absent.sum())}


def read_score_table(path: Path) -> tuple[list[str], NDArray[np.float32]]:
    """Read a ``.sscore`` of plink2: people and the score's average, NaN where there is none.

    Raises:
        DataError: it has no IID column or no score, or a person twice.
    """
    table = read_words(path)
    scores = [name for name in table.columns if not name.startswith(("NAMED", "ALLELE"))]
    value = next((name for end in ("_AVG", "_SUM") for name in scores if name.endswith(end)), None)
    if "IID" not in table.columns or value is None:
        raise DataError(f"{path} is not a score of plink2: it has {listing(table.columns)}.")
    ids = table["IID"].tolist()
    if len(set(ids)) != len(ids):
        raise DataError(f"{path} lists a person twice.")
    return ids, read_numbers(path, table[value], "scores").to_numpy(dtype=np.float32)


def read_burden(path: Path, min_carriers: int = 1) -> tuple[list[str], list[str], NDArray[np.float32]]:
    """Read burden scores of genes: ``G`` of an HDF5 file, with names in ``..._iid.txt`` and ``..._colnames.txt``.

    Args:
        path: ``combined_burdens.h5``.
        min_carriers: People with a value other than 0 that a gene needs to be kept.

    Returns:
        People, genes, and ``(P, genes)``.

    Raises:
        DataError: a file is missing, or the names do not fit the matrix.
        UserError: h5py is not installed.
    """
    names = {}
    for kind in ("iid", "colnames"):
        listed = path.with_name(f"{path.stem}_{kind}.txt")
        if not listed.is_file():
            raise DataError(f"{path} needs the names in {listed}, which is not there.")
        names[kind] = read_text(listed).split()
    values = read_matrix(path, "G", (len(names["iid"]), len(names["colnames"])), "burden scores")
    kept = (np.nan_to_num(values) != 0).sum(0) >= min_carriers
    return names["iid"], [gene for gene, keep in zip(names["colnames"], kept, strict=True) if keep], values[:, kept]


def score_files(folder_or_files: str | Sequence[str], suffixes: Sequence[str]) -> list[Path]:
    """Return the files of a folder with one of the suffixes, or the files that are named.

    Raises:
        DataError: there is none.
    """
    named = [folder_or_files] if isinstance(folder_or_files, str) else list(folder_or_files)
    found: list[Path] = []
    for name in named:
        path = Path(name).expanduser()
        if path.is_dir():
            found += sorted(file for file in path.iterdir() if file.name.endswith(tuple(suffixes)))
        elif path.is_file():
            found.append(path)
        else:
            raise DataError(f"There is no score at {path}.")
    if not found:
        raise DataError(f"{', '.join(named)} holds no file that ends in {' or '.join(suffixes)}.")
    return found
