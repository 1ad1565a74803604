"""Small synthetic trees in the official layouts, for a first run and for tests: ``medmim synthesize``.

The same code reads them as reads real archives. Some members are missing on purpose, as in any real archive.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from common.errors import UserError
from common.files import make_folder, move, remove_tree, storage_errors
from common.randomness import numpy_generator
from common.runtime.data_config import Archive
from common.runtime.reporting import print_line
from datamodules.synthetic.anatomy import make_brain, make_lung, make_prostate
from datamodules.synthetic.brain import BRAIN_WRITERS
from datamodules.synthetic.figures import (
    write_medicat,
    write_melinda,
    write_roco,
    write_slake,
    write_vqa_med_2019,
    write_vqa_rad,
)
from datamodules.synthetic.fundus import write_aptos, write_idrid, write_palm, write_rfmid, write_tcga, write_ukb
from datamodules.synthetic.labelled import write_chexpert, write_covid_cxr, write_nih, write_rsna, write_siim
from datamodules.synthetic.reports import write_mimic_cxr
from datamodules.synthetic.tables import packaged, write_table
from datamodules.volumes.reading import to_lps, write_nifti

NOTE = "SYNTHETIC.json"


def write_brats(
    root: Path, num_cases: int, seed: int, shape: Sequence[int] = (96, 112, 88), legacy: bool = False
) -> None:
    """Write brains in the layout of BraTS 2023 (or of 2017-2021), and ``idh.csv`` beside them.

    Every eighth case lacks FLAIR; the last case is a second visit of the patient before.
    """
    names = {"t1c": "t1ce", "t1n": "t1", "t2f": "flair", "t2w": "t2"} if legacy else {}
    rows = []
    for index in range(num_cases):
        rng = numpy_generator("synthetic", "brats", seed, index)
        brain = make_brain(rng, shape)
        second_visit = index == num_cases - 1 and index > 0
        case = f"BraTS-GLI-{index - second_visit:05d}-{int(second_visit):03d}"
        joint = "-"
        if legacy:
            case, joint = f"BraTS2021_{index:05d}", "_"
        for modality, image in brain.images.items():
            if modality == "t2f" and index % 8 == 2:
                continue
            data = image if modality == "t2f" else np.rint(image).astype(np.int16)
            write_nifti(root / case / f"{case}{joint}{names.get(modality, modality)}.nii.gz", *to_lps(data))
        label = np.where(brain.label == 3, 4, brain.label).astype(np.uint8) if legacy else brain.label
        write_nifti(root / case / f"{case}{joint}seg.nii.gz", *to_lps(label))
        rows.append((case, int(brain.mutant)))
    write_table(root / "idh.csv", ("case_id", "idh"), rows)


def _itk_image(data: NDArray, spacing: Sequence[float], origin: Sequence[float]) -> sitk.Image:
    """Make an axial image from a RAS array: ITK's axes run to the left and to the back."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(data[::-1, ::-1].transpose(2, 1, 0)))
    image.SetSpacing([float(s) for s in spacing])
    image.SetOrigin([float(o) for o in origin])
    return image


def write_pi_cai(root: Path, num_cases: int, seed: int, shape: Sequence[int] = (192, 192, 16)) -> None:
    """Write prostates in PI-CAI's layout: adc and hbv on a coarser grid, zonal masks, marksheet.

    The last study is a second one of the patient before; every seventh study has no zonal mask.
    """
    spacing = (0.5, 0.5, 3.0)
    rows = []
    for index in range(num_cases):
        case = make_prostate(numpy_generator("synthetic", "pi_cai", seed, index), shape)
        patient = 10000 + index - (index == num_cases - 1 and index > 0)
        study = 1000000 + index
        name = f"{patient}_{study}"
        origin = [-0.5 * s * n for s, n in zip(spacing, shape, strict=True)]
        reference = _itk_image(np.rint(case.images["t2w"]).astype(np.uint16), spacing, origin)
        folder = root / "images" / str(patient)
        folder.mkdir(parents=True, exist_ok=True)
        sitk.WriteImage(reference, str(folder / f"{name}_t2w.mha"), useCompression=True)
        coarse = sitk.Image([n // 4 for n in shape[:2]] + [shape[2]], sitk.sitkFloat32)
        coarse.SetSpacing([2.0, 2.0, 3.0])
        coarse.SetOrigin([o + 0.6 for o in origin[:2]] + [origin[2]])
        for modality in ("adc", "hbv"):
            image = _itk_image(case.images[modality], spacing, origin)
            image = sitk.Cast(sitk.Resample(image, coarse, sitk.Transform(), sitk.sitkLinear), sitk.sitkUInt16)
            sitk.WriteImage(image, str(folder / f"{name}_{modality}.mha"), useCompression=True)
        if index % 7 != 6:
            zones = root / "labels/anatomical_delineations/zonal_pz_tz/AI/HeviAI23" / f"{name}.nii.gz"
            zones.parent.mkdir(parents=True, exist_ok=True)
            sitk.WriteImage(_itk_image(case.zones, spacing, origin), str(zones), useCompression=True)
        grade = 3 if case.significant else 1
        rows.append((patient, study, "2020-01-01", 65, 7.1, 0.14, 50, "MRBx", 4, "4+3" if case.significant else "3+3",
                     grade, grade, "YES" if case.significant else "NO", "SYN"))  # fmt: skip
    write_table(root / "labels/clinical_information/marksheet.csv", packaged("layouts.yaml")["columns"]["pi_cai"], rows)


def write_lung(root: Path, num_cases: int, seed: int, shape: Sequence[int] = (96, 96, 24)) -> None:
    """Write chests in the generic layout: proton, xenon, two masks, and ``cases.csv`` with the disease."""
    rows = []
    affine = np.diag([4.0, 4.0, 8.0, 1.0])
    for index in range(num_cases):
        case = make_lung(numpy_generator("synthetic", "lung", seed, index), shape)
        name = f"lung{index:03d}"
        for modality, image in case.images.items():
            write_nifti(root / name / f"{modality}.nii.gz", np.rint(image).astype(np.int16), affine)
        write_nifti(root / name / "cavity.nii.gz", case.cavity, affine)
        write_nifti(root / name / "vent.nii.gz", case.ventilated, affine)
        rows.append((name, name, int(case.disease)))
    write_table(root / "cases.csv", ("case_id", "patient_id", "disease"), rows)


def write_brats_legacy(root: Path, num_cases: int, seed: int) -> None:
    """Write brains under the names and with the label values of 2017-2021."""
    write_brats(root, num_cases, seed, legacy=True)


WRITERS: dict[str, Callable[[Path, int, int], None]] = {
    "brats2023": write_brats,
    "brats2021": write_brats_legacy,
    "pi_cai": write_pi_cai,
    "lung": write_lung,
    "mimic_cxr": write_mimic_cxr,
    "chexpert": write_chexpert,
    "nih_cxr": write_nih,
    "rsna": write_rsna,
    "covid_cxr": write_covid_cxr,
    "siim": write_siim,
    **BRAIN_WRITERS,
    "ukb": write_ukb,
    "tcga_gbmlgg": write_tcga,
    "aptos2019": write_aptos,
    "idrid": write_idrid,
    "rfmid": write_rfmid,
    "palm": write_palm,
    "medicat": write_medicat,
    "roco": write_roco,
    "vqa_rad": write_vqa_rad,
    "slake": write_slake,
    "vqa_med_2019": write_vqa_med_2019,
    "melinda": write_melinda,
}


def synthesize(layout: str, root: Path, num_cases: int = 16, seed: int = 0) -> bool:
    """Write a synthetic tree unless it is there already; return whether it was written.

    Raises:
        UserError: the layout has no writer, or the folder holds something else.
    """
    if layout not in WRITERS:
        raise UserError(f"There is no synthetic {layout!r}; known are {', '.join(WRITERS)}.")
    facts = {"synthetic": True, "layout": layout, "cases": num_cases, "seed": seed}
    if (root / NOTE).is_file() and json.loads((root / NOTE).read_text()) == facts:
        return False
    if root.exists() and any(root.iterdir()) and not (root / NOTE).is_file():
        raise UserError(f"{root} holds other files; choose an empty folder for synthetic data.")
    root = root.absolute()
    make_folder(root.parent)
    with storage_errors(root), TemporaryDirectory(prefix=".synthetic-", dir=root.parent) as folder:
        written = Path(folder) / "tree"
        WRITERS[layout](written, num_cases, seed)
        (written / NOTE).write_text(json.dumps(facts))
        remove_tree(root, root.parent)  # empty, or one of ours
        move(written, root, root.parent)
    return True


def run(layout: str | None, config: Sequence[str] | None, out: str | None, cases: int, seed: int) -> None:
    """Carry out ``medmim synthesize``.

    Args:
        layout: Which official layout; None: the one that the configurations' ``data.root`` is named after.
        config: Configurations, where no layout is given.
        out: Folder to write; None: ``data/synthetic/LAYOUT``, or the configurations' root.
        cases: Number of cases.
        seed: Another seed, other cases.

    Raises:
        UserError: neither a layout nor a configuration was given.
    """
    if not layout and not config:
        raise UserError(f"medmim synthesize needs a layout ({', '.join(WRITERS)}) or --config.")
    root = Path(out or (f"data/synthetic/{layout}" if layout else Archive(config or ()).section["init_args"]["root"]))
    layout = layout or root.name
    written = synthesize(layout, root, cases, seed)
    state = "written to" if written else "at"
    print_line(f"synthetic {layout}: {cases} cases {state} {root} (DATA= takes your own archive)")
