"""BIDS: names, sessions, runs, tables, derivatives and masks; on names alone, and on a real sample."""

import json
import shutil

import pytest

from common.errors import DataError
from datamodules import account
from datamodules.account import Account
from datamodules.brain.datamodule import BrainDataModule
from datamodules.configs import SplitConfig
from datamodules.registry import Settings, open_archive
from datamodules.volumes.bids import parsed
from datamodules.volumes.datamodule import VolumeDataModule


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def data_set(root, *names, description=True):
    touch(root, *names)
    if description:
        (root / "dataset_description.json").write_text(json.dumps({"Name": "x", "BIDSVersion": "1.8.0"}))
    return root


def opened(root, needs=("volumes",), **settings):
    archive = open_archive(root, needs=needs, settings=Settings(**settings))
    assert archive.layout.name == "bids"
    return archive


def volumes(archive):
    return {record.case_id: " ".join(sorted(record.volumes)) for record in archive.records}


def reasons(archive):
    return {row.reason: row.count for row in Account(archive).rows if row.use == "ignored"}


def test_names():
    name = parsed("sub-01_ses-1_acq-hires_run-02_T1w")
    assert (name.case, name.modality, name.variant) == ("sub-01_ses-1", "t1", "acq-hires_run-02")
    assert parsed("sub-01_ce-gd_T1w").modality == "t1c"
    assert parsed("T1w") is None
    assert parsed("sub-01_T1w_extra_") is None


def test_sessions_are_cases_of_one_patient_and_labels_are_text(tmp_path):
    data_set(
        tmp_path, "sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz", "sub-01/ses-2/anat/sub-01_ses-2_T1w.nii.gz",
        "sub-01/ses-2/anat/sub-01_ses-2_FLAIR.nii.gz", "sub-1/anat/sub-1_T2w.NII.GZ", "sub-02/sub-02_PDw.nii",
    )  # fmt: skip
    archive = opened(tmp_path)
    assert volumes(archive) == {
        "sub-01_ses-1": "t1", "sub-01_ses-2": "flair t1", "sub-1": "t2", "sub-02": "pd",
    }  # fmt: skip
    assert {record.patient_id for record in archive.records} == {"sub-01", "sub-1", "sub-02"}
    assert {record.session for record in archive.records} == {"1", "2", ""}


def test_what_is_not_anatomy_is_ignored_by_reason(tmp_path):
    names = {
        "sub-01/anat/sub-01_T1w.nii.gz": None,
        "sub-01/func/sub-01_task-rest_bold.nii.gz": account.TIME,
        "sub-01/func/sub-01_task-rest_phase.nii.gz": account.ACQUISITION,
        "sub-01/dwi/sub-01_dwi.nii.gz": account.TIME,
        "sub-01/fmap/sub-01_magnitude1.nii.gz": account.ACQUISITION,
        "sub-01/anat/sub-01_inv-1_MP2RAGE.nii.gz": account.PARAMETRIC,
        "sub-01/anat/sub-01_echo-2_T2starw.nii.gz": account.PARAMETRIC,
        "sub-01/anat/sub-01_T1map.nii.gz": account.MAP,
        "sub-01/anat/sub-01_part-phase_T2w.nii.gz": account.PART,
        "sub-01/anat/sub-02_T1w.nii.gz": account.DISAGREE,
        "sub-01/ses-1/anat/sub-01_T1w.nii.gz": account.DISAGREE,
        "sourcedata/sub-01/raw.nii.gz": account.SOURCE,
        "extra/sub-01_T1w.nii.gz": account.LISTED,
    }
    data_set(tmp_path, *names)
    (tmp_path / ".bidsignore").write_text("# ours\nextra/\n")
    archive = opened(tmp_path)
    assert volumes(archive) == {"sub-01": "t1"}
    for name, reason in names.items():
        assert reason is None or name in archive.reasons[reason], name
    assert Account(archive).count("unknown") == 0


def test_one_run_of_a_modality_counts_and_all_may(tmp_path):
    data_set(
        tmp_path, "sub-01/anat/sub-01_acq-hires_T1w.nii.gz", "sub-01/anat/sub-01_run-02_T1w.nii.gz",
        "sub-01/anat/sub-01_run-01_T1w.nii.gz", "sub-01/anat/sub-01_T2w.nii.gz",
    )  # fmt: skip
    archive = opened(tmp_path)
    assert [ref.path.name for ref in archive.records[0].volumes.values()] == [
        "sub-01_T2w.nii.gz", "sub-01_run-01_T1w.nii.gz"
    ]  # fmt: skip
    assert {f"{account.RUN} t1 (run-02)", f"{account.RUN} t1 (acq-hires)"} <= reasons(archive).keys()
    every = opened(tmp_path, runs="all")
    assert volumes(every) == {"sub-01": "t1 t2", "sub-01_run-02": "t1", "sub-01_acq-hires": "t1"}
    assert {record.patient_id for record in every.records} == {"sub-01"}


def test_tables_become_targets_and_a_split(tmp_path):
    data_set(
        tmp_path, "sub-01/ses-1/anat/sub-01_ses-1_T1w.nii", "sub-02/ses-1/anat/sub-02_ses-1_T1w.nii",
        "sub-04/ses-1/anat/sub-04_ses-1_T1w.nii",
    )  # fmt: skip
    (tmp_path / "participants.tsv").write_text(
        "participant_id\tage\tsplit\nsub-01\t41\ttrain\n02\tn/a\ttest\n03\t9\ttest\n"
    )
    (tmp_path / "sub-01/sub-01_sessions.tsv").write_text("session_id\tscore\nses-1\t0.5\n")
    (tmp_path / "sub-01/ses-1/sub-01_ses-1_scans.tsv").write_text("filename\tcoil\nanat/sub-01_ses-1_T1w.nii\thead\n")
    (tmp_path / "phenotype").mkdir()
    (tmp_path / "phenotype/memory.tsv").write_text("participant_id\tmoca\nsub-02\t26\n")
    archive = opened(tmp_path)
    facts = {record.patient_id: (dict(record.targets), record.split) for record in archive.records}
    assert facts == {
        "sub-01": ({"age": "41", "coil": "head", "score": "0.5"}, "train"),
        "sub-02": ({"age": "", "moca": "26"}, "test"),
        "sub-04": ({}, None),
    }
    assert archive.notes == ["participants.tsv: 1 of 3 subjects have no row, 1 of 3 rows no subject with a usable file"]
    (tmp_path / "participants.tsv").write_text("subject\tage\nsub-01\t41\n")
    with pytest.raises(DataError, match="no column participant_id; it has subject, age"):
        opened(tmp_path)


MASKED = (
    "sub-01/anat/sub-01_T1w.nii.gz", "sub-01/anat/sub-01_T2w.nii.gz", "sub-02/anat/sub-02_T2w.nii.gz",
    "derivatives/manual/sub-01/anat/sub-01_T1w_lesion-manual.nii.gz",
    "derivatives/manual/sub-01/anat/sub-01_T2w_lesion-manual.nii.gz",
    "derivatives/manual/sub-02/anat/sub-02_T2w_lesion-manual.nii.gz",
    "derivatives/fs/sub-01/anat/sub-01_dseg.nii.gz", "derivatives/fs/sub-01/anat/sub-01_desc-brain_mask.nii.gz",
)  # fmt: skip


def test_no_mask_is_used_until_it_is_named(tmp_path):
    archive = opened(data_set(tmp_path, *MASKED))
    assert not any(record.masks for record in archive.records)
    assert reasons(archive)[account.MASK] == 5
    named = opened(tmp_path, masks={"lesion": {"name": "lesion-manual", "values": [1, 2]}})
    assert {record.case_id: [ref.path.name for ref in record.masks.values()] for record in named.records} == {
        "sub-01": ["sub-01_T1w_lesion-manual.nii.gz"], "sub-02": ["sub-02_T2w_lesion-manual.nii.gz"]
    }  # fmt: skip
    assert named.facts.regions == {"lesion": (1, 2)}
    assert named.facts.label_values == {0, 1, 2}
    both = opened(tmp_path, masks={"lesion": {"name": "lesion-manual"}, "brain": {"name": "desc-brain_mask"}})
    assert [len(record.masks) for record in both.records] == [2, 0]
    assert both.facts.regions == {"lesion": (1, 3), "brain": (2, 3)}
    with pytest.raises(
        DataError, match=r"No case has the mask tumour that masks: names; the masks found are desc-brain"
    ):
        opened(tmp_path, masks={"tumour": {}})


def test_a_pipeline_takes_the_place_of_the_raw_volumes(tmp_path):
    data_set(
        tmp_path, "sub-01/anat/sub-01_T1w.nii.gz",
        "derivatives/fmriprep/sub-01/anat/sub-01_desc-preproc_T1w.nii.gz",
        "derivatives/fmriprep/sub-01/anat/sub-01_space-MNI_desc-preproc_T1w.nii.gz",
    )  # fmt: skip
    archive = opened(tmp_path, pipeline="fmriprep")
    assert [ref.path.name for ref in archive.records[0].volumes.values()] == ["sub-01_desc-preproc_T1w.nii.gz"]
    assert reasons(archive)[account.PIPELINE] >= 1
    (tmp_path / "derivatives/fmriprep/sub-01/anat/sub-01_desc-preproc_T1w.nii.gz").rename(
        tmp_path / "derivatives/fmriprep/sub-01/anat/sub-01_space-T1w_desc-preproc_T1w.nii.gz"
    )
    with pytest.raises(DataError, match=r"sub-01 in the spaces MNI, T1w: name all but one under ignore"):
        opened(tmp_path, pipeline="fmriprep")
    with pytest.raises(DataError, match=r"no pipeline freesurfer .* there are fmriprep"):
        opened(tmp_path, pipeline="freesurfer")


def test_evidence(tmp_path):
    names = [f"sub-{i:02}/anat/sub-{i:02}_T1w.nii.gz" for i in range(10)]
    data_set(tmp_path, *names, description=False)
    assert opened(tmp_path)
    touch(tmp_path, *(f"scan{i}.nii.gz" for i in range(5)))
    assert open_archive(tmp_path, "bids", needs={"volumes"})
    (tmp_path / "dataset_description.json").write_text('{"BIDSVersion": "1.8.0"}')
    assert opened(tmp_path)


def test_a_description_added_to_a_public_set_changes_nothing(tmp_path):
    start = "sub-strokecase0001/ses-0001"
    touch(tmp_path, f"{start}/dwi/sub-strokecase0001_ses-0001_dwi.nii.gz",
          f"{start}/anat/sub-strokecase0001_ses-0001_FLAIR.nii.gz")  # fmt: skip
    before = open_archive(tmp_path, needs={"volumes"})
    (tmp_path / "dataset_description.json").write_text('{"BIDSVersion": "1.8.0", "training": []}')
    after = open_archive(tmp_path, needs={"volumes"})
    assert before.layout.name == after.layout.name == "isles22"
    assert before.records == after.records


def test_what_lacks_is_said_by_name(tmp_path):
    data_set(tmp_path, "sub-01/anat/sub-01_T1w.nii.gz")
    (tmp_path / "participants.tsv").write_text("participant_id\tage\nsub-01\t41\n")
    with pytest.raises(DataError) as error:
        open_archive(tmp_path, needs={"images", "text"}, purpose="umd")
    assert str(error.value).startswith(
        "A BIDS archive gives volumes and targets; umd needs images and text, so images and text are lacking in "
    )


@pytest.mark.real_data
def test_a_real_spine(real_data, tmp_path):
    """Archives.md, case 2: three patients, nine volumes, masks listed and none used."""
    root = real_data("bids_spine")
    archive = opened(root)
    found = Account(archive)
    assert volumes(archive) == dict.fromkeys(("sub-unf01", "sub-unf02", "sub-unf03"), "t1 t2 t2star")
    assert {(row.use, row.reason): row.count for row in found.rows} == {
        ("used", "volume"): 9, ("used", "table"): 1, ("ignored", account.MASK): 11, ("ignored", account.SIDECAR): 11,
    }  # fmt: skip
    assert found.total == len([path for path in root.rglob("*") if path.is_file()])
    named = opened(root, masks={"cord": {"name": "seg-manual"}})
    assert [bool(record.masks) for record in named.records] == [True, False, False]


@pytest.mark.real_data
def test_both_methods_of_volumes_read_a_real_spine(real_data, tmp_path):
    root = shutil.copytree(real_data("bids_spine"), tmp_path / "spine")
    plain = VolumeDataModule(str(root), split=SplitConfig((1.0, 0.0, 0.0)))
    assert plain.index().name == "bids"
    assert plain.input_spec.channels == ("t1", "t2", "t2star")
    brain = BrainDataModule(str(root), split=SplitConfig((1.0, 0.0, 0.0)))
    assert brain.index().name == "bids"
    assert {name for case in brain.cases for name in case.images} == {"t1", "t2"}
