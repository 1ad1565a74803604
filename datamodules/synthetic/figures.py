"""Synthetic archives of figures with captions and of questions with answers, in their official layouts.

A figure shows one shape, bright or dark, in one quarter of a noisy ground; captions and answers say which. What a text
says about a figure can only be known by looking at it.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.randomness import numpy_generator
from datamodules.synthetic.tables import write_image, write_table

SHAPES = ("disc", "square", "cross", "ring", "bar", "wedge")
PLACES = ("upper left", "upper right", "lower left", "lower right")
TONES = ("bright", "dark")
_PLANES = ("axial", "coronal", "sagittal")
_MODALITIES = ("CT", "MRI", "radiograph")


class Scene(NamedTuple):
    """What a figure shows.

    Attributes:
        shape: One of ``SHAPES``.
        place: One of ``PLACES``.
        tone: One of ``TONES``.
        plane: Named in texts, and shown as the direction of stripes.
        modality: Named in texts, and shown as the grey of the ground.
    """

    shape: str
    place: str
    tone: str
    plane: str
    modality: str


def draw_scene(rng: np.random.Generator) -> Scene:
    """Draw what a figure shows."""
    choices = (SHAPES, PLACES, TONES, _PLANES, _MODALITIES)
    return Scene(*(str(options[int(rng.integers(len(options)))]) for options in choices))


def _inside(shape: str, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which points belong to a shape of size 1 about the origin."""
    radius = np.hypot(x, y)
    rules = {
        "disc": radius < 0.8,
        "square": (abs(x) < 0.7) & (abs(y) < 0.7),
        "cross": ((abs(x) < 0.25) | (abs(y) < 0.25)) & (abs(x) < 0.85) & (abs(y) < 0.85),
        "ring": (radius < 0.85) & (radius > 0.5),
        "bar": (abs(x) < 0.9) & (abs(y) < 0.25),
        "wedge": (y > -0.7) & (y < 0.7) & (abs(x) < (y + 0.8) / 2),
    }
    return rules[shape]


def draw_figure(rng: np.random.Generator, scene: Scene, size: Sequence[int] = (96, 112)) -> NDArray[np.uint8]:
    """Draw a figure, uint8 ``(H, W)``.

    Args:
        rng: Source of noise and of small shifts.
        scene: What to show.
        size: Height and width.
    """
    height, width = size
    rows, columns = np.mgrid[0:height, 0:width].astype(float)
    ground = {"CT": 0.35, "MRI": 0.5, "radiograph": 0.65}[scene.modality]
    wave = {"axial": rows, "coronal": columns, "sagittal": rows + columns}[scene.plane]
    image = ground + 0.05 * np.sin(wave * 2 * np.pi / 9)
    centre_y = height * (0.28 if "upper" in scene.place else 0.72) + rng.uniform(-3, 3)
    centre_x = width * (0.28 if "left" in scene.place else 0.72) + rng.uniform(-3, 3)
    scale = min(height, width) * rng.uniform(0.17, 0.22)
    inside = _inside(scene.shape, (columns - centre_x) / scale, (rows - centre_y) / scale)
    image = np.where(inside, 0.95 if scene.tone == "bright" else 0.05, image)
    image += 0.03 * rng.standard_normal(image.shape)
    return (np.clip(image, 0, 1) * 255).astype(np.uint8)


def caption_of(rng: np.random.Generator, scene: Scene) -> str:
    """Write a caption."""
    forms = (
        "{plane} {modality} shows a {tone} {shape} in the {place} quarter.",
        "{modality}, {plane} view: a {tone} {shape} is seen at the {place}.",
        "In the {place} there is a {tone} {shape} ({plane} {modality}).",
    )
    text = forms[int(rng.integers(len(forms)))].format(**scene._asdict())
    return f"{text[0].upper()}{text[1:]}"


def _scenes(
    layout: str, num_cases: int, seed: int, splits: Sequence[str] = ("train", "val", "test")
) -> Iterator[tuple[int, np.random.Generator, Scene, str]]:
    """Yield eight scenes per case: number, source of all that is drawn for it, scene, and split.

    The last eighth is for testing, the eighth before it for validation.
    """
    for index in range(8 * num_cases):
        rng = numpy_generator("synthetic", layout, seed, index)
        yield index, rng, draw_scene(rng), splits[max(0, index // num_cases - 5)]


def _save(path: Path, rng: np.random.Generator, scene: Scene) -> None:
    write_image(path, draw_figure(rng, scene), quality=75)


def write_medicat(root: Path, num_cases: int, seed: int) -> None:
    """Write MedICaT: eight figures per case, every third with a sentence that refers to it; one caption is null."""
    rows = []
    for index, rng, scene, _ in _scenes("medicat", num_cases, seed):
        paper, figure = f"{index // 2:040x}", f"{index % 2 + 2}-Figure{index % 2 + 1}-1.png"
        _save(root / "release/figures" / f"{paper}_{figure}", rng, scene)
        references = [f"As {caption_of(rng, scene)[:-1].lower()}, we agree (Figure {index % 2 + 1})."]
        rows.append(
            {
                "pdf_hash": paper,
                "fig_key": f"Figure{index % 2 + 1}",
                "fig_uri": figure,
                "s2_caption": None if index == 1 else f"Figure {index % 2 + 1}. {caption_of(rng, scene)}",
                "s2orc_caption": caption_of(rng, scene),
                "s2orc_references": references if index % 3 == 0 else None,
                "radiology": index % 16 != 5,
                "scope": False,
                "predicted_type": "Medical images",
                "oa_info": {"doi": None, "oa": {"license": None}},
            }
        )
    path = root / "release/s2_full_figures_oa_nonroco_combined_medical_top4_public.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_roco(root: Path, num_cases: int, seed: int) -> None:
    """Write ROCO, eight figures per case, under the authors' names in training and the fetched ones elsewhere."""
    captions: dict[str, list[str]] = defaultdict(list)
    links: dict[str, list[str]] = defaultdict(list)
    for index, rng, scene, split in _scenes("roco", num_cases, seed, ("train", "validation", "test")):
        name, paper, original = f"ROCO_{index + 1:05d}", f"PMC{3970000 + index}", f"fig{index}.jpg"
        folder = root / split / "radiology/images"
        _save(folder / (f"{name}.jpg" if split == "train" else f"{paper}_{original}"), rng, scene)
        captions[split].append(f"{name}\t {caption_of(rng, scene)}\n")
        address = f"wget -r ftp://ftp.ncbi.nlm.nih.gov/pub/pmc/oa_package/8d/34/{paper}.tar.gz -P /path/to/Dir"
        links[split].append(f"{name}\t{address}\t{original}\n")
    for split in captions:
        (root / split / "radiology/captions.txt").write_text("".join(captions[split]))
        (root / split / "radiology/dlinks.txt").write_text("".join(links[split]))


def _questions(scene: Scene, rng: np.random.Generator) -> list[tuple[str, str, str]]:
    """Return question, answer and kind: about the shape, its place and, to be answered with yes or no, its tone."""
    other = str(rng.choice([name for name in SHAPES if name != scene.shape]))
    asked = scene.shape if rng.random() < 0.5 else other
    return [
        ("What shape is shown?", scene.shape.capitalize(), "OPEN"),
        ("Where is the lesion?", scene.place, "OPEN"),
        ("Is the lesion bright?", "Yes" if scene.tone == "bright" else "no", "CLOSED "),
        (f"Is there a {asked}?", "yes" if asked == scene.shape else "No", "CLOSED"),
    ]


def write_vqa_rad(root: Path, num_cases: int, seed: int) -> None:
    """Write VQA-RAD, eight images per case, in its community split; the last eighth of the images is tested on."""
    parts: dict[str, list[dict[str, object]]] = defaultdict(list)
    for index, rng, scene, split in _scenes("vqa_rad", num_cases, seed, ("train", "train", "test")):
        _save(root / "images" / f"synpic{index:05d}.jpg", rng, scene)
        for question, answer, kind in _questions(scene, rng):
            parts[split].append(
                {"qid": len(parts[split]) + 1, "image_name": f"synpic{index:05d}.jpg", "image_organ": "CHEST",
                 "answer": answer, "answer_type": kind, "question_type": "PRES", "question": question,
                 "phrase_type": "freeform" if split == "train" else "test_freeform"}
            )  # fmt: skip
    for split, rows in parts.items():
        (root / f"{split}set.json").write_text(json.dumps(rows))


def write_slake(root: Path, num_cases: int, seed: int) -> None:
    """Write SLAKE, eight images per case, with one question in Chinese and one answer empty."""
    parts: dict[str, list[dict[str, object]]] = defaultdict(list)
    for index, rng, scene, split in _scenes("slake", num_cases, seed, ("train", "validate", "test")):
        _save(root / "imgs" / f"xmlab{index}" / "source.jpg", rng, scene)
        for number, (question, answer, kind) in enumerate(_questions(scene, rng)):
            parts[split].append(
                {"img_id": index, "img_name": f"xmlab{index}/source.jpg", "question": question,
                 "answer": "" if (index, number) == (1, 1) else answer, "q_lang": "en", "location": "Chest",
                 "modality": scene.modality, "answer_type": kind.strip(), "base_type": "vqa",
                 "content_type": "Position" if number == 1 else "Shape", "triple": ["vhead", "_", "_"],
                 "qid": 4 * index + number}
            )  # fmt: skip
    parts["train"].append({**parts["train"][0], "question": "这是什么形状?", "q_lang": "zh", "qid": 10**6})
    for split, rows in parts.items():
        (root / f"{split}.json").write_text(json.dumps(rows, ensure_ascii=False))


def write_vqa_med_2019(root: Path, num_cases: int, seed: int) -> None:
    """Write VQA-Med-2019, eight images per case; some answers have alternatives or parts that may be left out."""
    training = "ImageClef-2019-VQA-Med-Training"
    folders = {"train": training, "val": training.replace("Training", "Validation"), "test": "VQAMed2019Test"}
    images = {"train": "Train_images", "val": "Val_images", "test": "VQAMed2019_Test_Images"}
    lines: dict[tuple[str, str], list[str]] = {}
    for index, rng, scene, split in _scenes("vqa_med_2019", num_cases, seed):
        name = f"synpic{index:05d}"
        _save(root / folders[split] / images[split] / f"{name}.jpg", rng, scene)
        asked = {
            "C1_Modality": ("what modality was used to take this image?", f"{scene.modality} (with contrast)"),
            "C2_Plane": ("in what plane\twas this image taken?", scene.plane),
            "C3_Organ": ("what is shown in the image?", f"{scene.shape}#{scene.tone} {scene.shape}"),
            "C4_Abnormality": ("what is abnormal in the image", f"{scene.tone} {scene.shape}, {scene.place}"),
        }
        for category, (question, answer) in asked.items():
            kind = category.split("_")[1].lower()
            line = f"{name}|{kind}|{question}|{answer}" if split == "test" else f"{name}|{question}|{answer}"
            lines.setdefault((split, category), []).append(f"{line} \r\n")
    for (split, category), rows in lines.items():
        folder = root / folders[split]
        if split == "test":
            with (folder / "VQAMed2019_Test_Questions_w_Ref_Answers.txt").open("a", newline="") as file:
                file.writelines(rows)
        else:
            (folder / "QAPairsByCategory").mkdir(exist_ok=True)
            (folder / "QAPairsByCategory" / f"{category}_{split}.txt").write_text("".join(rows), newline="")


def write_melinda(root: Path, num_cases: int, seed: int) -> None:
    """Write MELINDA, eight figures per case, two rows per figure; captions name everything but the shape, the class."""
    header = ("figure_file", "caption", "i_meth", "p_meth", "i_meth_label", "p_meth_label")
    rows: dict[str, list[tuple[str, ...]]] = defaultdict(list)
    for index, rng, scene, split in _scenes("melinda", num_cases, seed, ("train", "dev", "test")):
        name = f"figure_{index:04d}.png"
        _save(root / "melinda_images" / name, rng, scene)
        for part in ("A", "B"):
            text = f"({part}) {scene.plane} {scene.modality}, the {scene.place} quarter is stained {scene.tone}."
            rows[split].append((name, text, scene.plane, scene.shape, scene.plane, scene.shape))
    for split, table in rows.items():
        write_table(root / f"{split}.csv", header, table)
