"""Synthetic fundus photographs, regions of slides, and genomes. For trying out the code, never for results.

A person's genetic risk decides what their pictures show, so genetics, pictures, grades and diseases are correlated.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from common.randomness import numpy_generator
from datamodules.files import optional_reader
from datamodules.genetics.genotypes import MISSING
from datamodules.genetics.ukb import FIELDS
from datamodules.synthetic.tables import write_image, write_table

_SIZE = (192, 256)
_VARIANTS, _CHROMOSOMES = 960, (1, 2, 22)
_SCORES, _GENES = 6, 24


def draw_fundus(
    rng: np.random.Generator, grade: int, atrophy: bool = False, size: Sequence[int] = _SIZE
) -> Image.Image:
    """Draw an eye: disc, vessels, and more and brighter lesions the higher the grade.

    Args:
        rng: Source of the drawing.
        grade: 0 to 4.
        atrophy: Whether there is a pale patch beside the disc.
        size: Height and width.
    """
    height, width = size
    image = Image.new("RGB", (width, height))
    draw = ImageDraw.Draw(image)
    radius, middle = 0.48 * height, (width / 2, height / 2)
    base = rng.uniform(0.55, 1.25) * rng.normal((150, 70, 35), (12, 10, 10))
    draw.ellipse(_around(middle, radius), fill=_colour(base))
    disc = (middle[0] + rng.choice((-1, 1)) * 0.45 * radius, middle[1] + rng.normal(0, 0.05) * radius)
    for _ in range(7):
        angle, points = rng.uniform(0, 2 * np.pi), [disc]
        for _ in range(9):
            angle += rng.normal(0, 0.25)
            step = 0.16 * radius
            points.append((points[-1][0] + step * np.cos(angle), points[-1][1] + step * np.sin(angle)))
        draw.line(points, fill=_colour(base * 0.65), width=max(round(height / 90), 1))
    if atrophy:
        draw.ellipse(_around((disc[0], disc[1] + 0.2 * radius), 0.28 * radius), fill=_colour(base * 1.35))
    draw.ellipse(_around(disc, 0.15 * radius), fill=_colour((235, 205, 130)))
    for _ in range(grade * 6):
        place = _inside(rng, middle, 0.85 * radius)
        bright = rng.random() < 0.5
        colour = (230, 210, 110) if bright else (85, 15, 15)
        draw.ellipse(_around(place, rng.uniform(0.012, 0.04) * radius), fill=colour)
    noise = rng.normal(0, 4, (height, width, 1))
    mask = Image.new("L", (width, height))
    ImageDraw.Draw(mask).ellipse(_around(middle, radius), fill=255)
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(height / 300))) + noise
    inside = np.asarray(mask)[..., None] > 0
    return Image.fromarray(np.where(inside, np.clip(pixels, 0, 255), 0).astype(np.uint8))


def _around(center: Sequence[float], radius: float) -> tuple[float, float, float, float]:
    return center[0] - radius, center[1] - radius, center[0] + radius, center[1] + radius


def _inside(rng: np.random.Generator, center: Sequence[float], radius: float) -> tuple[float, float]:
    angle, distance = rng.uniform(0, 2 * np.pi), radius * rng.random() ** 0.5
    return center[0] + distance * np.cos(angle), center[1] + distance * np.sin(angle)


def _colour(values: Sequence[float] | NDArray[np.float64]) -> tuple[int, int, int]:
    red, green, blue = (int(np.clip(value, 0, 255)) for value in values)
    return red, green, blue


def draw_region(rng: np.random.Generator, grade: int, side: int = 256) -> Image.Image:
    """Draw a stained region: more and larger nuclei the higher the grade, 2 to 4."""
    image = Image.new("RGB", (side, side), _colour(rng.normal((225, 180, 205), 5)))
    draw = ImageDraw.Draw(image)
    for _ in range(30 * grade * grade):
        x, y = rng.uniform(0, side, 2)
        radius = rng.uniform(0.006, 0.008 + 0.006 * (grade - 1)) * side
        draw.ellipse(_around((x, y), radius), fill=_colour(rng.normal((105, 60, 140), 15)))
    return image.filter(ImageFilter.GaussianBlur(0.6))


class People:
    """People with genotypes in blocks of linkage, and the risk that these give them.

    Args:
        number: Number of people.
        seed: Seed of everything.
        variants: Variants in all.
        causal: Variants that make the risk.
    """

    def __init__(self, number: int, seed: int, variants: int = _VARIANTS, causal: int = 12) -> None:
        rng = numpy_generator("synthetic", "people", seed)
        frequency = rng.uniform(0.1, 0.5, variants)
        block = np.arange(variants) // 8
        self.counts = np.zeros((number, variants), dtype=np.int8)
        for strand in range(2):
            shared = rng.random((number, block.max() + 1))
            own = rng.random((number, variants))
            follows = numpy_generator("synthetic", "linkage", seed, strand).random((number, variants)) < 0.7
            self.counts += (np.where(follows, shared[:, block], own) < frequency).astype(np.int8)
        self.causal = np.sort(rng.choice(variants, causal, replace=False))
        effects = rng.choice((-1.0, 1.0), causal)
        standard = self.counts[:, self.causal] - 2 * frequency[self.causal]
        raw = standard @ effects + rng.normal(0, 0.5, number)
        self.risk = (raw - raw.mean()) / max(raw.std(), 1e-9)
        self.missing = rng.random(self.counts.shape) < 0.002
        alleles = np.array([("A", "G"), ("C", "T"), ("A", "C"), ("G", "T"), ("A", "T")])
        chosen = alleles[rng.choice(len(alleles), variants, p=[0.3, 0.3, 0.15, 0.15, 0.1])]
        chromosome = np.repeat(_CHROMOSOMES, -(-variants // len(_CHROMOSOMES)))[:variants]
        self.variants = pd.DataFrame(
            {
                "chrom": chromosome.astype(str),
                "id": [f"rs{1000 + index}" for index in range(variants)],
                "pos": 10_000 + 5_000 * np.arange(variants),
                "counted": chosen[:, 0],
                "other": chosen[:, 1],
            }
        )

    def grade(self, person: int) -> int:
        """Return a grade of 0 to 4 by the person's risk."""
        return int(np.searchsorted((-0.6, 0.0, 0.6, 1.2), self.risk[person]))


def write_bed(prefix: Path, ids: Sequence[str], variants: pd.DataFrame, counts: NDArray[np.int8]) -> None:
    """Write a PLINK 1 triple; ``counts`` ``(P, V)`` of the first allele, -127 where it was not called."""
    bed_reader = optional_reader("bed_reader", "PLINK genotypes")
    prefix.parent.mkdir(parents=True, exist_ok=True)
    properties = {
        "fid": list(ids),
        "iid": list(ids),
        "sid": variants["id"].tolist(),
        "chromosome": variants["chrom"].tolist(),
        "bp_position": variants["pos"].tolist(),
        "allele_1": variants["counted"].tolist(),
        "allele_2": variants["other"].tolist(),
    }
    bed_reader.to_bed(prefix.with_name(prefix.name + ".bed"), counts.astype(np.int8), properties=properties,
                      count_A1=True, num_threads=1)  # fmt: skip


def _genotypes(root: Path, people: People, ids: Sequence[str]) -> None:
    """Write one triple per chromosome; some of a person's calls are missing."""
    counts = np.where(people.missing, MISSING, people.counts).astype(np.int8)
    for chromosome in dict.fromkeys(people.variants["chrom"]):
        columns = (people.variants["chrom"] == chromosome).to_numpy()
        write_bed(root / f"ukb_cal_chr{chromosome}_v2", ids, people.variants[columns], counts[:, columns])


def _scores(root: Path, people: People, ids: Sequence[str], rng: np.random.Generator) -> None:
    """Write scores as plink2 does; the last person has none."""
    root.mkdir(parents=True, exist_ok=True)
    for number in range(_SCORES):
        value = people.risk * (0.6 - 0.08 * number) + rng.normal(0, 0.7, len(ids))
        lines = ["#FID\tIID\tALLELE_CT\tNAMED_ALLELE_DOSAGE_SUM\tSCORE1_AVG"]
        lines += [f"{name}\t{name}\t100\t50\t{x:.6g}" for name, x in zip(ids[:-1], value, strict=False)]
        (root / f"PGS{number + 1:06d}.sscore").write_text("\n".join(lines) + "\n")


def _burden(path: Path, ids: Sequence[str], rng: np.random.Generator) -> None:
    h5py = optional_reader("h5py", "burden scores")
    path.parent.mkdir(parents=True, exist_ok=True)
    values = (rng.random((len(ids), _GENES)) < 0.15) * rng.integers(1, 4, (len(ids), _GENES))
    with h5py.File(path, "w") as file:
        file["G"] = values.astype(np.float32)
    path.with_name(f"{path.stem}_iid.txt").write_text("\n".join(ids) + "\n")
    path.with_name(f"{path.stem}_colnames.txt").write_text("".join(f"GENE{index}\n" for index in range(_GENES)))


def _table(path: Path, rows: Sequence[Mapping[str, object]], separator: str = ",") -> None:
    write_table(path, list(rows[0]) if rows else [], rows, separator)


def _save(path: Path, image: Image.Image) -> None:
    write_image(path, image, quality=92)


def write_ukb(root: Path, num_cases: int, seed: int, size: Sequence[int] = _SIZE) -> None:
    """Write people in the layout of UK Biobank: two eyes each, genotypes, scores, burden scores and phenotypes.

    The fifth person has one eye only; the last one but one has no genotypes and no score.
    """
    num_cases = 4 * num_cases
    people = People(num_cases, seed)
    eids = [str(1_000_000 + 17 * index) for index in range(num_cases)]
    rng = numpy_generator("synthetic", "ukb", seed)
    facts = []
    for person, eid in enumerate(eids):
        own = numpy_generator("synthetic", "ukb", seed, person)
        for field in FIELDS[: 1 if person == 4 else 2]:
            eye = draw_fundus(own, people.grade(person), size=size)
            _save(root / "fundus" / eid[:2] / f"{eid}_{field}_0_0.png", eye)
        risk = people.risk[person]
        facts.append(
            {
                "eid": eid,
                "31-0.0": int(own.integers(2)),
                "21022-0.0": round(56 + 4 * risk + own.normal(0, 4), 1),
                "21001-0.0": round(27 + 2 * risk + own.normal(0, 2), 2),
                "20116-0.0": int(own.choice([0, 1, 2, -3], p=[0.5, 0.2, 0.25, 0.05])),
                "4080-0.0": round(138 + 8 * risk + own.normal(0, 8)),
                "4080-0.1": round(136 + 8 * risk + own.normal(0, 8)),
                "4079-0.0": round(82 + 4 * risk + own.normal(0, 5)),
                "4079-0.1": "",
            }
        )
    _table(root / "phenotypes.csv", facts)
    _table(root / "ancestry.tsv", [{"IID": eid, "EUR": 0.999} for eid in eids], "\t")
    known = [person for person in range(num_cases) if person != num_cases - 2]
    chosen = People(num_cases, seed)
    for name in ("counts", "missing", "risk"):
        setattr(chosen, name, getattr(people, name)[known])
    names = [eids[person] for person in known]
    _genotypes(root / "genetics", chosen, names)
    _scores(root / "pgs", chosen, names, rng)
    _burden(root / "burden" / "combined_burdens.h5", names, rng)


def write_tcga(root: Path, num_cases: int, seed: int) -> None:
    """Write gliomas in the layout of Pathomic Fusion: one or two regions per patient, omics and grades.

    The last patient has omics and no region, the one before a region and no grade.
    """
    num_cases = max(2 * num_cases, 18)
    omics, grades = [], []
    for index in range(num_cases):
        rng = numpy_generator("synthetic", "tcga", seed, index)
        patient, grade = f"TCGA-{index % 7:02d}-{1000 + index}", 2 + index % 3
        copies = np.clip(np.rint(rng.normal(0, 0.6, 79) + 0.8 * (np.arange(79) % 3 == index % 3)), -2, 2)
        row = {"indexes": index, "TCGA ID": patient, "censored": 0, "Survival months": 20 + index,
               "codeletion": int(grade == 2), "idh mutation": int(grade < 4)}  # fmt: skip
        omics.append(row | {f"GENE{gene}_copy": int(value) for gene, value in enumerate(copies)})
        known = "" if index == num_cases - 2 else grade
        grades.append({"TCGA ID": patient, "Histology": "astrocytoma", "Grade": known, "age": 50, "gender": "male"})
        if index < num_cases - 1:
            for region in range(1 + index % 2):
                name = f"{patient}-01Z-00-DX1.{index:08X}_{region + 1}.png"
                _save(root / "all_st" / name, draw_region(rng, grade))
    omics[0]["GENE0_copy"] = ""
    _table(root / "all_dataset.csv", omics)
    _table(root / "grade_data.csv", grades)


def write_aptos(root: Path, num_cases: int, seed: int, size: Sequence[int] = _SIZE) -> None:
    """Write graded eyes in the layout of APTOS 2019, all grades alike."""
    rows = []
    for index in range(5 * num_cases):
        name, grade = f"{index + 0xA0000:012x}", index % 5
        eye = draw_fundus(numpy_generator("synthetic", "aptos", seed, index), grade, size=size)
        _save(root / "train_images" / f"{name}.png", eye)
        rows.append({"id_code": name, "diagnosis": grade})
    _table(root / "train.csv", rows)


def write_idrid(root: Path, num_cases: int, seed: int, size: Sequence[int] = _SIZE) -> None:
    """Write graded eyes in the layout of IDRiD; names count from 1 in both parts."""
    base = root / "B. Disease Grading"
    columns = ("Image name", "Retinopathy grade", "Risk of macular edema ", "")
    for part, letter, share in (("Training", "a", 4), ("Testing", "b", 2)):
        rows = []
        for index in range(share * num_cases):
            grade, name = index % 5, f"IDRiD_{index + 1:03d}"
            eye = draw_fundus(numpy_generator("synthetic", "idrid", seed, part, index), grade, size=size)
            _save(base / "1. Original Images" / f"{letter}. {part} Set" / f"{name}.jpg", eye)
            rows.append((name, grade, min(grade, 2), ""))
        write_table(base / "2. Groundtruths" / f"{letter}. IDRiD_Disease Grading_{part} Labels.csv", columns, rows)


def write_rfmid(root: Path, num_cases: int, seed: int, size: Sequence[int] = _SIZE) -> None:
    """Write eyes with conditions in the layout of RFMiD: lesions, atrophy, and one that never occurs."""
    parts = (("Training_Set", "Training", "Training", 4), ("Evaluation_Set", "Validation", "Validation", 2),
             ("Test_Set", "Testing", "Test", 2))  # fmt: skip
    for folder, word, images, share in parts:
        rows = []
        for index in range(share * num_cases):
            rng = numpy_generator("synthetic", "rfmid", seed, word, index)
            lesions, atrophy = index % 2, index // 2 % 2
            place = root / folder / folder / images / f"{index + 1}.png"
            _save(place, draw_fundus(rng, 4 * lesions, bool(atrophy), size))
            rows.append((index + 1, int(lesions or atrophy), lesions, atrophy, 0))
        table = root / folder / folder / f"RFMiD_{word}_Labels.csv"
        write_table(table, ("ID", "Disease_Risk", "DR", "MYA", "HR"), rows)


def write_palm(root: Path, num_cases: int, seed: int, size: Sequence[int] = _SIZE) -> None:
    """Write eyes with masks in the layout of PALM; every other one has atrophy."""
    base = root / "PALM-Training400"
    for index in range(2 * num_cases):
        name = f"{'P' if index % 2 else 'H'}{index + 1:04d}"
        key = ("synthetic", "palm", seed, index)
        image = draw_fundus(numpy_generator(*key), 0, bool(index % 2), size)
        _save(base / "PALM-Training400" / f"{name}.jpg", image)
        pixels = np.asarray(image).astype(int)
        disc = (pixels[..., 0] > 205) & (pixels[..., 1] > 170)
        pale = np.abs(pixels - np.asarray(draw_fundus(numpy_generator(*key), 0, False, size)).astype(int)).sum(-1) > 40
        for mask, place in ((disc, base / "Disc_Masks"), (pale, base / "Lesion_Masks" / "Atrophy")):
            if place.name == "Disc_Masks" or index % 2:
                _save(place / f"{name}.bmp", Image.fromarray(np.where(mask, 0, 255).astype(np.uint8)))
