"""PI-CAI prostate MRI: ``images/PATIENT/PATIENT_STUDY_{t2w,adc,hbv}.mha``, labels and marksheet beside them.

adc and hbv have another grid than t2w and are resampled to it. Zonal masks (1 = PZ, 2 = TZ) are made by a network, not
by people. The marksheet decides about clinically significant cancer; early versions lack ``case_csPCa``, which is then
derived from the Gleason scores. An absent mask is not a negative study.
"""

import re
from pathlib import Path

from common.errors import DataError
from datamodules.ids import check_subjects
from datamodules.members import members_of
from datamodules.tables import read_table
from datamodules.volumes.cases import Case, Layout, Preprocessing

MODALITIES = ("t2w", "adc", "hbv")
_FILE = re.compile(r"^(?P<study>(?P<patient>.+?)_(?P<visit>[^_]+))_(?P<modality>t2w|adc|hbv)\.mha$", re.IGNORECASE)
_LABEL_ROOTS = ("labels", "picai_labels", ".")
_ZONES = ("HeviAI23", "Yuan23")
_MARKSHEETS = ("clinical_information/marksheet.csv", "marksheet.csv")


def _first(root: Path, candidates: list[str]) -> Path | None:
    return next((root / name for name in candidates if (root / name).exists()), None)


def gleason_to_isup(text: str) -> int | None:
    """Return the highest ISUP grade among Gleason scores such as ``"3+4, N/A"`` (quotes and blanks tolerated).

    ISUP: 3+3 and below 1 or 0, 3+4 is 2, 4+3 is 3, sum 8 is 4, sum 9 and 10 are 5. None where no score stands.
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
        DataError: a needed column is absent.
    """
    table = read_table(path)
    columns = table.columns
    if not {"patient_id", "study_id"} <= set(columns) or not {"case_csPCa", "lesion_GS"} & set(columns):
        raise DataError(
            f"{path} is no PI-CAI marksheet: it needs patient_id, study_id and case_csPCa or lesion_GS, "
            f"and has {', '.join(columns)}."
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
            raise DataError(f"{path} lists the study {study} twice, with different values; keep one row of it.")
    return rows


def find_cases(root: Path) -> list[Case]:
    """List the PI-CAI studies under a root; ``root/images`` or the folder of patients itself."""
    images = root / "images" if (root / "images").is_dir() else root
    studies: dict[str, dict[str, Path]] = {}
    patients: dict[str, str] = {}
    folders = sorted(path for path in images.iterdir() if path.is_dir())
    for path in (path for folder in folders for path in members_of(folder, (".mha",))):
        match = _FILE.match(path.name)
        if match and match["patient"] == path.parent.name:
            studies.setdefault(match["study"], {})[match["modality"].lower()] = path
            patients[match["study"]] = match["patient"]
    if not studies:
        return []
    label_root = _first(root, [name for name in _LABEL_ROOTS if name != "."]) or root
    marksheet = _first(label_root, list(_MARKSHEETS)) or _first(root, list(_MARKSHEETS))
    facts = read_marksheet(marksheet) if marksheet else {}
    zones = _first(label_root, [f"anatomical_delineations/zonal_pz_tz/AI/{name}" for name in _ZONES])
    cases = []
    for study, files in sorted(studies.items()):
        zone = zones / f"{study}.nii.gz" if zones else None
        labels = {"zones": zone} if zone is not None and zone.is_file() else {}
        cases.append(Case(study, patients[study], files, labels, attributes=facts.get(study, {})))
    return cases


PI_CAI = Layout(
    name="pi_cai",
    tree="ROOT/[images/]PATIENT/PATIENT_STUDY_{t2w,adc,hbv}.mha + ROOT/labels/ (marksheet, zonal masks)",
    find=find_cases,
    modalities=MODALITIES,
    regions={"TZ": (2,), "PZ": (1,)},
    label_values=frozenset({0, 1, 2}),
    preprocessing=Preprocessing(
        intensity={"t2w": "minmax", "adc": "adc", "hbv": "minmax"},
        reference="t2w",
        spacing=(0.5, 0.5, 3.0),
        size=(160, 160, 20),
    ),
    crop_size=(160, 160, 32),
)
