"""Synthetic chest radiographs with reports. For trying out the code, never for results.

A picture is drawn from what X-rays cross: soft tissue, air that the lungs hold and that heart, fluid and consolidation
take away, bones and tubes. Its report says what is drawn and on which side, denies some of what is absent, and pads
both with what any report says. The patient's right is at the image's left.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from datamodules.synthetic.tables import packaged

Array = NDArray[np.floating]
_T = TypeVar("_T")
# Points, width, brightness.
_Stroke = tuple[Sequence[tuple[float, float]], float, float]

SIDED_FINDINGS = ("effusion", "pneumothorax", "nodule", "consolidation")
FINDINGS = (*SIDED_FINDINGS, "cardiomegaly", "devices")
SIDES = ("left", "right", "both")
PHRASES = packaged("phrases.yaml")
CHEXPERT_COLUMNS = (*sorted([*PHRASES["column_words"], "No Finding", "Pleural Other"]),)
_TITLE = " " * 33 + "FINAL REPORT"

# The patient's right is at the image's left.
_SIGNS: Mapping[str, Sequence[int]] = {"": (), "left": (1,), "right": (-1,), "both": (-1, 1)}
_AIRWAY: Sequence[_Stroke] = (
    (((0, -1.2), (0, -0.3)), 0.08, 1),
    (((0, -0.3), (-0.17, -0.1)), 0.06, 0.8),
    (((0, -0.3), (0.2, -0.08)), 0.05, 0.8),
)
_TUBES: Sequence[_Stroke] = (
    (((0.03, -1.3), (0.01, -0.8), (0.005, -0.42)), 0.035, 0.8),
    (((-0.03, -1.3), (-0.02, -0.5), (0.03, 0.2), (0.08, 0.5), (0.2, 0.64), (0.36, 0.68)), 0.02, 0.9),
)
_LETTER: Sequence[_Stroke] = ((((1.0, -0.89), (1.0, -0.79), (1.06, -0.79)), 0.02, 1),)


class Report(NamedTuple):
    """A report and what it says.

    Attributes:
        text: The whole report: preamble, sections, 79 columns.
        labels: CheXpert column to 1.0 said, 0.0 denied, -1.0 uncertain; a column that is not mentioned is absent.
    """

    text: str
    labels: dict[str, float]


class _Film(NamedTuple):
    """Where a chest lies on its film: coordinates ``(H, W)`` from the chest's middle, to the image's right and down."""

    x: Array
    y: Array
    unit: float
    turn: complex
    shift: complex

    def strokes(self, strokes: Sequence[_Stroke], blur: float) -> Array:
        """Draw lines, each through points with a width in the chest's units and a brightness up to 1."""
        height, width = self.x.shape
        canvas = Image.new("L", (width, height))
        pen = ImageDraw.Draw(canvas)
        middle = complex((width - 1) / 2, (height - 1) / 2)
        for points, thickness, brightness in strokes:
            places = [(complex(*point) * self.turn + self.shift) * self.unit + middle for point in points]
            line = [(place.real, place.imag) for place in places]
            pen.line(line, fill=round(255 * brightness), width=max(1, round(thickness * self.unit)), joint="curve")
        blurred = canvas.filter(ImageFilter.BoxBlur(max(blur * self.unit, 0.6)))
        return np.asarray(blurred, dtype=np.float32) / 255


def _lay(rng: np.random.Generator, size: Sequence[int]) -> _Film:
    """Lay a chest on a film of ``(H, W)``, a little turned, shifted and scaled."""
    height, width = size
    unit = min(height / 2, width / 2.4) * rng.uniform(0.94, 1.06)
    turn = complex(np.exp(1j * rng.uniform(-0.06, 0.06)))
    shift = complex(*rng.uniform(-0.05, 0.05, 2))
    columns = (np.arange(width) - (width - 1) / 2) / unit - shift.real
    rows = (np.arange(height)[:, None] - (height - 1) / 2) / unit - shift.imag
    x = columns * turn.real + rows * turn.imag
    y = rows * turn.real - columns * turn.imag
    return _Film(x.astype(np.float32), y.astype(np.float32), unit, turn, shift)


def _noise(rng: np.random.Generator, shape: Sequence[int], cells: int) -> Array:
    """Draw a smooth random field with about ``cells`` bumps along the longer axis, mean 0, deviation about 1."""
    scale = cells / max(shape)
    coarse = rng.standard_normal([max(2, round(size * scale)) for size in shape]).astype(np.float32)
    image = Image.fromarray(coarse).resize((shape[1], shape[0]), Image.Resampling.BICUBIC)
    return np.asarray(image, dtype=np.float32)


def _soft(distance: Array, width: float) -> Array:
    """Return 1 where a distance is below 0 and 0 where it is above, over an edge of a width."""
    ramp = distance * (-1 / width)
    ramp += 0.5
    return np.clip(ramp, 0, 1, out=ramp)


def _radius(x: Array, y: Array, radii: Sequence[float]) -> Array:
    """Return the radius in an ellipse's own units: below 1 inside."""
    u, v = x * (1 / radii[0]), y * (1 / radii[1])
    return np.sqrt(u * u + v * v)


def _square_radius(x: Array, y: Array, radii: Sequence[float]) -> Array:
    """Return the radius in the units of an ellipse with shoulders, of power 2.5."""
    return (np.abs(x * (1 / radii[0])) ** 2.5 + np.abs(y * (1 / radii[1])) ** 2.5) ** 0.4


def _bands(phase: Array, half: float) -> Array:
    """Return ribs around whole phases, of a half width, with brighter rims."""
    distance = np.abs(phase - np.round(phase)) * (1 / half)
    return (0.6 + 0.5 * distance * distance) * _soft(distance - 1, 0.35)


class _Chest(NamedTuple):
    """The parts of one chest, seen from the front or from its side.

    Attributes:
        film: Where it lies.
        floor: Signed distance from the diaphragm, below 0 above it.
        lungs: Where the lungs are, 0 to 1.
        air: How much of what is crossed is air, 0 to 1.
        tissue: Brightness without air and bones.
        bones: Brightness that bones add.
        vessels: Lung markings, 0 to 1.
    """

    film: _Film
    floor: Array
    lungs: Array
    air: Array
    tissue: Array
    bones: Array
    vessels: Array


def _vessels(rng: np.random.Generator, hilum: tuple[float, float], angles: NDArray) -> list[_Stroke]:
    """Grow vessels from a hilum, thinner and fainter at every fork."""
    tips = np.column_stack([np.broadcast_to(hilum, (len(angles), 2)), angles + rng.normal(0, 0.08, len(angles))])
    strokes: list[_Stroke] = []
    for width, length, brightness in ((0.026, 0.15, 1.0), (0.019, 0.15, 0.8), (0.013, 0.14, 0.65), (0.008, 0.12, 0.5)):
        angle = tips[:, 2]
        step = length * rng.uniform(0.7, 1.2, (len(tips), 1))
        ends = tips[:, :2] + step * np.column_stack([np.cos(angle), 1.25 * np.sin(angle)])
        pairs = zip(tips[:, :2].tolist(), ends.tolist(), strict=True)
        strokes += [(pair, width, brightness) for pair in pairs]
        turns = [angle + rng.normal(turn, 0.12, len(tips)) for turn in (-0.3, 0.3)]
        tips = np.concatenate([np.column_stack([ends, turn]) for turn in turns])
    return strokes


def _pleura(x: Array, y: Array) -> Array:
    """Return the signed distance from the pleura of a chest seen from the front; ``x`` grows away from the middle."""
    return 0.37 * (_square_radius(x - 0.42 - 0.13 * y, y - 0.15, (0.365, 0.97)) - 1)


def _frontal_bones(rng: np.random.Generator, film: _Film, cage: Array) -> Array:
    """Draw ribs from the spine outwards and forwards again, clavicles, shoulders and the spine."""
    y, a = film.y, np.abs(film.x)
    spacing = rng.uniform(0.15, 0.165)
    phase = rng.uniform(0, 1)
    back = (y - 0.1 * a - 0.45 * np.square(np.maximum(a - 0.3, 0))) * (1 / spacing) + phase
    front = (y + 0.75 * (a - 0.8)) * (0.85 / spacing) + phase
    bones = cage * _soft(0.06 - a, 0.03) * 0.085 * _bands(back, 0.22)
    bones += cage * _soft(0.4 - a, 0.25) * 0.055 * _bands(front, 0.25)
    bones += _soft(a - 0.085, 0.03) * (0.04 + 0.03 * np.sin(y * (2 * np.pi / 0.13) + 6 * phase))
    bones += 0.13 * _soft(_radius(a - 1.08, y + 0.7, (0.15, 0.17)) - 1, 0.2)
    lift = rng.uniform(-0.04, 0.03)
    clavicle = ((0.07, -0.54), (0.3, -0.66), (0.6, -0.7), (0.98, -0.84))
    scapula = ((0.98, -0.74), (0.84, -0.42), (0.9, -0.1))
    lines = [([(s * u, v + lift) for u, v in clavicle], 0.062, 1.0) for s in (-1, 1)]
    lines += [([(s * u, v) for u, v in scapula], 0.03, 0.4) for s in (-1, 1)]
    return bones + 0.14 * film.strokes(lines, 0.01)


def _mediastinum(rng: np.random.Generator, film: _Film, scale: float) -> Array:
    """Draw heart and great vessels, the heart at a scale."""
    x, y = film.x, film.y
    usual = rng.uniform(0.92, 1.06)
    scale = scale * usual
    tilt = float(rng.uniform(0.3, 0.5))
    u, v = x - 0.05 - 0.1 * scale, y - 0.32
    u, v = u * math.cos(tilt) + v * math.sin(tilt), v * math.cos(tilt) - u * math.sin(tilt)
    tall = 1 + 0.5 * (scale - 1)
    parts = (
        _soft(_radius(u, v, (0.35 * scale, 0.26 * tall)) - 1, 0.1),
        _soft(_radius(x - 0.05 + 0.14 * scale, y - 0.3, (0.13 * scale, 0.24 * tall)) - 1, 0.15),
        _soft(np.abs(x - 0.01) - (0.14 * usual + 0.03 * np.sin(3 * y + 1.5)), 0.04),
        _soft(_radius(x - 0.12, y + 0.33, (0.1, 0.11)) - 1, 0.2),
        _soft(_radius(x - 0.13, y + 0.08, (0.11, 0.14)) - 1, 0.4),
    )
    free = 1 - parts[0]
    for part in parts[1:]:
        free *= 1 - part
    return 1 - free


def _frontal(rng: np.random.Generator, size: Sequence[int], heart: float) -> _Chest:
    """Build a chest seen from the front, its heart at a scale."""
    film = _lay(rng, size)
    x, y = film.x, film.y
    a = np.abs(x)
    depth = _pleura(a, y)
    dome = np.square((a - 0.4) * 2.5)
    left = _soft(-x, 0.02)
    floor = y - (0.44 + rng.uniform(-0.05, 0.05)) - dome * (0.12 + 0.08 * _soft(0.4 - a, 0.01)) - 0.06 * left
    lungs = _soft(depth, 0.03) * _soft(floor, 0.025)
    mediastinum = _mediastinum(rng, film, heart)
    air = lungs * (1 - mediastinum) * (1 - 0.12 * np.clip(y, -0.6, 1))

    shoulder = -0.97 + 0.45 * np.maximum(a - 0.3, 0) ** 1.5 - y
    neck = a - 0.3 - 0.25 * np.maximum(y + 0.95, 0)
    flank = a - 1.17 - 0.35 * _soft(y + 0.3, 0.7)
    tissue = 0.5 + 0.13 * np.exp(-np.square(x * 1.4)) + 0.05 * y + 0.025 * _noise(rng, x.shape, 5)
    tissue += 0.05 * mediastinum + 0.06 * _soft(-floor, 0.03) * _soft(a - 0.8, 0.3)
    tissue -= 0.12 * _soft(_radius(x - 0.4, y - 0.7, (0.13, 0.07)) - 1, 0.4)
    tissue -= 0.13 * film.strokes(_AIRWAY, 0.015)
    tissue *= _soft(np.minimum(neck, shoulder), 0.05) * _soft(flank, 0.06)

    fan = np.linspace(-1.45, 1.35, 8)
    vessels = film.strokes(_vessels(rng, (0.2, 0), fan) + _vessels(rng, (-0.2, 0), np.pi - fan), 0.006)
    cage = _soft(depth - 0.02, 0.06) * _soft(y - 0.6, 0.5) * (1 - 0.45 * mediastinum)
    return _Chest(film, floor, lungs, air, tissue, _frontal_bones(rng, film, cage), vessels)


def _lateral(rng: np.random.Generator, size: Sequence[int], heart: float) -> _Chest:
    """Build a chest seen from its side, the breastbone at the image's left, its heart at a scale."""
    film = _lay(rng, size)
    x, y = film.x, film.y
    lean = x + 0.14 * y
    depth = 0.5 * (_square_radius(lean - 0.02, y + 0.02, (0.64, 0.86)) - 1)
    floor = y - 0.36 - rng.uniform(-0.05, 0.05) - 0.75 * np.square(x + 0.2)
    lungs = _soft(depth, 0.05) * (0.6 * _soft(floor, 0.025) + 0.4 * _soft(floor + 0.07, 0.025))
    scale = heart * rng.uniform(0.92, 1.06)
    organs = _soft(_radius(x + 0.24 + 0.35 * (y - 0.26), y - 0.26, (0.3 * scale, 0.31 * scale)) - 1, 0.15)
    hilum = _soft(_radius(x - 0.02, y + 0.08, (0.13, 0.17)) - 1, 0.7)
    air = lungs * (1 - 0.85 * organs) * (1 - 0.5 * hilum)

    outline = _square_radius(lean - 0.05, y - 0.2, (0.86, 1.7)) - 1
    arms = _soft(_radius(x - 0.1, y + 1.05, (0.6, 0.35)) - 1, 0.7)
    tissue = 0.52 + 0.09 * arms + 0.08 * _soft(-floor, 0.05) + 0.025 * _noise(rng, x.shape, 5)
    tissue -= 0.06 * film.strokes([([(0.12, -1.2), (0.03, -0.2)], 0.08, 1)], 0.015)
    tissue *= _soft(outline, 0.07)

    phase = rng.uniform(0, 1)
    column = np.abs(x - 0.38 - 0.14 * np.cos(1.4 * y))
    bones = _soft(column - 0.09, 0.03) * (0.12 + 0.05 * np.sin(y * (2 * np.pi / 0.15) + 6 * phase))
    bones += 0.05 * _soft(depth - 0.03, 0.05) * _soft(floor - 0.1, 0.4) * _bands((y + 0.45 * x) * 6.2 + phase, 0.2)
    bones += 0.14 * film.strokes([([(-0.5, -0.72), (-0.62, -0.3), (-0.66, 0.2)], 0.05, 1)], 0.008)
    vessels = film.strokes(_vessels(rng, (0.02, -0.05), np.linspace(-np.pi, np.pi, 10)), 0.006)
    return _Chest(film, floor, lungs, air, tissue, bones, vessels)


def _fluid(rng: np.random.Generator, chest: _Chest, sign: int) -> Array:
    """Fill the base of one side, higher along the wall."""
    across = sign * chest.film.x
    level = rng.uniform(0.1, 0.25) * np.clip(4 * across - 0.2, 0, 1) - 0.05
    meniscus = 0.3 * np.square(np.clip(2 * across - 0.6, 0, 1.1))
    return _soft(-chest.floor - level - meniscus, 0.06)


def _gap(rng: np.random.Generator, chest: _Chest, sign: int) -> tuple[Array, Array]:
    """Shrink the lung of one side away from its apex; return the free air and the edge of the lung."""
    across = sign * chest.film.x
    shrink = 1 / rng.uniform(0.7, 0.82)
    rest = _pleura(0.25 + shrink * (across - 0.25), 0.5 + shrink * (chest.film.y - 0.5))
    inside = chest.air * (across > 0)
    return inside * _soft(-rest, 0.02), inside * np.exp(-np.square(rest * 110))


def _patch(rng: np.random.Generator, chest: _Chest, x: float) -> Array:
    """Draw a fuzzy patch in the lower half of a lung."""
    radii = rng.uniform(0.2, 0.28, 2).tolist()
    radius = _radius(chest.film.x - x, chest.film.y - rng.uniform(0.0, 0.2), radii)
    return np.exp(-(radius**4)) * np.clip(0.85 + 0.2 * _noise(rng, radius.shape, 22), 0.3, 1)


def _spot(rng: np.random.Generator, chest: _Chest, x: float) -> Array:
    """Draw a round spot in the upper half of a lung."""
    radius = _radius(chest.film.x - x, chest.film.y - rng.uniform(-0.45, -0.05), (1, 1))
    return _soft(radius - rng.uniform(0.05, 0.075), 0.025)


def _expose(rng: np.random.Generator, chest: _Chest, findings: Mapping[str, str], lateral: bool) -> Array:
    """Draw the findings into a chest and return its brightness."""
    film, air = chest.film, chest.air
    marks = 0.14 * chest.vessels + 0.015 * _noise(rng, air.shape, 60)
    extra = np.zeros_like(air)
    places = {finding: _SIGNS[side] for finding, side in findings.items()}
    for sign in places.get("consolidation", ()):
        patch = _patch(rng, chest, 0.15 if lateral else sign * rng.uniform(0.5, 0.6))
        marks = marks * (1 - patch)
        extra += 0.33 * air * patch
    for sign in places.get("nodule", ()):
        extra += 0.22 * chest.lungs * _spot(rng, chest, 0.1 if lateral else sign * rng.uniform(0.36, 0.56))
    if not lateral:
        for sign in places.get("pneumothorax", ()):
            free, edge = _gap(rng, chest, sign)
            marks = marks * (1 - free)
            extra += 0.12 * edge - 0.08 * free
    for sign in places.get("effusion", ()):
        fluid = _fluid(rng, chest, 1 if lateral else sign)
        air = air * (1 - fluid)
        extra = extra * (1 - fluid) + 0.04 * fluid * chest.lungs
    image = chest.tissue + chest.bones - 0.4 * air + marks * air + extra
    opaque = [*(_TUBES if "devices" in findings else ()), *(() if lateral else _LETTER)]
    return image + 0.3 * film.strokes(opaque, 0.002)


def _check(findings: Mapping[str, str]) -> None:
    """Refuse findings that have no picture or are at no side."""
    for finding, side in findings.items():
        if finding not in FINDINGS or side not in (SIDES if finding in SIDED_FINDINGS else ("",)):
            raise ValueError(f"There is no finding {finding!r} at side {side!r}.")


def draw_findings(rng: np.random.Generator) -> dict[str, str]:
    """Draw 0 to 3 findings, each with its side, or with empty text if it has none."""
    count = rng.choice(4, p=(0.25, 0.35, 0.27, 0.13))
    findings = rng.permutation(FINDINGS)[:count].tolist()
    return {f: str(rng.choice(SIDES, p=(0.42, 0.42, 0.16))) if f in SIDED_FINDINGS else "" for f in findings}


def draw_image(
    rng: np.random.Generator, findings: Mapping[str, str], size: Sequence[int] = (320, 384), view: str = "PA"
) -> NDArray[np.uint8]:
    """Draw a radiograph; the same generator gives the same chest with any findings.

    Args:
        rng: Source of build, pose, exposure and noise.
        findings: What to draw, and where.
        size: ``(H, W)``.
        view: ``PA``, ``AP`` or ``LATERAL``.

    Returns:
        uint8 ``(H, W)``; the patient's right is at the image's left.
    """
    _check(findings)
    anatomy, disease, film = rng.spawn(3)
    lateral = view == "LATERAL"
    heart = (1.5 if "cardiomegaly" in findings else 1) * (1.05 if view == "AP" else 1)
    chest = (_lateral if lateral else _frontal)(anatomy, size, heart)
    image = _expose(disease, chest, findings, lateral) * film.uniform(0.95, 1.1)
    image = np.clip(image, 0, 1) ** film.uniform(0.85, 1.2)
    image += film.standard_normal(image.shape, dtype=np.float32) * (0.024 - 0.02 * image)
    return (np.clip(image, 0, 1) * 255).astype(np.uint8)


def _slots(side: str) -> dict[str, str]:
    """Return the words that make a sentence refer to one side or to both."""
    words = PHRASES["slots"]["both" if side == "both" else "one"]
    return {name: word.format(side=side) for name, word in words.items()}


def _columns(text: str) -> set[str]:
    """Return the columns of CheXpert that a sentence is about."""
    return {column for column, words in PHRASES["column_words"].items() if any(word in text for word in words)}


def _pick(rng: np.random.Generator, choices: Sequence[_T]) -> _T:
    return choices[int(rng.integers(len(choices)))]


class _Statement(NamedTuple):
    """A sentence and how sure it is: 1.0 said, 0.0 denied, -1.0 uncertain, None about nothing."""

    text: str
    value: float | None


def _affirm(rng: np.random.Generator, findings: Mapping[str, str]) -> tuple[list[_Statement], list[_Statement]]:
    """State the findings: at length, and in short for the impression."""
    full: list[_Statement] = []
    short: list[_Statement] = []
    for finding, side in findings.items():
        doubt = finding in PHRASES["possible"] and rng.random() < 0.08
        for statements, sure in ((full, PHRASES["present"]), (short, PHRASES["summary"])):
            text = _pick(rng, (PHRASES["possible"] if doubt else sure)[finding]).format(**_slots(side))
            statements.append(_Statement(text, -1.0 if doubt else 1.0))
        if finding in PHRASES["remarks"] and rng.random() < 0.5:
            full.append(_Statement(*_pick(rng, PHRASES["remarks"][finding])))
    if all(finding == "devices" for finding in findings):
        short.insert(0, _Statement(_pick(rng, PHRASES["normal_summary"]), None))
    return full, short


def _deny(rng: np.random.Generator, findings: Mapping[str, str], said: set[str]) -> list[_Statement]:
    """Deny some of what is absent, each column once, and add what any report says."""
    statements = []
    allowed = [text for text, absent in PHRASES["absent"] if not any(finding in findings for finding in absent)]
    for text in rng.permutation(allowed)[: rng.integers(3, 8)].tolist():
        if not _columns(text) & said:
            said = said | _columns(text)
            statements.append(_Statement(text, 0.0))
    statements += [_Statement(text, None) for text in rng.permutation(PHRASES["filler"])[: rng.integers(1, 4)].tolist()]
    return [statements[i] for i in rng.permutation(len(statements)).tolist()]


def _labels(statements: Sequence[_Statement]) -> dict[str, float]:
    """Label a report: a statement outweighs an uncertain one, which outweighs a denial."""
    labels: dict[str, float] = {}
    for text, value in statements:
        for column in _columns(text):
            if value is not None:
                labels[column] = max(labels.get(column, 0.0), value, key=(0.0, -1.0, 1.0).index)
    if not any(value for column, value in labels.items() if column != "Support Devices"):
        labels["No Finding"] = 1.0
    return labels


def _prose(statements: Sequence[_Statement], gap: str) -> str:
    return gap.join(f"{text[0].upper()}{text[1:]}." for text, _ in statements)


def _wrap(text: str) -> str:
    return textwrap.fill(text, 79, initial_indent=" ", subsequent_indent=" ", break_on_hyphens=False)


def write_report(
    rng: np.random.Generator, findings: Mapping[str, str], view: str = "PA", sections: bool = True
) -> Report:
    """Write the report of a study in the form of MIMIC-CXR.

    Args:
        rng: Source of wording.
        findings: What is drawn, and where.
        view: What was taken: ``PA``, ``AP``, ``LATERAL``, ``PA AND LATERAL`` or ``AP AND LATERAL``.
        sections: Whether the text has section headers; some reports have none.
    """
    _check(findings)
    affirmed, short = _affirm(rng, findings)
    denied = _deny(rng, findings, set().union(*(_columns(text) for text, _ in affirmed + short)))
    full = affirmed + denied if rng.random() < 0.5 else denied + affirmed
    gap = _pick(rng, (" ", "  "))
    examination, technique = PHRASES["examinations"][view]
    technique = f"{technique[0].upper()}{technique[1:]}."
    person = _pick(rng, ("___ year old man", "___ year old woman", "___F", "___M", "Patient ___"))
    reason = f"{person} with {_pick(rng, PHRASES['symptoms'])}, {_pick(rng, PHRASES['questions'])}."
    comparison = _pick(rng, PHRASES["comparisons"])
    if not sections:
        paragraphs = [f"{technique} {reason}", f"{_prose(full, gap)}{gap}{_prose(short, gap)}"]
        return Report("\n \n".join([_TITLE, *map(_wrap, paragraphs)]) + "\n", _labels(full + short))
    numbered = len(short) > 1 and rng.random() < 0.5
    impression = [f"{i}. {_prose([s], gap)}" for i, s in enumerate(short, 1)] if numbered else [_prose(short, gap)]
    parts = [
        _wrap(f"EXAMINATION:  {examination}"),
        _wrap(f"{_pick(rng, ('INDICATION', 'HISTORY', 'REASON FOR EXAM'))}:  {reason}"),
        _wrap(f"TECHNIQUE:  {technique}"),
        _wrap(f"COMPARISON:  {comparison}"),
        f" FINDINGS:\n{_wrap(_prose(full, gap))}",
        " IMPRESSION:\n" + "\n".join(map(_wrap, impression)),
    ]
    if rng.random() < 0.15:
        parts.append(_wrap(f"NOTIFICATION:  {_pick(rng, PHRASES['notices'])}"))
    return Report("\n \n".join([_TITLE, *parts]) + "\n", _labels(full + short))
