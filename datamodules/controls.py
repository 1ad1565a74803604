"""Another patient's content in place of a sample's own: the control of the collapse diagnostics."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from common.faults import SampleFaultError
from common.randomness import stable_hash
from datamodules.loading import Draw
from datamodules.splits import Member

#: Draws before giving up: with two patients of equal share all of them fail once in 10^19.
ATTEMPTS = 64

CaseT = TypeVar("CaseT", bound=Member)
ContentT = TypeVar("ContentT")


def read_control(
    case: Member,
    draw: Draw,
    candidates: Sequence[CaseT],
    read: Callable[[CaseT], ContentT],
    prefer: Callable[[CaseT], bool] | None = None,
) -> ContentT | None:
    """Read a case of another patient, always the same; None if :data:`ATTEMPTS` draws find none.

    Cases are drawn and rejected, never listed: the cost does not grow with the archive.

    Args:
        case: Case to find a control for.
        draw: Index of its draw.
        candidates: Cases to choose from.
        read: Reads a case; if it raises :class:`SampleFaultError`, the next is tried.
        prefer: Whether a case is a preferred control; the first half of the draws accepts no other.
    """
    for attempt in range(ATTEMPTS if candidates else 0):
        other = candidates[stable_hash("control", case.case_id, draw.draw, attempt) % len(candidates)]
        unwanted = prefer is not None and attempt < ATTEMPTS // 2 and not prefer(other)
        if other.patient_id == case.patient_id or unwanted:
            continue
        try:
            return read(other)
        except SampleFaultError:
            continue
    return None
