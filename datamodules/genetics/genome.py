"""The genetics of people, ready for a network: kinds of features, standardised by the training people alone.

Letters: P people, F features.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from common.errors import DataError
from common.randomness import numpy_generator, stable_hash
from common.runtime.reporting import print_line
from datamodules.genetics.genotypes import MISSING, allele_frequencies, counts_of, open_genotypes
from datamodules.genetics.scores import (
    apply_score,
    normal_build,
    read_burden,
    read_score,
    read_score_table,
    score_files,
)

#: Features whose statistics are taken at once.
_BLOCK = 1024

Transform = Literal["genotype", "z_score", "log_z_score"]


@dataclass
class Kind:
    """One kind of genetics: a value of each feature for each of its people.

    Attributes:
        name: Such as ``snp``.
        ids: Person of each row.
        features: Names of the columns.
        values: ``(P, F)`` float32, NaN where nothing is known; or calls in int8, as genotypes give them.
        transform: ``"genotype"``: (g - 2p) / sqrt(2p (1 - p)); ``"z_score"``; ``"log_z_score"``: that of log(1 + x).
        rows: Row of each person.
        mean: Of each feature over the training people.
        scale: What it is divided by.
        imputed: Values of the training people that were not known.
        dropped: Features without variance among the training people, or known of none of them.
    """

    name: str
    ids: Sequence[str]
    features: list[str]
    values: NDArray[Any]
    transform: Transform
    rows: dict[str, int] = field(default_factory=dict)
    mean: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    scale: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    imputed: int = 0
    dropped: int = 0

    def __post_init__(self) -> None:
        if len(set(self.ids)) != len(self.ids):
            raise DataError(f"The {self.name} features list a person twice.")
        if self.values.dtype.kind == "f" and np.isinf(self.values).any():
            raise DataError(f"The {self.name} features hold infinite values, of which there is no mean.")
        known = ~(self.values == MISSING).all(1) if self.values.dtype == np.int8 else ~np.isnan(self.values).all(1)
        self.rows = {person: row for row, person in enumerate(self.ids) if known[row]}

    def fit(self, training: Collection[str]) -> None:
        """Take the statistics from the training people, and leave out features that do not vary among them.

        Raises:
            DataError: none of them has these features, or none of the features varies.
        """
        chosen = [self.rows[person] for person in training if person in self.rows]
        if not chosen:
            raise DataError(f"None of the {len(training)} training people has {self.name} features.")
        rows = np.array(chosen)
        blocks = [self._statistics(counts_of(self.values[rows, start : start + _BLOCK]))
                  for start in range(0, self.values.shape[1], _BLOCK)]  # fmt: skip
        mean, scale, keep, unknown = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
        if not keep.any():
            raise DataError(f"None of the {len(keep)} {self.name} features varies among the training people.")
        self.dropped = int((~keep).sum())
        self.imputed = int(unknown[keep].sum())
        self.mean, self.scale = mean[keep], scale[keep]
        self.features = [name for name, kept in zip(self.features, keep, strict=True) if kept]
        self.values = np.ascontiguousarray(self.values[:, keep])

    def _statistics(self, known: NDArray[np.float32]) -> tuple[NDArray[Any], ...]:
        """Return mean, scale, whether they vary, and how many values are missing, of features of some people."""
        values = known.astype(np.float64) if self.transform == "genotype" else self._logged(known.astype(np.float64))
        missing = np.isnan(values)
        if self.transform == "genotype":
            frequency = allele_frequencies(known)
            mean, scale = 2 * frequency, np.sqrt(2 * frequency * (1 - frequency))
        else:
            number = np.maximum((~missing).sum(0), 1)
            mean = np.where(missing, 0, values).sum(0) / number
            scale = np.sqrt((np.where(missing, 0, values - mean) ** 2).sum(0) / number)
        # All called heterozygous have a scale by their frequency, and yet do not vary.
        varies = np.where(missing, -np.inf, values).max(0) > np.where(missing, np.inf, values).min(0)
        return mean, scale, (np.nan_to_num(scale) > 1e-6) & varies, missing.sum(0)

    def _logged(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        if self.transform != "log_z_score":
            return values
        if (values < 0).any():
            raise DataError(f"The {self.name} features hold negative values, of which there is no log(1 + x).")
        return np.log1p(values)

    def read(self, person: str | None, limit: float) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Return a person's standardised features ``(F,)`` and which were observed; 0, the mean, for all others."""
        row = self.rows.get(person) if person is not None else None
        if row is None:
            return np.zeros(len(self.features), dtype=np.float32), np.zeros(len(self.features), dtype=bool)
        values = counts_of(self.values[row])
        observed = ~np.isnan(values)
        standard = (self._logged(values.astype(np.float64)) - self.mean) / self.scale
        return np.where(observed, np.clip(standard, -limit, limit), 0).astype(np.float32), observed


class Genome:
    """All kinds of genetics that people have.

    Args:
        kinds: The kinds.
        limit: Standardised values are cut to this on both sides.
    """

    def __init__(self, kinds: Sequence[Kind], limit: float = 5.0) -> None:
        self.kinds, self.limit = list(kinds), limit

    @property
    def sizes(self) -> dict[str, int]:
        """Features of each kind by name."""
        return {kind.name: len(kind.features) for kind in self.kinds}

    @property
    def persons(self) -> list[str]:
        """Everyone with any genetics, sorted."""
        return sorted({person for kind in self.kinds for person in kind.rows})

    def fit(self, training: Collection[str]) -> None:
        """Fit every kind on the training people; see :meth:`Kind.fit`."""
        for kind in self.kinds:
            kind.fit(training)

    def has(self, person: str | None) -> list[bool]:
        """Return which kinds a person has."""
        return [person in kind.rows for kind in self.kinds]

    def read(self, person: str | None) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Return all features ``(F,)`` of a person, and which were observed."""
        parts = [kind.read(person, self.limit) for kind in self.kinds]
        return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])

    def describe(self) -> str:
        """Describe what there is."""
        words = []
        for kind in self.kinds:
            facts = f"{kind.name} {len(kind.features)} features of {len(kind.rows)} persons"
            if kind.dropped:
                facts += f", {kind.dropped} without variance left out"
            words.append(facts + (f", {kind.imputed} training values imputed" if kind.imputed else ""))
        return "; ".join(words)

    def fingerprint(self) -> str:
        """Return a hash of the features and of the statistics they are standardised with."""
        parts = [
            part
            for kind in self.kinds
            for part in (kind.name, *kind.features, *np.round(kind.mean, 9), *np.round(kind.scale, 9))
        ]
        return f"{stable_hash(*parts):016x}"

    def statistics(self) -> dict[str, Any]:
        """Return the statistics of the training people by kind, as plain lists for a checkpoint."""
        return {
            kind.name: {"features": kind.features, "mean": kind.mean.tolist(), "scale": kind.scale.tolist()}
            for kind in self.kinds
        }


@dataclass(frozen=True)
class GenomeFiles:
    """Where the genetics are stored, and how they are read.

    Args:
        genotypes: PLINK prefix, ``.bed`` or ``.bgen``, with ``{chrom}`` for 1 to 22; None = what the layout has.
        step: Use every n-th variant; None = as the layout has it, else 1.
        scores: Scoring files of the PGS Catalog, or a folder of them, applied to the genotypes.
        score_tables: ``.sscore`` files of plink2, or a folder of them.
        burden: ``combined_burdens.h5``.
        build: Genome build of the genotypes, such as GRCh37; empty = not known.
    """

    genotypes: str | None = None
    step: int | None = None
    scores: str | list[str] | None = None
    score_tables: str | list[str] | None = None
    burden: str | None = None
    build: str = ""

    @property
    def any(self) -> bool:
        """Whether any file is named."""
        return any((self.genotypes, self.scores, self.score_tables, self.burden))


def read_genome(
    files: GenomeFiles, root: Path | None = None, limit: float = 5.0, training: Collection[str] = ()
) -> Genome:
    """Read genotypes, scores and burdens; :meth:`Genome.fit` standardises them later.

    Args:
        files: Where they are stored.
        root: What relative paths are looked for under first.
        limit: Standardised values are cut to this on both sides.
        training: People whose allele frequencies replace calls that a score misses; empty: everyone.

    Raises:
        DataError: a file is missing or damaged, or a score fits no variant.
    """
    kinds = []
    scored: dict[str, tuple[Sequence[str], NDArray[np.floating]]] = {}
    if files.genotypes:
        step = files.step or 1
        genotypes = open_genotypes(files.genotypes, root, step)
        names = [f"{v.chrom}:{v.pos}:{v.id}" for v in genotypes.variants.itertuples(index=False)]
        if genotypes.withdrawn:
            print_line(f"genetics: {genotypes.withdrawn} people with negative numbers have withdrawn and are left out")
        kinds.append(Kind("snp", genotypes.ids, names, genotypes.table(), "genotype"))
        if files.scores:
            every = genotypes if step == 1 else open_genotypes(files.genotypes, root)
            build = normal_build(files.build)
            known = set(training)
            reference = np.array([place for place, name in enumerate(every.ids) if name in known], dtype=np.int64)
            for path in score_files(files.scores, (".txt", ".txt.gz")):
                score = read_score(path, build)
                values, counts = apply_score(score, every, build, reference=reference if len(reference) else None)
                scored[score.name] = every.ids, values
                print_line(f"genetics: {score.name}, " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    elif files.scores:
        raise DataError("Scoring files are applied to genotypes: name these with data.genome.genotypes, or give "
                        "data.genome.score_tables.")  # fmt: skip
    if files.score_tables:
        for path in score_files(files.score_tables, (".sscore",)):
            scored[path.stem] = read_score_table(path)
    if scored:
        joined = pd.DataFrame({name: pd.Series(values, index=list(ids)) for name, (ids, values) in scored.items()})
        kinds.append(Kind("pgs", [*map(str, joined.index)], list(scored), joined.to_numpy(np.float32), "z_score"))
    if files.burden:
        inside = Path(files.burden) if root is None else root / files.burden
        kinds.append(Kind("burden", *read_burden(inside if inside.is_file() else Path(files.burden)), "log_z_score"))
    return Genome(kinds, limit)


def pair_persons(patients: Mapping[str, str], persons: Sequence[str], seed: int = 0) -> dict[str, str]:
    """Pair patients whose images have no genetics with the genetics of strangers, each used once.

    Args:
        patients: Patient to split. Training patients are served first, so that they keep their partners whatever
            else there is.
        persons: Who has genetics.
        seed: Seed of the pairing.

    Returns:
        Patient to person.

    Raises:
        DataError: there are fewer people than patients.
    """
    if len(persons) < len(patients):
        raise DataError(f"{len(patients)} patients cannot be paired with {len(persons)} genomes: name more of them.")
    order = [str(name) for name in numpy_generator("pairing", seed).permutation(sorted(persons))]
    ranked = sorted(patients, key=lambda name: (patients[name] != "train", name))
    return dict(zip(ranked, order, strict=False))
