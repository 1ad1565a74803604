import pytest

from common.errors import DataError
from datamodules.dicom.index import Instance, Stack, check_subjects
from datamodules.dicom.rules import classify, default_rules, parse_rules

MR = "1.2.840.10008.5.1.4.1.1.4"
DEFAULTS = Instance(
    path="a", sop_uid="1", series_uid="2", study_uid="3", sop_class=MR, patient_id="P", modality="MR", description="",
    image_type=("ORIGINAL", "PRIMARY"), echo_time=None, repetition_time=None, inversion_time=None, contrast=False,
    frame_of_reference="F", orientation=(1, 0, 0, 0, 1, 0), position=(0.0, 0.0, 0.0), frames=1, acquisition="3D",
    size=(8, 8), spacing=(1.0, 1.0, 1.0), samples=1, series_number=1, view="",
)  # fmt: skip


def stack(*places, **facts):
    return Stack(tuple(DEFAULTS._replace(position=(0.0, 0.0, float(z)), **facts) for z in (places or (0, 1, 2))))


@pytest.mark.parametrize(
    ("description", "facts", "modality"),
    [
        ("t1_mprage_sag", {}, "t1"),
        ("AX T1 POST", {}, "t1c"),
        ("t1_mprage +C", {}, "t1c"),
        ("T1 KM", {}, "t1c"),
        ("T1 pre contrast", {"contrast": True}, "t1"),
        ("T1w non-contrast gd protocol", {}, "t1"),
        ("ax t1 se", {"contrast": True}, "t1c"),
        ("T2 FLAIR AX", {}, "flair"),
        ("t2_tirm_tra_dark-fluid", {}, "flair"),
        ("SWI_Images", {}, "swi"),
        ("t2*_gre", {}, "t2star"),
        ("ep2d_diff_ADC", {}, "adc"),
        ("ADC (10^-6 mm2/s)", {}, "adc"),
        ("DWI b1000 TRACEW", {}, "dwi"),
        ("TOF 3D multi-slab", {}, "mra"),
        ("pd+t2_tse", {"echo_time": 11.0}, "pd"),
        ("pd+t2_tse", {"echo_time": 92.0}, "t2"),
        ("PD fs", {}, "pd"),
        ("t2_tse_tra", {}, "t2"),
        ("Localizer", {}, None),
        ("rest_bold_64", {}, None),
        ("DTI 64 dir", {}, None),
        ("ep2d_perf", {}, None),
        ("T1 MPR COR", {"image_type": ("DERIVED", "SECONDARY", "MPR")}, None),
        ("Head", {"modality": "CT"}, "ct"),
    ],
)
def test_descriptions(description, facts, modality):
    verdict = classify(stack(description=description, **facts), default_rules())
    assert (verdict.modality, verdict.guessed) == (modality, False)


@pytest.mark.parametrize(
    ("times", "modality"),
    [((3, 600, None), "t1"), ((394, 6000, 2200), "flair"), ((90, 4000, None), "t2"), ((12, 3000, None), "pd"),
     ((50, 1500, None), None)],
)  # fmt: skip
def test_without_a_description_times_only_propose(times, modality):
    echo, repetition, inversion = times
    found = classify(stack(echo_time=echo, repetition_time=repetition, inversion_time=inversion), default_rules())
    assert (found.modality, found.guessed) == (modality, modality is not None)


def test_diffusion_is_used_as_one_volume_only():
    assert classify(stack(0, 1, 2, description="dwi b1000"), default_rules()).modality == "dwi"
    assert classify(stack(0, 0, 1, 1, description="dwi b1000"), default_rules()).modality is None


def test_a_rule_of_ones_own_wins_and_a_wrong_one_is_refused_in_a_sentence():
    rules = parse_rules([{"description": "head.*strange", "modality": "t1"}, {"kind": "MR", "ignore": "not asked for"}])
    assert classify(stack(description="Head very strange"), rules).modality == "t1"
    assert classify(stack(description="t2"), rules).reason == "not asked for"
    for entry, words in (({"modalty": "t1"}, "unknown key 'modalty'"), ({"description": "("}, "no rule|needs either"),
                         ({"description": "(", "modality": "t1"}, "regular expression"),
                         ({"te": [5, 1], "modality": "t1"}, "must be"), ("t1", "must be a mapping")):  # fmt: skip
        with pytest.raises(DataError, match=words):
            parse_rules([entry])


def test_one_patient_id_over_several_studies_is_asked_about():
    two = [DEFAULTS._replace(patient_id="ANON", study_uid=uid) for uid in ("a", "b")]
    with pytest.raises(DataError, match='Every study has the PatientID "ANON"'):
        check_subjects(two, None)
    check_subjects(two, "study")
    check_subjects(two[:1], None)
    check_subjects([two[0], two[1]._replace(patient_id="B")], None)
    with pytest.raises(DataError, match="1 studies have no PatientID"):
        check_subjects([two[0], two[1]._replace(patient_id="")], None)


def test_a_stack_knows_its_places():
    volume = stack(4, 0, 2)
    assert list(volume.slice_distances()) == [2, 2]
    assert (volume.repeats, volume.num_slices) == (1, 3)
    assert stack(0, 0, 1, 1).repeats == 2
    assert volume.box().tolist() == [[0, 0, 0], [8, 8, 4]]
    assert Stack((DEFAULTS._replace(frames=12),)).num_slices == 12
