"""What a start costs in imports, and what the caches buy: a crop from them against reading the files."""

import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image

from common.sweeps.bench import Row, in_turn, one_thread, speedup
from datamodules.images.cache import ImageCache
from datamodules.images.crops import cut_box, random_box
from datamodules.registry import open_archive
from datamodules.synthetic.anatomy import make_brain
from datamodules.synthetic.radiographs import draw_findings, draw_image
from datamodules.volumes.brats import BRATS2023
from datamodules.volumes.cache import CacheFormat, VolumeCache
from datamodules.volumes.cases import Case
from datamodules.volumes.crops import cut, to_tensor
from datamodules.volumes.profiles import prepared
from datamodules.volumes.reading import write_nifti

_SHAPE, _CROP = (240, 240, 155), (96, 96, 96)


def _official_case(root: Path) -> Case:
    """Write one brain at the official size, with the official share of air."""
    brain = make_brain(np.random.default_rng(0), (140, 176, 140))
    images = {}
    for name, image in brain.images.items():
        full = np.zeros(_SHAPE, dtype=np.int16)
        full[50:190, 32:208, 8:148] = np.rint(image)
        images[name] = root / "BraTS-GLI-00000-000" / f"BraTS-GLI-00000-000-{name}.nii.gz"
        write_nifti(images[name], full, np.diag([-1.0, -1.0, 1.0, 1.0]))
    return Case("BraTS-GLI-00000-000", "BraTS-GLI-00000", images)


def cached_crop() -> list[Row]:
    """Compare a cached 96^3 crop of four modalities with reading four ``.nii.gz`` of 240 x 240 x 155.

    By CPU time of one thread, which is what a loader worker has.
    """
    rows = []
    with tempfile.TemporaryDirectory() as folder, one_thread():
        root = Path(folder)
        case = _official_case(root)
        layout = prepared(open_archive(root, BRATS2023.name, {"volumes"}))

        def read_files() -> None:
            for path in case.images.values():
                np.asanyarray(nib.Nifti1Image.from_filename(path).dataobj)

        targets: list[tuple[CacheFormat, float]] = [("npy", 40), ("b2nd", 10)]
        for format, target in targets:
            cache = VolumeCache(root, layout, format, folder=root / "cache")
            cache.build(case)
            rng = np.random.default_rng(1)

            def crop(cache: VolumeCache = cache, rng: np.random.Generator = rng) -> None:
                image = cache.open(case).image
                start = [int(rng.integers(0, size - n + 1)) for size, n in zip(image.shape[1:], _CROP, strict=True)]
                to_tensor(cut(image, start, _CROP))

            slow, fast = in_turn(read_files, crop, clock=time.process_time)
            size = sum(path.stat().st_size for path in cache.case_folder(case.case_id).iterdir())
            share = size / sum(path.stat().st_size for path in case.images.values())
            detail = f"CPU time of one thread; {share:.1f} x the files' size"
            rows.append(
                Row(f"cached 96^3 crop ({format}) against reading four .nii.gz", speedup(slow, fast), target, detail)
            )
    return rows


def _radiograph(path: Path) -> None:
    """Write a radiograph of the official size, with film noise: 2000 x 2500, about 1.5 MB."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(draw_image(rng, draw_findings(rng))).resize((2500, 2000), Image.Resampling.BICUBIC)
    noisy = np.asarray(small, dtype=np.float32) + rng.normal(0, 4, (2000, 2500))
    Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(path, quality=95)


def cached_radiograph() -> list[Row]:
    """Compare a training crop of a cached radiograph with decoding a JPEG of 2000 x 2500 as the published code does."""
    with tempfile.TemporaryDirectory() as folder, one_thread():
        path = Path(folder) / "radiograph.jpg"
        _radiograph(path)
        cache = ImageCache(folder, 512, folder=Path(folder) / "cache")
        cache.ensure([path], progress=False)
        rng = np.random.default_rng(1)

        def decode() -> None:
            with Image.open(path) as file:
                image = file.convert("RGB")
            image.resize((448, 448), Image.Resampling.BICUBIC, box=random_box(image.size[::-1], (0.2, 1.0), rng))

        def crop() -> None:
            pixels = cache.open(path)
            cut_box(pixels, random_box(pixels.shape, (0.2, 1.0), rng), (448, 448))

        slow, fast = in_turn(decode, crop, rounds=15, clock=time.process_time)
    detail = "CPU time of one thread, both with a random crop to 448 x 448"
    return [Row("cached radiograph against decoding a JPEG of 2000 x 2500", speedup(slow, fast), 20, detail)]


def imports() -> list[Row]:
    """Compare importing the ``lightning`` command with what Lightning cannot do without, torch and its compiler.

    By CPU time of processes started in turn.
    """

    def start(code: str) -> None:
        subprocess.run([sys.executable, "-c", code], check=True)

    def children() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    torch, command = in_turn(
        lambda: start("import torch, torch._dynamo"), lambda: start("import common.cli"), rounds=5, clock=children
    )
    detail = "CPU time of processes; 0.77 is 1.30 times as long"
    return [Row("imports: torch against the command and all it needs", speedup(torch, command), 0.77, detail)]


ROWS: list[Callable[[], list[Row]]] = [imports, cached_crop, cached_radiograph]
