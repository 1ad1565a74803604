"""Which series of a DICOM study is which modality: ordered rules, first match wins, editable in ``archive.yaml``."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

import yaml

from common.errors import DataError
from datamodules.dicom.index import Stack

#: Classes of objects that hold volumes: MR, CT and PET, classic and enhanced.
_VOLUMES = {
    "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2",
    "1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.4.1", "1.2.840.10008.5.1.4.1.1.4.4",
    "1.2.840.10008.5.1.4.1.1.128", "1.2.840.10008.5.1.4.1.1.130",
}  # fmt: skip
_VOLUME_MODALITIES = ("MR", "CT", "PT")

#: DICOM modalities of single pictures, and of objects that hold neither pictures nor volumes of ours.
_PICTURES = ("CR", "DX", "MG", "OP", "OPT", "SC", "US", "OT", "XC", "XA", "RF", "GM", "SM", "ES")


@dataclass(frozen=True)
class Rule:
    """One line of ``series:``; every condition that is given must hold.

    Attributes:
        description: Regular expression searched in the series' description, in any case.
        unless: Regular expression that must not be found there.
        image_type: Words of which one must be among ImageType's.
        contrast: Whether a contrast agent must be named, or must not.
        te, tr, ti: Echo, repetition and inversion time in ms, ``[low, high)``; unknown times never match.
        kind: ``MR``, ``CT``, ``PT``, or ``other`` for everything else.
        repeated: Whether several slices must lie at one place, or must not.
        modality: What the series is; or
        ignore: why it is left out.
        guessed: Whether the rule only proposes, for ``medmim init`` to write down.
    """

    description: str | None = None
    unless: str | None = None
    image_type: Sequence[str] = ()
    contrast: bool | None = None
    te: tuple[float, float] | None = None
    tr: tuple[float, float] | None = None
    ti: tuple[float, float] | None = None
    kind: str | None = None
    repeated: bool | None = None
    modality: str | None = None
    ignore: str | None = None
    guessed: bool = False

    def __post_init__(self) -> None:
        if (self.modality is None) == (self.ignore is None):
            raise DataError("A rule under series: needs either modality or ignore.")
        for name in ("description", "unless"):
            try:
                re.compile(getattr(self, name) or "")
            except re.error as error:
                raise DataError(f"series: {name} {getattr(self, name)!r} is not a valid regular expression "
                                f"({error}).") from error  # fmt: skip
        for name in ("te", "tr", "ti"):
            limits = getattr(self, name)
            if limits is not None and not _is_range(limits):
                raise DataError(f"series: {name} must be [low, high] in ms, got {limits!r}.")

    def matches(self, stack: Stack) -> bool:
        """Whether all conditions hold for a stack."""
        first = stack.first
        times = ((self.te, first.echo_time), (self.tr, first.repetition_time), (self.ti, first.inversion_time))
        types = {v.upper() for v in self.image_type} & {v.upper() for v in first.image_type}
        kind = "other" if self.kind == "other" and not is_volume(stack) else first.modality
        return (
            (self.description is None or re.search(self.description, first.description, re.IGNORECASE) is not None)
            and (self.unless is None or re.search(self.unless, first.description, re.IGNORECASE) is None)
            and (not self.image_type or bool(types))
            and self.contrast in (None, first.contrast)
            and (self.repeated is None or self.repeated == (stack.repeats > 1))
            and self.kind in (None, kind)
            and all(limits is None or (value is not None and limits[0] <= value < limits[1]) for limits, value in times)
        )


def _is_range(limits: Any) -> bool:
    numbers = isinstance(limits, list | tuple) and len(limits) == 2
    return numbers and all(isinstance(v, int | float) for v in limits) and limits[0] < limits[1]


class Verdict(NamedTuple):
    """How a series was classified.

    Attributes:
        modality: Its name; None where it is left out.
        reason: Why it is left out, or which rule decided.
        guessed: Whether the decision rests on its times alone.
        ruled: Whether a rule decided.
    """

    modality: str | None
    reason: str
    guessed: bool = False
    ruled: bool = True


def is_volume(stack: Stack) -> bool:
    """Whether a stack is of a class that holds volumes, or is sliced MR, CT or PET saved as something else."""
    first = stack.first
    return first.sop_class in _VOLUMES or (first.modality in _VOLUME_MODALITIES and len(first.position) == 3)


def is_picture(stack: Stack) -> bool:
    """Whether a stack holds 2D pictures: radiographs, mammograms, fundus photographs, ultrasound, captures."""
    return not is_volume(stack) and stack.first.modality in _PICTURES


@cache
def default_rules() -> tuple[Rule, ...]:
    """Return the rules that come with the project."""
    return parse_rules(yaml.safe_load(files("datamodules.dicom").joinpath("dicom_rules.yaml").read_text()))


def parse_rules(entries: Sequence[Mapping[str, Any]]) -> tuple[Rule, ...]:
    """Make rules from their YAML.

    Raises:
        DataError: a key is unknown, a regular expression or a range is invalid.
    """
    known = {field.name for field in fields(Rule)}
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, Mapping):
            raise DataError(f"Rule {number} under series: must be a mapping, got {entry!r}.")
        if unknown := [name for name in entry if name not in known]:
            raise DataError(f"Rule {number} under series: has the unknown key {unknown[0]!r}; known are "
                            f"{', '.join(sorted(known))}.")  # fmt: skip
    return tuple(Rule(**entry) for entry in entries)


def classify(stack: Stack, rules: Sequence[Rule]) -> Verdict:
    """Classify a stack."""
    for number, rule in enumerate(rules, 1):
        if rule.matches(stack):
            if rule.ignore is not None:
                return Verdict(None, rule.ignore)
            return Verdict(rule.modality, f"rule {number}", rule.guessed)
    return Verdict(None, "no rule matches it", ruled=False)
