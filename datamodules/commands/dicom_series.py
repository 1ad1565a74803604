"""What ``medmim init`` proposes for an archive of DICOM files: which series is which modality, in explicit rules."""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from common.errors import DataError
from datamodules.commands.proposals import Proposal, flow
from datamodules.dicom.index import Stack, check_subjects
from datamodules.dicom.layout import read_index
from datamodules.dicom.rules import classify, default_rules, is_picture
from datamodules.tree import Tree

#: Rules that are written as they are, before those of single series.
_GENERAL = (
    {"kind": "other", "ignore": "not MR, CT or PET"},
    {"image_type": ["LOCALIZER", "MPR", "PROJECTION IMAGE", "SCREEN SAVE"], "ignore": "derived view or localizer"},
)


def propose_series(tree: Tree, proposal: Proposal) -> str:
    """Propose rules for the series of an archive, and whose a study is; return what was found, in words.

    Raises:
        DataError: none of its files holds a volume or a picture.
    """
    index = read_index(tree)
    if not index.stacks:
        raise DataError(f"None of the {len(index.unreadable)} DICOM files under {tree} has a readable header.")
    count = len({stack.first.study_uid for stack in index.stacks})
    stacks = [stack for stack in index.stacks if not is_picture(stack)]
    try:
        check_subjects(index.instances, None)
    except DataError as error:
        proposal.ask("subject: whose is a study?", f"{str(error).rstrip('.')}; keep one line:",
                     "subject: study  # each study is a patient", "subject: folder", "subject: patient")  # fmt: skip
    if any(stack.first.frames > 1 for stack in index.stacks if is_picture(stack)):
        proposal.aside("frame", "frame: 0  # takes one frame of pictures that have several, which else are left aside")
    if not stacks:
        return f"{len(index.stacks)} series of pictures in {count} studies"
    proposal.said["series"] = [*_GENERAL]
    for rule, remark in _rules(stacks):
        proposal.said["series"].append(rule)
        proposal.remarks[flow(rule)] = remark
    proposal.said["min_slices"] = 10
    return f"{len(stacks)} series in {count} studies"


#: What no rule decided is ignored without a rule of its own.
_RULELESS = "no rule matches it"
_Kinds = dict[tuple[str | None, str], list[Stack]]


def _rules(stacks: Sequence[Stack]) -> list[tuple[dict[str, Any], str]]:
    """Return a rule for each kind of series, with how many there are and whether it was guessed."""
    groups: dict[str, _Kinds] = {}
    guessed: set[tuple[str, str | None]] = set()
    for stack in stacks:
        verdict, description = classify(stack, default_rules()), stack.first.description
        if verdict.reason != _RULELESS:
            what = (verdict.modality, "" if verdict.modality else verdict.reason)
            groups.setdefault(description, {}).setdefault(what, []).append(stack)
        if verdict.guessed:
            guessed.add((description, verdict.modality))
    found = []
    for description, kinds in sorted(groups.items()):
        for (modality, reason), condition in _conditions(kinds).items():
            rule: dict[str, Any] = {"description": f"^{re.escape(description)}$", **condition}
            rule |= {"ignore": reason} if modality is None else {"modality": modality}
            count = f"{len(kinds[modality, reason])} series"
            found.append((rule, f"guessed from its times: {count}" if (description, modality) in guessed else count))
    return found


def _conditions(kinds: _Kinds) -> dict[tuple[str | None, str], dict[str, Any]]:
    """Return what tells the kinds of series of one description apart: contrast, slices at one place, or echo times."""
    if len(kinds) < 2:
        return {kind: {} for kind in kinds}
    facts = {
        "contrast": {kind: {stack.first.contrast for stack in found} for kind, found in kinds.items()},
        "repeated": {kind: {stack.repeats > 1 for stack in found} for kind, found in kinds.items()},
    }
    for name, values in facts.items():
        if len(kinds) == 2 and sorted(values.values(), key=sorted) == [{False}, {True}]:
            return {kind: {name: next(iter(value))} for kind, value in values.items()}
    limits = _echoes(kinds)
    return {
        kind: {"te": limits[kind]} if kind in limits else {} for kind in sorted(kinds, key=lambda k: k not in limits)
    }


def _echoes(kinds: _Kinds) -> dict[tuple[str | None, str], list[float]]:
    """Return the echo times in ms that tell kinds of series apart; none where they do not."""
    times = {kind: [s.first.echo_time for s in found if s.first.echo_time is not None] for kind, found in kinds.items()}
    order = sorted((min(found), max(found), kind) for kind, found in times.items() if found)
    if len(order) < 2 or any(high >= low for (_, high, _), (low, _, _) in pairwise(order)):
        return {}
    middles = [round((high + low) / 2, 1) for (_, high, _), (low, _, _) in pairwise(order)]
    edges = [0.0, *middles, 1e5]
    return {kind: [edges[place], edges[place + 1]] for place, (_, _, kind) in enumerate(order)}
