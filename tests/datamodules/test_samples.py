"""An account of every real sample: used, ignored for a reason of the list, and nothing unknown; or one sentence."""

import os
from pathlib import Path

import pytest

from common.errors import DataError
from datamodules.account import Account
from datamodules.dicom.rules import default_rules
from datamodules.registry import Settings, open_archive

pytestmark = pytest.mark.real_data

RULES = {"series": default_rules(), "min_slices": 2}
#: Sample: settings, layout, samples, files used, files ignored.
READ = {
    "bids_spine": ({}, "bids", 3, 10, 22),
    "brats2023": ({}, "brats2023", 6, 30, 0),
    "covid_cxr": ({}, "covid_cxr", 218, 219, 0),
    "dicom_faults": ({**RULES, "subject": "study"}, "dicom", 5, 16, 2),
    "dicom_fmri_mosaic_reference": ({}, "folder", 4, 4, 4),
    "dicom_pdt2": (RULES, "dicom", 1, 70, 0),
    "dicom_pdt2_reference": ({}, "folder", 1, 2, 2),
    "dicom_radiographs": ({}, "dicom", 3, 3, 0),
    "dicom_vendors": ({**RULES, "subject": "study"}, "dicom", 1, 4, 1),
    "dicom_vendors_reference": ({}, "folder", 2, 2, 0),
    "idrid": ({}, "idrid", 516, 518, 11),
    "medicat_sample": ({}, "medicat", 11, 7, 5),
    "msd_hippocampus": ({}, "msd", 13, 24, 0),
    "openi_reports": ({}, "open_i", 3955, 1, 1),
    "prostatex_mha": ({}, "pi_cai", 3, 9, 0),
    "rfmid": ({}, "rfmid", 3, 4, 0),
    "tcga_fg_6692": ({}, "folder", 1, 4, 0),
    "tcga_gbmlgg": ({}, "tcga_gbmlgg", 3, 4, 10),
    "vqa_rad": ({}, "vqa_rad", 3515, 316, 2),
}
#: Sample: why it is no archive of images, or not one as it stands.
REFUSED = {
    "bert_vocab": r"of no known layout \(it holds config.json, vocab.txt\)",
    "dicom_fmri_mosaic": "DICOM, 4 kinds of series: run medmim init DIR first",
    "hapmap3_plink": "of no known layout",
    "lung_mri": "The modality 0000bodymask_2d occurs in one case only",
    "odd_nifti": "The modality 1.3x1.3x10 occurs in one case only",
    "pgsc_calc": "of no known layout",
    "picai_labels": "of no known layout",
    "roco": "has 8179 captions of ROCO, but none of their images",
}


@pytest.mark.parametrize("name", READ)
def test_every_file_of_a_sample_has_its_place(name, real_data):
    settings, layout, samples, used, ignored = READ[name]
    root = real_data(name)
    archive = open_archive(root, settings=Settings(**settings))
    found = Account(archive)
    found.check()
    counts = {use: found.count(use) for use in ("used", "ignored", "unknown")}
    assert (archive.layout.name, len(archive.records)) == (layout, samples)
    assert counts == {"used": used, "ignored": ignored, "unknown": 0}
    assert sum(counts.values()) == sum(len(files) for _, _, files in os.walk(root))


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_archive_of_images_is_refused_in_one_sentence(name, real_data):
    with pytest.raises(DataError, match=REFUSED[name]) as error:
        open_archive(real_data(name))
    assert len(str(error.value)) <= 300


def test_no_sample_is_left_out(real_data):
    folders = {path.name for path in Path(real_data(".")).iterdir() if path.is_dir()}
    assert folders == {*READ, *REFUSED}
