"""Another patient's content in the place of a sample's own: the control of the collapse diagnostics."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from common.faults import SampleFaultError
from common.randomness import stable_hash
from datamodules.loading import Draw
from datamodules.splits import Member

CaseT = TypeVar("CaseT", bound=Member)
ContentT = TypeVar("ContentT")


def read_control(
    case: Member,
    draw: Draw,
    candidates: Sequence[CaseT],
    read: Callable[[CaseT], ContentT],
    prefer: Callable[[CaseT], bool] | None = None,
) -> ContentT | None:
    """Read a case of another patient, the same one every time; None where none can be read.

    Args:
        case: Whose control it is.
        draw: Which of its draws.
        candidates: Cases to choose from.
        read: Reads one; raises :class:`SampleFaultError` where it cannot be used, and the next is tried.
        prefer: Whether a case makes a better control; those are taken alone if there is any.
    """
    others = [other for other in candidates if other.patient_id != case.patient_id]
    if prefer is not None:
        others = [other for other in others if prefer(other)] or others
    first = stable_hash("control", case.case_id, draw.draw)
    for attempt in range(len(others)):
        try:
            return read(others[(first + attempt) % len(others)])
        except SampleFaultError:
            continue
    return None
