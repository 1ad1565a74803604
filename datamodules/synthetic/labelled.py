"""Synthetic trees of the labelled archives of chest radiographs. For trying out the code, never for results.

Labels say what is drawn. CheXpert, ChestX-ray14 and SIIM-ACR have two cases per patient, and each finding is in one of
the two: so both classes are in every split, however small. An official split, where there is one, tests on every fourth
patient.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from common.errors import UserError
from common.randomness import numpy_generator
from datamodules.labelled.chexpert import MIXED
from datamodules.labelled.siim import NO_REGION, encode_runs
from datamodules.reports.text import mimic_text
from datamodules.synthetic.radiographs import SIDED_FINDINGS, SIDES, draw_image, write_report
from datamodules.synthetic.tables import packaged, write_image, write_table

_SIZE = (320, 384)
_VIEWS = ("PA", "AP")
# Difference in gray value where a finding is drawn; at its edge about a third of that.
_VISIBLE = 7

_LAYOUTS = packaged("layouts.yaml")
_COLUMNS = _LAYOUTS["columns"]
_NIH_FINDINGS: dict[str, str] = _LAYOUTS["nih_findings"]


def _write_dicom(path: Path, image: NDArray[np.uint8], view: str, uids: Sequence[str]) -> None:
    """Write 8 bits ``(H, W)``, uncompressed; ``uids`` are those of study, series and image.

    Raises:
        UserError: pydicom is not installed.
    """
    try:
        import pydicom
    except ImportError as error:
        raise UserError("Writing DICOM images needs pydicom: install it with pip install 'medmim[dicom]'.") from error
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.SOPInstanceUID = uids
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.Modality, dataset.BodyPartExamined, dataset.ViewPosition = "CR", "CHEST", view
    dataset.Rows, dataset.Columns = image.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PixelRepresentation = 1, "MONOCHROME2", 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8, 8, 7
    data = image.tobytes()
    dataset.PixelData = data + b"\0" * (len(data) % 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)


def _uid(rng: np.random.Generator) -> str:
    return f"1.2.276.0.7230010.3.1.{rng.integers(2, 5)}.8323329.{rng.integers(10**5)}.{rng.integers(10**10)}"


def _sided(rng: np.random.Generator, findings: Iterable[str]) -> dict[str, str]:
    """Put findings on a side, those that have one."""
    return {finding: str(rng.choice(SIDES)) if finding in SIDED_FINDINGS else "" for finding in findings}


def _shared_out(rng: np.random.Generator, findings: Iterable[str], most: int) -> list[dict[str, str]]:
    """Share findings out over two visits of a patient, one of which gets at most some number of them."""
    order = [str(finding) for finding in rng.permutation(list(findings))]
    few = int(rng.integers(most + 1))
    visits = [order[:few], order[few:]] if rng.random() < 0.5 else [order[few:], order[:few]]
    return [_sided(rng, visit) for visit in visits]


def _set_aside(patient: int) -> bool:
    """Return whether a patient is for testing."""
    return patient % 4 == 1


def _region(key: Sequence[object], findings: Mapping[str, str], finding: str, size: Sequence[int]) -> NDArray[np.bool_]:
    """Return where a finding changes the picture that a key draws.

    Other findings that need random numbers change where it lies, so they must not be there.
    """
    clear = {other: side for other, side in findings.items() if other != finding}
    shown, unseen = (draw_image(numpy_generator(*key), drawn, size).astype(np.float32) for drawn in (findings, clear))
    scale = max(1, round(min(size) / 150))
    visible = ndimage.gaussian_filter(np.abs(shown - unseen), scale / 2) > _VISIBLE
    return ndimage.binary_opening(ndimage.binary_fill_holes(visible), iterations=scale)


def _halves(region: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """Part a region at the middle of the image; leave out a half with nothing in it."""
    left = np.arange(region.shape[1]) < region.shape[1] // 2
    return [half for half in (region & left, region & ~left) if half.any()]


def _chexpert_labels(rng: np.random.Generator, findings: Mapping[str, str], certain: bool) -> dict[str, str]:
    """Label a study: with some doubt and gaps unless certain, which the mixed policy for doubt resolves.

    What is not drawn by itself goes with what is: atelectasis with fluid, edema with consolidation on both sides.
    """
    present = {
        "No Finding": not set(findings) - {"devices"},
        "Cardiomegaly": "cardiomegaly" in findings,
        "Lung Opacity": "consolidation" in findings,
        "Lung Lesion": "nodule" in findings,
        "Edema": findings.get("consolidation") == "both",
        "Consolidation": "consolidation" in findings,
        "Atelectasis": "effusion" in findings,
        "Pneumothorax": "pneumothorax" in findings,
        "Pleural Effusion": "effusion" in findings,
        "Support Devices": "devices" in findings,
    }
    labels = dict.fromkeys(_COLUMNS["chexpert"][5:], "0.0" if certain else "")
    for column, value in present.items():
        doubt, gap = rng.random(2) < (0.3, 0.5)
        if certain or not (doubt or gap):
            labels[column] = str(float(value))
        elif doubt and MIXED.get(column) == value:
            labels[column] = "-1.0"
        else:
            labels[column] = "1.0" if value else ""
    return labels


def write_chexpert(root: Path, num_cases: int, seed: int, size: Sequence[int] = _SIZE) -> None:
    """Write studies in the layout of CheXpert-v1.0-small; every third has a lateral image too.

    Labels of the training images are uncertain or blank here and there; those of ``valid.csv`` are not.
    """
    folder = root / "CheXpert-v1.0-small"
    rows: dict[str, list[dict[str, object]]] = {"train": [], "valid": []}
    for index in range(num_cases):
        patient, visit = divmod(index, 2)
        person = numpy_generator("synthetic", "chexpert", seed, "patient", patient)
        facts = {"Sex": str(person.choice(["Female", "Male"])), "Age": int(person.integers(20, 90))}
        findings = _shared_out(person, ("cardiomegaly", "consolidation", "effusion"), 1)[visit]
        if "consolidation" in findings and patient % 2:
            findings["consolidation"] = "both"
        rng = numpy_generator("synthetic", "chexpert", seed, index)
        findings |= _sided(rng, [name for name in ("nodule", "pneumothorax", "devices") if rng.random() < 0.2])
        part, number = ("valid", 64541 + patient) if _set_aside(patient) else ("train", 1 + patient)
        labels = _chexpert_labels(rng, findings, part == "valid")
        frontal = str(rng.choice(_VIEWS))
        for place, view in enumerate([frontal, "LATERAL"] if index % 3 == 2 else [frontal], 1):
            side = "Lateral" if view == "LATERAL" else "Frontal"
            name = f"{part}/patient{number:05d}/study{visit + 1}/view{place}_{side.lower()}.jpg"
            write_image(folder / name, draw_image(rng, findings, size, view))
            shown = {"Frontal/Lateral": side, "AP/PA": view if side == "Frontal" else ""}
            rows[part].append({"Path": f"{folder.name}/{name}", **facts, **shown, **labels})
    for part, listed in rows.items():
        write_table(folder / f"{part}.csv", _COLUMNS["chexpert"], listed)


def write_nih(root: Path, num_cases: int, seed: int, size: Sequence[int] = _SIZE) -> None:
    """Write images in the layout of ChestX-ray14, in two of its folders, with its lists; the fourth has four channels.

    Five of its classes occur.
    """
    rows = []
    lists: dict[str, list[str]] = {"train_val_list.txt": [], "test_list.txt": []}
    for index in range(num_cases):
        patient, visit = divmod(index, 2)
        person = numpy_generator("synthetic", "nih_cxr", seed, "patient", patient)
        facts = {"Patient Age": int(person.integers(20, 90)), "Patient Gender": str(person.choice(["F", "M"]))}
        findings = _shared_out(person, _NIH_FINDINGS, 2)[visit]
        rng = numpy_generator("synthetic", "nih_cxr", seed, index)
        view = str(rng.choice(_VIEWS))
        name = f"{patient + 1:08d}_{visit:03d}.png"
        part = 1 if 2 * index < num_cases else 2
        image = draw_image(rng, findings, size, view)
        write_image(root / f"images_{part:03d}/images/{name}", image, "RGBA" if index == 3 else "L")
        labels = "|".join(label for finding, label in _NIH_FINDINGS.items() if finding in findings)
        taken = dict(zip(_COLUMNS["nih_cxr"][6:], (view, size[1], size[0], 0.143, 0.143), strict=True))
        rows.append(
            {"Image Index": name, "Finding Labels": labels or "No Finding", "Follow-up #": visit,
             "Patient ID": patient + 1, **facts, **taken}
        )  # fmt: skip
        lists["test_list.txt" if _set_aside(patient) else "train_val_list.txt"].append(name)
    write_table(root / "Data_Entry_2017_v2020.csv", _COLUMNS["nih_cxr"], rows)
    for file, names in lists.items():
        (root / file).write_text("\n".join(names))


def write_rsna(root: Path, num_cases: int, seed: int, size: Sequence[int] = _SIZE) -> None:
    """Write DICOM images in the layout of the RSNA challenge; every other has pneumonia, with a box on each side."""
    boxes: list[dict[str, object]] = []
    kinds = []
    for index in range(num_cases):
        rng = numpy_generator("synthetic", "rsna", seed, index)
        digits = rng.bytes(16).hex()
        name = "-".join(digits[start:end] for start, end in ((0, 8), (8, 12), (12, 16), (16, 20), (20, 32)))
        key = ("synthetic", "rsna", seed, index, "image")
        kind, finding = _LAYOUTS["rsna_cases"][index % 4]
        findings = _sided(rng, [finding] if finding else [])
        if findings and rng.random() < 0.3:
            findings["cardiomegaly"] = ""
        image = draw_image(numpy_generator(*key), findings, size)
        uids = [_uid(rng), _uid(rng), _uid(rng)]
        _write_dicom(root / f"stage_2_train_images/{name}.dcm", image, str(rng.choice(_VIEWS)), uids)
        rows: list[dict[str, object]] = [{"Target": 0}]
        if finding == "consolidation":
            rows = [{**_box(half), "Target": 1} for half in _halves(_region(key, findings, finding, size))]
        boxes += [{"patientId": name, **row} for row in rows]
        kinds += [{"patientId": name, "class": kind}] * len(rows)
    columns = ("patientId", "x", "y", "width", "height", "Target")
    write_table(root / "stage_2_train_labels.csv", columns, boxes)
    write_table(root / "stage_2_detailed_class_info.csv", ("patientId", "class"), kinds)


def _box(region: NDArray[np.bool_]) -> dict[str, float]:
    """Return the box around a region."""
    rows, columns = (np.flatnonzero(region.any(axis)) for axis in (1, 0))
    return {
        "x": float(columns[0]),
        "y": float(rows[0]),
        "width": float(columns[-1] - columns[0] + 1),
        "height": float(rows[-1] - rows[0] + 1),
    }


def write_covid_cxr(root: Path, num_cases: int, seed: int, size: Sequence[int] = _SIZE) -> None:
    """Write frontal images in the layout of the COVID-19 image data collection.

    Every fifth is a second one of the patient before, with the same note. There are also side views, a file that is
    listed for two patients, an image without a finding, one that nobody has read, and a CT that is not there.
    """
    rows: list[dict[str, object]] = []
    cases: list[tuple[str, dict[str, str]]] = _LAYOUTS["covid_cases"]
    for index in range(num_cases):
        patient = index - (index + 1) // 5
        person = numpy_generator("synthetic", "covid_cxr", seed, "patient", patient)
        finding, look = cases[patient % len(cases)]
        side = str(person.choice(["left", "right"]))
        findings = {name: side if where == "one" else where for name, where in look.items()}
        rows += _covid_rows(root, (seed, index), patient, person, finding, findings, size)
    for number, finding in enumerate(("No Finding", "todo")):
        person = numpy_generator("synthetic", "covid_cxr", seed, "patient", finding)
        rows += _covid_rows(root, (seed, num_cases + number), num_cases + number, person, finding, {}, size)
    rows.append({**rows[0], "patientid": num_cases + 2})
    rows.append({**rows[0], "view": "Axial", "modality": "CT", "folder": "volumes", "filename": "ct_001.nii.gz"})
    write_table(root / "metadata.csv", _COLUMNS["covid_cxr"], rows)


def _covid_rows(
    root: Path,
    key: tuple[int, int],
    patient: int,
    person: np.random.Generator,
    finding: str,
    findings: Mapping[str, str],
    size: Sequence[int],
) -> list[dict[str, object]]:
    """Draw a case and list its images: every fourth has a side view."""
    facts = {"patientid": patient, "sex": str(person.choice(["F", "M"])), "age": int(person.integers(20, 90))}
    note = mimic_text(write_report(person, findings).text, "findings_impression")
    rng = numpy_generator("synthetic", "covid_cxr", *key)
    _, index = key
    frontal = str(rng.choice(["PA", "AP", "AP Supine"]))
    suffix, mode = (("png", "L"), ("jpg", "RGB"), ("JPG", "L"), ("png", "RGBA"))[index % 4]
    rows = []
    for view in [frontal, "L"] if index % 4 == 2 else [frontal]:
        name = f"{index:06d}-{view.replace(' ', '_')}.{suffix}"
        drawn = draw_image(rng, findings, size, "LATERAL" if view == "L" else view[:2])
        write_image(root / "images" / name, drawn, mode)
        rows.append(
            {**facts, "offset": int(rng.integers(1, 15)), "finding": finding, "view": view, "modality": "X-ray",
             "date": "2020", "folder": "images", "filename": name, "license": "CC BY-NC-SA", "clinical_notes": note}
        )  # fmt: skip
    return rows


def write_siim(root: Path, num_cases: int, seed: int, size: Sequence[int] = _SIZE) -> None:
    """Write DICOM images in the layout of SIIM-ACR: two per study, one with pneumothorax, and a row for each side."""
    rows = []
    for index in range(num_cases):
        study, visit = divmod(index, 2)
        rng = numpy_generator("synthetic", "siim", seed, index)
        key = ("synthetic", "siim", seed, index, "image")
        findings = {name: "" for name in ("cardiomegaly", "devices") if rng.random() < 0.3}
        codes = [NO_REGION]
        if (study + visit) % 2:
            findings |= _sided(rng, ["pneumothorax"])
            codes = [encode_runs(half) for half in _halves(_region(key, findings, "pneumothorax", size))]
        uids = [_uid(numpy_generator("synthetic", "siim", seed, "study", study)), _uid(rng), _uid(rng)]
        image = draw_image(numpy_generator(*key), findings, size)
        _write_dicom(root / f"dicom-images-train/{uids[0]}/{uids[1]}/{uids[2]}.dcm", image, "PA", uids)
        rows += [{"ImageId": uids[2], " EncodedPixels": f" {code}"} for code in codes]
    write_table(root / "train-rle.csv", ("ImageId", " EncodedPixels"), rows)
