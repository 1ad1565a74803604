from typing import NamedTuple

import pytest

from common.faults import Fault, SampleFaultError
from datamodules.controls import ATTEMPTS, read_control
from datamodules.loading import Draw


class Member(NamedTuple):
    case_id: str
    patient_id: str
    split: str | None = None


class Counted(list):
    """Counts how often an element is looked at."""

    looks = 0

    def __getitem__(self, index):
        self.looks += 1
        return super().__getitem__(index)


def members(count, visits=2):
    return Counted(Member(f"case {n}", f"patient {n // visits}") for n in range(count))


@pytest.mark.parametrize("count", [1000, 50_000])
def test_the_cost_does_not_grow_with_the_archive(count):
    candidates = members(count)
    found = [read_control(candidates[n], Draw(n, 0, 0), candidates, lambda case: case) for n in range(300)]
    assert candidates.looks - 300 <= 1.2 * 300
    assert all(other.patient_id != f"patient {n // 2}" for n, other in enumerate(found))
    again = [read_control(candidates[n], Draw(n, 5, 0), candidates, lambda case: case) for n in range(300)]
    assert again == found


def test_one_patient_alone_has_no_control_and_broken_cases_are_passed_over():
    assert read_control(Member("a", "A"), Draw(0, 0, 0), [Member("b", "A")] * 3, lambda case: case) is None
    assert read_control(Member("a", "A"), Draw(0, 0, 0), [], lambda case: case) is None
    tried = []

    def broken(case):
        tried.append(case)
        raise SampleFaultError([Fault("x", "unreadable", "broken", "x")])

    assert read_control(Member("a", "A"), Draw(0, 0, 0), members(4), broken) is None
    assert len(tried) == ATTEMPTS


def test_a_better_control_is_preferred_and_another_taken_where_there_is_none():
    candidates = members(40, visits=1)

    def even(case):
        return int(case.case_id.split()[1]) % 2 == 0

    for draw in range(20):
        assert even(read_control(Member("a", "A"), Draw(0, 0, draw), candidates, lambda case: case, even))
    assert read_control(Member("a", "A"), Draw(0, 0, 0), candidates, lambda case: case, lambda _: False) is not None
