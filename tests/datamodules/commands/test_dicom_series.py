"""What init proposes for series of DICOM: explicit rules, which say the same as those that come with the project."""

import pytest
import yaml

from datamodules.commands.dicom_series import _rules, propose_series
from datamodules.commands.proposals import begun
from datamodules.dicom.index import Instance, Stack
from datamodules.dicom.rules import classify, default_rules, parse_rules
from datamodules.tree import Tree

MR = "1.2.840.10008.5.1.4.1.1.4"


def stack(
    description: str, te: float = 5.0, tr: float = 500.0, contrast: bool = False, slices: int = 3, repeats: int = 1
):
    """Return a stack of MR slices."""
    return Stack(tuple(
        Instance(f"{description}{place}{turn}", f"{place}.{turn}", "1", "1", MR, "p", "MR", description, ("ORIGINAL",),
                 te, tr, None, contrast, "f", (1.0, 0, 0, 0, 1, 0), (0.0, 0.0, float(place)), 1, "2D", (8, 8),
                 (1.0, 1.0, 1.0), 1, 1, "")
        for place in range(slices) for turn in range(repeats)
    ))  # fmt: skip


STACKS = [
    stack("t1 mprage"), stack("t1 mprage", contrast=True), stack("PD+T2 tse", te=11, tr=3000),
    stack("PD+T2 tse", te=92, tr=3000), stack("dwi b1000"), stack("dwi b1000", repeats=4), stack("localizer"),
    stack("", te=20, tr=600), stack("", te=90, tr=4000), stack("odd", te=60, tr=1000), stack("t2 (a.b)+[c]", te=90),
]  # fmt: skip


def test_explicit_rules_decide_as_the_defaults_do():
    written = yaml.safe_load(yaml.safe_dump([rule for rule, _ in _rules(STACKS)]))
    rules = parse_rules(written)
    for one in STACKS:
        wanted, found = classify(one, default_rules()), classify(one, rules)
        assert found.modality == wanted.modality, one.first.description
    assert not any(rule.guessed for rule in rules)


def test_a_guess_is_said():
    remarks = {rule["description"]: remark for rule, remark in _rules(STACKS)}
    assert remarks["^$"].startswith("guessed from its times")
    assert remarks["^localizer$"] == "1 series"


@pytest.mark.real_data
def test_a_dual_echo_is_told_by_its_times(real_data):
    tree = Tree(real_data("dicom_pdt2"))
    proposal = begun(tree, "dicom")
    assert propose_series(tree, proposal) == "2 series in 1 studies"
    assert [(rule["te"][0], rule["modality"]) for rule in proposal.said["series"][2:]] == [(0.0, "pd"), (51.5, "t2")]
    assert proposal.open == ""


@pytest.mark.real_data
def test_one_patient_id_for_all_is_asked_about(real_data):
    tree = Tree(real_data("dicom_vendors"))
    proposal = begun(tree, "dicom")
    propose_series(tree, proposal)
    assert proposal.open == "subject: whose is a study?"
    assert "# subject: study" in proposal.text()
    assert "# guessed from its times: 1 series" in proposal.text()
