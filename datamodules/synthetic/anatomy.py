"""Synthetic anatomy: brains with tumours, zonal prostates, lungs. For trying out the code, never for results.

A case is drawn from shared structure (tissue classes, a texture that every contrast sees with its own sign, a scanner's
gain and bias field), so that a hidden modality can be inferred from the visible ones, and a constant cannot be right.
All arrays are RAS.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

Array = NDArray[np.float32]

# Mean intensity of CSF, grey matter, white matter, deep nuclei, necrosis, oedema, enhancing tumour; texture's sign.
_BRAIN_CONTRASTS: Mapping[str, Sequence[float]] = {
    "t1c": (0.16, 0.42, 0.58, 0.50, 0.20, 0.40, 0.98, -0.5),
    "t1n": (0.14, 0.45, 0.66, 0.56, 0.24, 0.42, 0.44, -0.6),
    "t2f": (0.10, 0.52, 0.40, 0.44, 0.46, 0.95, 0.72, 0.5),
    "t2w": (0.95, 0.55, 0.36, 0.42, 0.84, 0.78, 0.62, 0.6),
}

# Further sequences of archives of several sources, likewise.
_MORE_CONTRASTS: Mapping[str, Sequence[float]] = {
    "mra": (0.12, 0.34, 0.30, 0.36, 0.15, 0.22, 0.62, -0.3),
    "pd": (0.72, 0.82, 0.60, 0.66, 0.70, 0.92, 0.80, 0.4),
    "dwi": (0.14, 0.50, 0.44, 0.40, 0.30, 0.62, 0.90, 0.3),
    "adc": (0.96, 0.46, 0.40, 0.38, 0.90, 0.74, 0.34, -0.3),
}


class BrainCase(NamedTuple):
    """A brain.

    Attributes:
        images: Modality to float32 ``(X, Y, Z)``, 0 outside the brain.
        label: uint8: 1 necrotic core, 2 oedema, 3 enhancing tumour.
        mutant: Whether the tumour enhances little (a substitute for IDH-mutant).
    """

    images: dict[str, Array]
    label: NDArray[np.uint8]
    mutant: bool


def _noise(rng: np.random.Generator, shape: Sequence[int], smooth: float) -> Array:
    """Draw a smooth random field with mean 0 and standard deviation 1."""
    field = gaussian_filter(rng.standard_normal(shape).astype(np.float32), smooth, mode="reflect")
    return (field - field.mean()) / max(float(field.std()), 1e-6)


def _grid(rng: np.random.Generator, shape: Sequence[int], bend: float) -> Array:
    """Return bent, turned and scaled coordinates ``(3, X, Y, Z)``, about -1 to 1 inside the organ."""
    axes = [np.linspace(-1.15, 1.15, size, dtype=np.float32) for size in shape]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"))
    angle = rng.uniform(-0.12, 0.12, 3)
    turn = np.eye(3)
    for axis, (a, b) in enumerate(((1, 2), (0, 2), (0, 1))):
        step = np.eye(3)
        cosine, sine = np.cos(angle[axis]), np.sin(angle[axis])
        step[[a, a, b, b], [a, b, a, b]] = cosine, -sine, sine, cosine
        turn = turn @ step
    grid = np.einsum("ij,jxyz->ixyz", turn.astype(np.float32), grid) * rng.uniform(0.94, 1.06, 3)[:, None, None, None]
    smooth = min(shape) / 8
    return (grid + bend * np.stack([_noise(rng, shape, smooth) for _ in range(3)])).astype(np.float32)


def _ellipsoid(grid: Array, center: Sequence[float], radii: Sequence[float]) -> Array:
    """Return the radius in an ellipsoid's own units: below 1 inside."""
    scaled = [(grid[i] - center[i]) / radii[i] for i in range(3)]
    return np.sqrt(sum(part**2 for part in scaled)).astype(np.float32)


def _tissues(
    rng: np.random.Generator, grid: Array, shape: Sequence[int]
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Return the brain mask and a map of 0 CSF, 1 grey, 2 white, 3 deep nuclei."""
    radius = _ellipsoid(grid, (0, 0, 0), (0.86, 1.0, 0.9))
    brain = radius < 1
    folds = _noise(rng, shape, 1.6)
    depth = (1 - radius) + 0.05 * folds
    tissue = np.full(shape, 2)
    tissue[depth < 0.14] = 1
    tissue[(depth < 0.05) | ((np.abs(grid[0]) < 0.02) & (grid[2] > 0.1))] = 0
    for side in (-1, 1):
        size = rng.uniform(0.8, 1.3)
        tissue[_ellipsoid(grid, (side * 0.25, -0.02, -0.05), (0.12, 0.2, 0.16)) < 1] = 3
        tissue[_ellipsoid(grid, (side * 0.13, 0.05, 0.12), (0.07 * size, 0.42 * size, 0.14 * size)) < 1] = 0
    return brain, tissue


def _tumour(
    rng: np.random.Generator, grid: Array, brain: NDArray, shape: Sequence[int], mutant: bool
) -> NDArray[np.uint8]:
    """Return a label with a necrotic core, an enhancing rim and oedema around both."""
    side = rng.choice([-1, 1])
    center = (side * rng.uniform(0.25, 0.5), rng.uniform(-0.45, 0.45), rng.uniform(-0.2, 0.45))
    size = rng.uniform(0.16, 0.3)
    rough = 0.18 * _noise(rng, shape, 3.0)
    radius = _ellipsoid(grid, center, (size * rng.uniform(0.8, 1.25, 3)).tolist()) + rough
    rim = 0.12 if mutant else rng.uniform(0.3, 0.5)
    label = np.zeros(shape, dtype=np.uint8)
    label[radius < rng.uniform(1.5, 2.0)] = 2
    label[radius < 1] = 3
    label[radius < 1 - rim] = 1
    return np.where(brain, label, 0).astype(np.uint8)


def make_brain(rng: np.random.Generator, shape: Sequence[int], more: Sequence[str] = ()) -> BrainCase:
    """Draw a brain with a tumour in four co-registered contrasts, and in ``more`` of mra, pd, dwi and adc."""
    grid = _grid(rng, shape, 0.04)
    brain, tissue = _tissues(rng, grid, shape)
    mutant = bool(rng.random() < 0.5)
    label = _tumour(rng, grid, brain, shape, mutant)
    classes = np.where(label > 0, label + np.array([0, 3, 3, 3])[label], tissue)
    classes = np.select([label == 1, label == 2, label == 3], [4, 5, 6], default=classes)
    texture = _noise(rng, shape, 2.5)
    images = {}
    for name, values in (*_BRAIN_CONTRASTS.items(), *((extra, _MORE_CONTRASTS[extra]) for extra in more)):
        means = np.array(values[:7]) * rng.uniform(0.93, 1.07, 7)
        image = gaussian_filter(means[classes].astype(np.float32), 0.6)
        image *= 1 + 0.12 * values[7] * texture
        image *= np.exp(0.1 * _noise(rng, shape, min(shape) / 3))
        image += 0.015 * rng.standard_normal(shape)
        gain = np.exp(rng.uniform(np.log(300), np.log(2500)))
        images[name] = np.where(brain, np.maximum(image, 0.01) * gain, 0).astype(np.float32)
    return BrainCase(images, label, mutant)


class ProstateCase(NamedTuple):
    """A prostate on the T2 grid.

    Attributes:
        images: t2w, adc (10^-6 mm^2/s) and hbv, float32 ``(X, Y, Z)``.
        zones: uint8: 1 peripheral, 2 transition zone.
        significant: Whether there is a clinically significant lesion.
    """

    images: dict[str, Array]
    zones: NDArray[np.uint8]
    significant: bool


def make_prostate(rng: np.random.Generator, shape: Sequence[int]) -> ProstateCase:
    """Draw a pelvis with a zonal gland, half of them with a lesion in the peripheral zone."""
    grid = _grid(rng, shape, 0.03)
    size = rng.uniform(0.85, 1.15)
    gland = _ellipsoid(grid, (0, 0, 0), (0.52 * size, 0.42 * size, 0.7 * size)) + 0.03 * _noise(rng, shape, 3)
    inner = _ellipsoid(grid, (0, 0.08, 0.05), (0.34 * size, 0.28 * size, 0.56 * size)) + 0.03 * _noise(rng, shape, 2)
    zones = np.zeros(shape, dtype=np.uint8)
    zones[gland < 1] = 1
    zones[(inner < 1) & (gland < 1)] = 2
    significant = bool(rng.random() < 0.5)
    side = rng.choice([-1, 1])
    spot = _ellipsoid(grid, (side * 0.3 * size, -0.22 * size, rng.uniform(-0.2, 0.2)), (0.12, 0.1, 0.2))
    lesion = (spot < 1) & (zones == 1) & significant
    rectum = _ellipsoid(grid, (0, -0.78, 0), (0.25, 0.22, 2)) < 1
    muscle = (np.abs(grid[0]) > 0.75) & (np.abs(grid[1]) < 0.6)
    nodules = _noise(rng, shape, 1.5)
    region = np.select([lesion, zones == 1, zones == 2, rectum, muscle], [0, 1, 2, 3, 4], default=5)
    means = {
        "t2w": (0.30, 0.85, 0.50, 0.15, 0.20, 0.65),
        "adc": (700.0, 1750.0, 1350.0, 300.0, 1200.0, 900.0),
        "hbv": (0.95, 0.35, 0.40, 0.10, 0.25, 0.20),
    }
    images = {}
    for name, values in means.items():
        grain = 1 + 0.10 * nodules * (1 if name == "hbv" else -1) * (zones == 2)
        image = np.array(values, dtype=np.float32)[region] * grain
        image = gaussian_filter(image, (0.8, 0.8, 0.3)) * np.exp(0.08 * _noise(rng, shape, min(shape) / 2))
        image *= 1 + 0.03 * rng.standard_normal(shape)
        images[name] = (np.maximum(image, 0) * (1 if name == "adc" else 900)).astype(np.float32)
    return ProstateCase(images, zones, significant)


class LungCase(NamedTuple):
    """A chest.

    Attributes:
        images: 1h (proton) and xe (inhaled xenon), float32 ``(X, Y, Z)``.
        cavity: uint8 mask of the thoracic cavity.
        ventilated: uint8 mask of what the gas reached.
        disease: Whether large parts are not ventilated.
    """

    images: dict[str, Array]
    cavity: NDArray[np.uint8]
    ventilated: NDArray[np.uint8]
    disease: bool


def make_lung(rng: np.random.Generator, shape: Sequence[int]) -> LungCase:
    """Draw a chest with two lungs and ventilation defects."""
    grid = _grid(rng, shape, 0.03)
    body = _ellipsoid(grid, (0, 0, 0), (1.0, 0.75, 1.6)) < 1
    lungs = np.zeros(shape, dtype=bool)
    for side in (-1, 1):
        lungs |= _ellipsoid(grid, (side * 0.45, 0, 0), (0.34, 0.5, 0.9)) + 0.03 * _noise(rng, shape, 3) < 1
    disease = bool(rng.random() < 0.5)
    field = _noise(rng, shape, 4)
    threshold = np.quantile(field[lungs], rng.uniform(0.2, 0.45) if disease else rng.uniform(0.01, 0.06))
    ventilated = lungs & (field > threshold)
    proton = np.where(lungs, 0.12, np.where(body, 0.7, 0.02)) + 0.1 * body * ~lungs * _noise(rng, shape, 2)
    xenon = np.where(ventilated, 0.75 + 0.12 * field, 0.03)
    images = {}
    for name, image in (("1h", proton), ("xe", xenon)):
        noisy = gaussian_filter(image.astype(np.float32), 0.7) + 0.02 * rng.standard_normal(shape)
        images[name] = (np.abs(noisy) * np.exp(0.1 * _noise(rng, shape, 8)) * 800).astype(np.float32)
    return LungCase(images, lungs.astype(np.uint8), ventilated.astype(np.uint8), disease)
