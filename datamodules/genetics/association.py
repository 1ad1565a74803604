"""``medmim associate``: which variants are associated with an encoder's features, as independent regions of the genome.

Features of images become principal components; covariates are regressed out of each, and the residuals are mapped to a
normal distribution. Every variant is then tested by a linear model with the same covariates, and significant variants
in linkage are clumped into regions. Relatives are left out; there is no mixed model.

Letters: P people, V variants, C covariates, K components.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy import stats
from sklearn.decomposition import PCA

from common.errors import DataError
from common.files import whole_file, write_text
from common.pseudonyms import public_name
from common.runtime.reporting import print_line
from datamodules.files import listing
from datamodules.genetics.genotypes import Genotypes, allele_frequencies, open_genotypes
from datamodules.genetics.kinship import KINSHIP, kinship, read_kinship, unrelated
from datamodules.ids import join_ids, rows_by
from datamodules.tables import read_numbers, read_parquet, read_table

_CHUNK = 2048
_MOST_PERSONS = 5000

Array = NDArray[np.float64]


def inverse_normal(values: Array) -> Array:
    """Return the normal quantiles of the ranks of ``(P,)``: ``Phi^-1((r - 3/8) / (n + 1/4))``, ties averaged."""
    return stats.norm.ppf((stats.rankdata(values) - 0.375) / (len(values) + 0.25))


def residuals(values: Array, covariates: Array) -> Array:
    """Return the residuals of each column of ``(P, ...)`` after regression on covariates ``(P, C)`` and a constant."""
    design = np.column_stack([np.ones(len(values)), covariates])
    basis, singular, _ = np.linalg.svd(design, full_matrices=False)
    basis = basis[:, singular > singular[0] * 1e-10]
    return values - basis @ (basis.T @ values)


class Tested(NamedTuple):
    """Linear association of each variant with each component.

    Attributes:
        beta: ``(V, K)``, effect of an allele.
        p: ``(V, K)``, two-sided; 1 where a variant does not vary.
    """

    beta: Array
    p: Array


def linear_association(genotypes: Genotypes, persons: NDArray[np.int64], outcomes: Array, covariates: Array) -> Tested:
    """Regress every outcome on every variant and the covariates (ordinary least squares).

    By the theorem of Frisch, Waugh and Lovell this is the regression of residuals on residuals. Calls that are missing
    count as the mean.

    Args:
        genotypes: The genotypes.
        persons: Places of the people.
        outcomes: ``(P, K)``.
        covariates: ``(P, C)``.
    """
    left = residuals(outcomes, covariates)
    freedom = len(persons) - 2 - np.linalg.matrix_rank(np.column_stack([np.ones(len(persons)), covariates])) + 1
    if freedom < 1:
        raise DataError(f"{len(persons)} people are too few for {covariates.shape[1]} covariates.")
    total = (left**2).sum(0)
    betas, values = [], []
    for start in range(0, len(genotypes.variants), _CHUNK):
        columns = np.arange(start, min(start + _CHUNK, len(genotypes.variants)))
        counts = genotypes.counts(persons, columns)
        filled = np.where(np.isnan(counts), 2 * np.nan_to_num(allele_frequencies(counts)), counts)
        dosage = residuals(filled.astype(np.float64), covariates)
        spread = (dosage**2).sum(0)[:, None]
        varies = spread > 1e-8 * len(persons)
        beta = np.divide(dosage.T @ left, spread, out=np.zeros((len(columns), left.shape[1])), where=varies)
        error = np.maximum(total - beta**2 * spread, 1e-12 * total) / freedom
        t = beta * np.sqrt(np.where(varies, spread, 0) / error)
        betas.append(beta)
        values.append(np.where(varies, 2 * stats.t.sf(np.abs(t), freedom), 1.0))
    return Tested(np.concatenate(betas), np.concatenate(values))


def combined_p(p: Array) -> Array:
    """Return ``min(1, K min_k p)`` of ``(V, K)``: Bonferroni over the components."""
    return np.minimum(1.0, p.shape[1] * p.min(1))


class Clump(NamedTuple):
    """A region: its most significant variant and those in linkage with it.

    Attributes:
        lead: The variant.
        members: The others.
    """

    lead: int
    members: list[int]


@dataclass(frozen=True)
class Thresholds:
    """What makes a region.

    Attributes:
        first: Largest P of a leading variant.
        second: Largest P of a member.
        r2: Squared correlation from which variants are in linkage.
        kilobases: How far they may lie from the leading one.
    """

    first: float = 5e-8
    second: float = 1e-7
    r2: float = 0.1
    kilobases: float = 150


def clump(
    p: Array, variants: pd.DataFrame, dosage: Mapping[int, Array], limits: Thresholds = Thresholds()
) -> list[Clump]:
    """Join significant variants in linkage to regions, the most significant one leading, as PLINK's ``--clump``.

    Args:
        p: Of each variant ``(V,)``.
        variants: With chrom and pos.
        dosage: Standardised counts ``(P,)`` of every variant with ``p <= second``.
        limits: What makes a region.
    """
    chrom, pos = variants["chrom"].to_numpy(), variants["pos"].to_numpy()
    candidates = [int(index) for index in np.argsort(p, kind="stable") if p[index] <= limits.second]
    taken: set[int] = set()
    found = []
    for index in candidates:
        if index in taken or p[index] > limits.first:
            continue
        members = [
            other
            for other in candidates
            if other != index
            and other not in taken
            and chrom[other] == chrom[index]
            and abs(int(pos[other]) - int(pos[index])) <= 1000 * limits.kilobases
            and float(dosage[index] @ dosage[other] / len(dosage[index])) ** 2 >= limits.r2
        ]
        taken |= {index, *members}
        found.append(Clump(index, members))
    return found


def standardised(counts: NDArray[np.float32]) -> Array:
    """Return counts ``(P, V)`` with mean 0 and variance 1, missing calls 0."""
    mean = np.nanmean(counts, axis=0)
    values = np.where(np.isnan(counts), 0, counts - mean).astype(np.float64)
    return values / np.maximum(values.std(0), 1e-12)


def genetic_components(genotypes: Genotypes, persons: NDArray[np.int64], count: int) -> Array:
    """Return principal components of the genotypes, to account for ancestry, ``(P, count)``."""
    values = standardised(genotypes.counts(persons))
    return PCA(count, svd_solver="full").fit_transform(values)


def genomic_inflation(p: Array) -> float:
    """Return the median of the test statistic over what chance gives."""
    return float(stats.chi2.isf(np.median(p), 1) / stats.chi2.isf(0.5, 1))


class Association(NamedTuple):
    """The outcome of an association study.

    Attributes:
        table: A row per variant: chrom, id, pos, counted and other allele, p over all components, component and beta.
        clumps: Independent regions.
        inflation: Of the P values of each component.
        persons: How many were tested.
        relatives: How many were left out as relatives.
    """

    table: pd.DataFrame
    clumps: list[Clump]
    inflation: list[float]
    persons: int
    relatives: int


def associate(
    features: Array,
    ids: Sequence[str],
    genotypes: Genotypes,
    covariates: pd.DataFrame | None = None,
    components: int = 10,
    genetic: int = 0,
    relatives: Sequence[tuple[str, str]] | None = None,
    limits: Thresholds = Thresholds(),
) -> Association:
    """Test all variants against the principal components of image features.

    Args:
        features: ``(n, E)``.
        ids: Person of each row; of a person's rows the first counts.
        genotypes: The genotypes.
        covariates: A row per person (index), numbers; people with a gap are left out.
        components: K; no more than there are features.
        genetic: Principal components of the genotypes that are added to the covariates.
        relatives: Pairs of relatives; None estimates kinship from the genotypes.
        limits: What makes a region.

    Raises:
        DataError: ids do not join, or people are too few.
    """
    row_of: dict[str, int] = {}
    for row, name in enumerate(ids):
        row_of.setdefault(str(name), row)
    place_of = {name: place for place, name in enumerate(genotypes.ids)}
    known = None if covariates is None else set(covariates.dropna().index.astype(str))
    print_line(join_ids(row_of, place_of).counts("genotypes", "people with features"))
    if known is not None:
        print_line(join_ids(row_of, known).counts("covariates without gaps", "people with features"))
    names = [name for name in row_of if name in place_of and (known is None or name in known)]
    if not names:
        one, other = public_name(next(iter(row_of), "-")), public_name(genotypes.ids[0])
        more = "" if known is None else " and covariates"
        raise DataError(f"Nobody has both features (such as {one}) and genotypes (such as {other}){more}.")
    if relatives is None:
        relatives = _estimated_relatives(genotypes, names, place_of)
    kept = unrelated(relatives, names)
    persons = np.array([place_of[name] for name in kept], dtype=np.int64)
    chosen = features[[row_of[name] for name in kept]].astype(np.float64)
    number = min(components, chosen.shape[1], len(kept) - 1)
    outcomes = PCA(number, svd_solver="full").fit_transform(chosen)
    parts = [] if covariates is None else [covariates.set_axis(covariates.index.astype(str)).loc[kept].to_numpy(float)]
    parts += [genetic_components(genotypes, persons, genetic)] if genetic else []
    design = np.column_stack(parts) if parts else np.zeros((len(kept), 0))
    normal = np.column_stack([inverse_normal(column) for column in residuals(outcomes, design).T])
    tested = linear_association(genotypes, persons, normal, design)
    p = combined_p(tested.p)
    best = tested.p.argmin(1)
    table = genotypes.variants.assign(p=p, component=best + 1, beta=tested.beta[np.arange(len(p)), best])
    wanted = np.flatnonzero(p <= limits.second)
    values = standardised(genotypes.counts(persons, wanted)) if len(wanted) else np.zeros((len(kept), 0))
    dosage = {int(index): values[:, column] for column, index in enumerate(wanted)}
    clumps = clump(p, genotypes.variants, dosage, limits)
    inflation = [genomic_inflation(column) for column in tested.p.T]
    return Association(table, clumps, inflation, len(kept), len(names) - len(kept))


def _estimated_relatives(
    genotypes: Genotypes, names: Sequence[str], place_of: Mapping[str, int]
) -> list[tuple[str, str]]:
    """Estimate who is related."""
    if len(names) > _MOST_PERSONS:
        raise DataError(f"Kinship of {len(names)} people is not estimated here: give --kinship, a table of plink2 or "
                        f"KING with ID1 or IID1, ID2 or IID2, and KINSHIP.")  # fmt: skip
    counts = genotypes.counts(np.array([place_of[name] for name in names], dtype=np.int64))
    close = np.argwhere(np.triu(kinship(counts) > KINSHIP, 1))
    return [(names[one], names[other]) for one, other in close]


def manhattan_figure(table: pd.DataFrame, clumps: Sequence[Clump], line: float) -> Figure:
    """Draw -log10 P of every variant along the genome; leading variants of regions are marked."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.add_subplot()
    logs = -np.log10(np.maximum(table["p"].to_numpy(), 1e-300))
    offset, ticks, places = 0.0, [], np.zeros(len(table))
    for index, chromosome in enumerate(dict.fromkeys(table["chrom"])):
        inside = (table["chrom"] == chromosome).to_numpy()
        pos = table["pos"].to_numpy()[inside].astype(float)
        places[inside] = pos - pos.min() + offset
        axes.scatter(places[inside], logs[inside], s=4, color=f"C{index % 2}")
        ticks.append((places[inside].mean(), chromosome))
        offset = places[inside].max() + max(np.ptp(pos) * 0.05, 1.0)
    leads = [entry.lead for entry in clumps]
    axes.scatter(places[leads], logs[leads], s=30, facecolor="none", edgecolor="red", label=f"{len(leads)} regions")
    axes.axhline(-np.log10(line), color="grey", linestyle=":")
    axes.set_xticks([place for place, _ in ticks], [name for _, name in ticks], fontsize=7)
    axes.set(xlabel="chromosome", ylabel="-log10 P")
    axes.legend(loc="upper right")
    return figure


def qq_figure(p: Array, inflation: float) -> Figure:
    """Draw the observed against the expected -log10 P."""
    figure = Figure(figsize=(4.5, 4.5), layout="constrained")
    axes = figure.add_subplot()
    observed = -np.log10(np.sort(np.maximum(p, 1e-300)))
    expected = -np.log10((np.arange(1, len(p) + 1) - 0.5) / len(p))
    axes.scatter(expected, observed, s=4)
    axes.plot([0, expected.max()], [0, expected.max()], color="grey", linestyle=":")
    axes.set(xlabel="expected -log10 P", ylabel="observed -log10 P", title=f"inflation {inflation:.3f}")
    return figure


def _covariates(path: str | None) -> pd.DataFrame | None:
    if path is None:
        return None
    table = read_table(Path(path))
    if "IID" not in table.columns:
        raise DataError(f"{path} has no column IID; it has {listing(table.columns)}.")
    rows_by(Path(path), table, "IID")
    numbers = table.drop_duplicates("IID").set_index("IID")
    return numbers.apply(lambda column: read_numbers(Path(path), column, f"values of {column.name}"))


def run(
    features: str,
    genotypes: str,
    out: str,
    split: str,
    covariates: str | None,
    components: int,
    genetic_components: int,
    kinship: str | None,
    p1: float,
    p2: float,
    r2: float,
    kb: float,
) -> None:
    """Carry out ``medmim associate``: ``associations.csv``, ``regions.csv``, ``summary.json`` and two pictures.

    The arguments are the command's options.

    Raises:
        DataError: a file is missing or damaged, or people do not join.
    """
    path = Path(features)
    if not path.is_file():
        raise DataError(f"There are no features at {path}: write them with medmim embed.")
    table = read_parquet(path, ["subject_id", "split", "feature"]).to_pandas()
    if split != "all":
        table = table[table["split"] == split]
    if table.empty:
        raise DataError(f"{path} holds no features of the split {split}.")
    found = associate(
        np.stack(table["feature"].to_list()),
        table["subject_id"].astype(str).tolist(),
        open_genotypes(genotypes),
        _covariates(covariates),
        components,
        genetic_components,
        read_kinship(Path(kinship)) if kinship else None,
        Thresholds(p1, p2, r2, kb),
    )
    folder = Path(out)
    write_text(folder / "associations.csv", found.table.to_csv(index=False))
    leads = found.table.iloc[[entry.lead for entry in found.clumps]]
    leads = leads.assign(members=[len(entry.members) for entry in found.clumps])
    write_text(folder / "regions.csv", leads.to_csv(index=False))
    facts = {
        "persons": found.persons,
        "relatives_left_out": found.relatives,
        "variants": len(found.table),
        "regions": len(found.clumps),
        "inflation": found.inflation,
        "p1": p1,
    }
    write_text(folder / "summary.json", json.dumps(facts, indent=2))
    figures = {
        "manhattan.png": manhattan_figure(found.table, found.clumps, p1),
        "qq.png": qq_figure(found.table["p"].to_numpy(), found.inflation[0]),
    }
    for name, figure in figures.items():
        with whole_file(folder / name) as temporary:
            figure.savefig(temporary, dpi=120)
    print_line(f"{found.persons} people ({found.relatives} relatives left out), {len(found.table)} variants, "
        f"{len(found.clumps)} independent regions: {out}")  # fmt: skip
