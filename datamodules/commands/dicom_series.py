"""What ``medmim init`` proposes for an archive of DICOM files: which series is which modality, in explicit rules."""

import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from common.errors import DataError
from datamodules.commands.proposals import Proposal, flow
from datamodules.dicom.index import Stack, check_subjects
from datamodules.dicom.layout import read_index
from datamodules.dicom.rules import Verdict, classify, default_rules, is_picture
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
        proposal.open = "subject: whose is a study?"
        proposal.aside("subject", f"{str(error).rstrip('.')}; keep one line:",
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


def _rules(stacks: Sequence[Stack]) -> list[tuple[dict[str, Any], str]]:
    """Return a rule for each kind of series, with how many there are and whether it was guessed."""
    groups: dict[str, dict[tuple[str | None, str], list[tuple[Stack, Verdict]]]] = {}
    for stack in stacks:
        verdict = classify(stack, default_rules())
        what = (verdict.modality, "" if verdict.modality else verdict.reason)
        groups.setdefault(stack.first.description, {}).setdefault(what, []).append((stack, verdict))
    found = []
    for description, kinds in sorted(groups.items()):
        limits = _echoes(kinds)
        # The first rule that fits wins, so what leaves series out stands behind what uses some of the same name.
        for (modality, reason), members in sorted(kinds.items(), key=lambda kind: kind[0][0] is None):
            rule: dict[str, Any] = {"description": f"^{re.escape(description)}$"}
            rule |= {"te": limits[modality]} if len(kinds) > 1 and modality in limits else {}
            rule |= {name: of(members[0][0]) for name, of in _marks(kinds).items()}
            rule |= {"ignore": reason} if modality is None else {"modality": modality}
            guessed = any(verdict.guessed for _, verdict in members)
            found.append(
                (rule, f"guessed from its times: {len(members)} series" if guessed else f"{len(members)} series")
            )
    return found


def _marks(kinds: dict[tuple[str | None, str], list[tuple[Stack, Verdict]]]) -> dict[str, Callable[[Stack], bool]]:
    """Return the conditions, besides the times, that tell series of one description apart."""
    marks: dict[str, Callable[[Stack], bool]] = {
        "contrast": lambda stack: stack.first.contrast, "repeated": lambda stack: stack.repeats > 1
    }  # fmt: skip
    found = {}
    for name, of in marks.items():
        values = [{of(stack) for stack, _ in members} for members in kinds.values()]
        if all(len(one) == 1 for one in values) and len(set.union(*values)) == 2:
            found[name] = of
    return found


def _echoes(kinds: dict[tuple[str | None, str], list[tuple[Stack, Verdict]]]) -> dict[str, list[float]]:
    """Return the echo times in ms that tell series of one description apart; empty where they do not."""
    times = {
        modality: [stack.first.echo_time for stack, _ in members if stack.first.echo_time is not None]
        for (modality, _), members in kinds.items()
        if modality is not None
    }
    order = sorted((min(found), max(found), name) for name, found in times.items() if found)
    if any(high >= low for (_, high, _), (low, _, _) in pairwise(order)):
        return {}
    middles = [(high + low) / 2 for (_, high, _), (low, _, _) in pairwise(order)]
    edges = [0.0, *middles, 1e6]
    return {name: [edges[place], edges[place + 1]] for place, (_, _, name) in enumerate(order)}
