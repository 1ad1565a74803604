from typing import NamedTuple

from common.faults import Fault, SampleFaultError
from datamodules.controls import read_control
from datamodules.loading import Draw


class Case(NamedTuple):
    case_id: str
    patient_id: str


CASES = [Case(f"{patient}{visit}", patient) for patient in "abcd" for visit in (1, 2)]


def broken(*names):
    """Read names; those given cannot be read."""

    def read(case):
        if case.case_id in names:
            raise SampleFaultError([Fault(case.case_id, "unreadable", "", case.case_id)])
        return case.case_id

    return read


def test_a_control_is_of_another_patient_and_the_same_every_time():
    for case in CASES:
        found = {read_control(case, Draw(0, epoch, 1), CASES, broken()) for epoch in range(3)}
        assert len(found) == 1
        assert found.pop()[0] != case.patient_id
    of_draws = {read_control(CASES[0], Draw(0, 0, draw), CASES, broken()) for draw in range(20)}
    assert len(of_draws) > 2


def test_the_next_is_read_where_one_is_broken():
    first = read_control(CASES[0], Draw(0, 0, 0), CASES, broken())
    second = read_control(CASES[0], Draw(0, 0, 0), CASES, broken(first))
    assert second is not None
    assert second not in (first, "a1", "a2")
    assert read_control(CASES[0], Draw(0, 0, 0), CASES, broken(*(case.case_id for case in CASES))) is None
    assert read_control(CASES[0], Draw(0, 0, 0), CASES[:2], broken()) is None


def test_better_controls_are_taken_where_there_are_any():
    for draw in range(10):
        found = read_control(CASES[0], Draw(0, 0, draw), CASES, broken(), lambda case: case.case_id[1] == "2")
        assert found in ("b2", "c2", "d2")
        assert read_control(CASES[0], Draw(0, 0, draw), CASES, broken(), lambda case: False) is not None
