"""Whose study it is, as the names of the public archives say."""

import re

_PATIENT = re.compile(
    r"(BraTS-[A-Z]+-\d+(?=-\d{3}$)|UCSF-PDGM-\d+(?=(_FU\d+d)?(_nifti)?$)|UPENN-GBM-\d+(?=_\d+$)"
    r"|IXI\d+(?=-(Guys|HH|IOP)-\d+$)|sub-strokecase\d+(?=_ses-\d+$))",
    re.IGNORECASE,
)


def patient_of(study: str) -> str:
    """Return the patient that a study's name says, without its visit; the study where the name is none we know."""
    match = _PATIENT.match(study)
    return match.group(1) if match else study
