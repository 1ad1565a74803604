"""PI-CAI prostate MRI: ``images/PATIENT/PATIENT_STUDY_{t2w,adc,hbv}.mha``, labels and marksheet beside them.

adc and hbv have another grid than t2w and are resampled to it. Zonal masks (1 = PZ, 2 = TZ) are the output of a
network, not drawn by people. The marksheet defines clinically significant cancer; early versions lack ``case_csPCa``,
which is then derived from the Gleason scores. A missing mask does not mean a negative study.
"""

import re
from pathlib import Path

from common.errors import DataError
from datamodules.files import listing, short
from datamodules.ids import check_labels, check_subjects, join_ids
from datamodules.registry import Evidence, Facts, Layout
from datamodules.tables import read_table
from datamodules.tree import Tree
from datamodules.volumes.cases import Case

MODALITIES = ("t2w", "adc", "hbv")
_FILE = re.compile(r"^(?P<study>(?P<patient>.+?)_(?P<visit>[^_]+))_(?P<modality>t2w|adc|hbv)\.mha$", re.IGNORECASE)
_LABEL_ROOTS = ("labels", "picai_labels")
_ZONES = ("HeviAI23", "Yuan23")
_MARKSHEETS = ("clinical_information/marksheet.csv", "marksheet.csv")


def _first(tree: Tree, candidates: list[str]) -> str | None:
    return next((name for name in candidates if tree.is_file(name) or tree.is_dir(name)), None)


def gleason_to_isup(text: str) -> int | None:
    """Return the highest ISUP grade among Gleason scores such as ``"3+4, N/A"`` (quotes and spaces are ignored).

    ISUP: 3+3 is 1, less is 0, 3+4 is 2, 4+3 is 3, a sum of 8 is 4, 9 and 10 are 5. None if there is no score.
    """
    grades = []
    for first, second in re.findall(r"(\d)\s*\+\s*(\d)", text):
        a, b = int(first), int(second)
        if a + b < 7:
            grades.append(int(a + b == 6))
        elif a + b == 7:
            grades.append(2 if a == 3 else 3)
        else:
            grades.append(4 if a + b == 8 else 5)
    return max(grades) if grades else None


def read_marksheet(path: Path) -> dict[str, dict[str, str]]:
    """Read the official marksheet: ``PATIENT_STUDY`` to its columns, with ``csPCa`` as 1 or 0.

    Raises:
        DataError: a required column is missing.
    """
    table = read_table(path)
    columns = table.columns
    if not {"patient_id", "study_id"} <= set(columns) or not {"case_csPCa", "lesion_GS"} & set(columns):
        raise DataError(
            f"{path} is not a PI-CAI marksheet: it needs patient_id, study_id and case_csPCa or lesion_GS, "
            f"and has {listing(columns)}."
        )
    check_subjects(path, table["patient_id"])
    rows: dict[str, dict[str, str]] = {}
    for facts in table.to_dict("records"):
        if facts.get("case_csPCa"):
            facts["csPCa"] = str(int(facts["case_csPCa"].upper() == "YES"))
        else:
            facts["csPCa"] = str(int((gleason_to_isup(facts.get("lesion_GS", "")) or 0) >= 2))
        study = f"{facts['patient_id']}_{facts['study_id']}"
        if rows.setdefault(study, facts) != facts:
            raise DataError(f"{path} lists the study {short(study)} twice, with different values; keep one row of it.")
    return rows


def _images(tree: Tree) -> dict[str, tuple[str, dict[str, Path]]]:
    """Return the volumes of each study, with its patient."""
    images = "images" if tree.is_dir("images") else ""
    studies: dict[str, tuple[str, dict[str, Path]]] = {}
    for patient in tree.folders(images):
        for file in tree.listed(f"{images}/{patient}" if images else patient):
            match = _FILE.match(file.name.rpartition("/")[2])
            if match and match["patient"] == patient:
                studies.setdefault(match["study"], (patient, {}))[1][match["modality"].lower()] = tree / file.name
    return studies


def find_cases(tree: Tree) -> list[Case]:
    """List the PI-CAI studies of a tree; their patients' folders lie in ``images`` or in the root itself."""
    studies = _images(tree)
    if not studies:
        return []
    labels = _first(tree, list(_LABEL_ROOTS)) or ""
    places = [f"{labels}/", ""] if labels else [""]
    marksheet = _first(tree, [place + name for place in places for name in _MARKSHEETS])
    facts = read_marksheet(tree / marksheet) if marksheet else {}
    if marksheet:
        check_labels(tree / marksheet, join_ids(studies, facts), "studies")
    zones = _first(tree, [f"{places[0]}anatomical_delineations/zonal_pz_tz/AI/{name}" for name in _ZONES])
    cases = []
    for study, (patient, files) in sorted(studies.items()):
        zone = f"{zones}/{study}.nii.gz"
        masks = {"zones": tree / zone} if zones and tree.is_file(zone) else {}
        cases.append(Case(study, patient, files, masks, attributes=facts.get(study, {})))
    return cases


def _recognise(tree: Tree) -> Evidence:
    studies = _images(tree)
    if not studies:
        return Evidence(0, missing="PATIENT/PATIENT_STUDY_t2w.mha", near=0.3 if tree.first("**/*_t2w.*") else 0.0)
    return Evidence(3, f"{len(studies)} studies called PATIENT_STUDY_{{t2w,adc,hbv}}.mha")


PI_CAI = Layout(
    name="pi_cai",
    tree="ROOT/[images/]PATIENT/PATIENT_STUDY_{t2w,adc,hbv}.mha + ROOT/labels/ (marksheet, zonal masks)",
    find=find_cases,
    evidence=_recognise,
    facts=Facts(
        modalities=MODALITIES,
        regions={"TZ": (2,), "PZ": (1,)},
        label_values=frozenset({0, 1, 2}),
        profile="pi_cai",
    ),
    tables=tuple(f"{place}{name}" for place in ("labels/", "picai_labels/", "") for name in _MARKSHEETS),
)
