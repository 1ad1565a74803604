import math

import numpy as np
import pytest
import torch

from common.downstream.segmentation import SegmentationModule, merge_regions, summarise
from common.types import InputSpec, TaskState
from datamodules.volumes.cache import Record

BRATS = {"WT": [1, 2, 3], "TC": [1, 3], "ET": [3]}


def test_regions_go_back_to_the_labels_they_came_from():
    label = torch.randint(0, 4, (5, 6, 7), generator=torch.Generator().manual_seed(0))
    regions = torch.stack([torch.isin(label, torch.tensor(values)) for values in BRATS.values()])
    assert torch.equal(merge_regions(regions, BRATS), label.to(torch.uint8))


def test_disjoint_regions_keep_their_values():
    zones = {"TZ": [1], "PZ": [2]}
    label = torch.tensor([0, 1, 2, 2])[:, None, None]
    regions = torch.stack([label == 1, label == 2])
    assert torch.equal(merge_regions(regions, zones), label.to(torch.uint8))


def test_older_releases_write_four_for_enhancing_tumour():
    old = {"WT": [1, 2, 4], "TC": [1, 4], "ET": [4]}
    assert merge_regions(torch.ones(3, 1, 1, 1, dtype=torch.bool), old).item() == 4


def test_a_part_outside_its_whole_is_still_written():
    regions = torch.tensor([False, False, True])[:, None, None, None]
    assert merge_regions(regions, BRATS).item() == 3


def test_summary_of_cases():
    rows = [
        {"subject_id": "a", "dice_WT": 1.0, "empty_WT": "both"},
        {"subject_id": "b", "dice_WT": 0.5, "empty_WT": "neither"},
    ]
    summary = summarise(rows)
    assert summary["n"] == 2
    assert summary["dice_WT"] == {"mean": 0.75, "std": pytest.approx(0.3535534), "n": 2}
    assert summary["empty_WT"] == {"neither": 1, "prediction": 0, "reference": 0, "both": 1}
    assert summarise([]) == {"n": 0}
    assert summarise(rows[:1])["dice_WT"]["std"] == 0.0


@pytest.mark.parametrize(
    ("pred", "target", "word"), [(1, 1, "neither"), (0, 1, "prediction"), (1, 0, "reference"), (0, 0, "both")]
)
def test_what_was_empty_is_named(pred, target, word):
    assert SegmentationModule._emptiness(torch.tensor([pred]), torch.tensor([target])) == word


def test_the_flip_ensemble_is_symmetric():
    """Averaged over all mirrorings, the mirrored volume has the mirrored answer, whatever the network."""

    class Lopsided(torch.nn.Module):
        def forward(self, x):
            return x[:, :1] * torch.linspace(-1, 2, x.shape[2])[:, None, None] + 0.1

    module = SegmentationModule(flip_ensemble=True)
    module.state = TaskState(InputSpec(("a",), (8, 8, 8), regions={"R": (1,)}))
    module.network = Lopsided()
    image = torch.randn(1, 1, 12, 8, 10, generator=torch.Generator().manual_seed(0))
    for axis in (2, 3, 4):
        assert torch.equal(module.segment(image.flip(axis)), module.segment(image).flip(axis))
    module._flip_ensemble = False
    assert not torch.equal(module.segment(image.flip(2)), module.segment(image).flip(2))


def test_hd95_of_a_resampled_set_has_one_unit(monkeypatch):
    """Files of 0.5 x 0.5 x 3 mm brought to 1 mm: distances and the penalty of an empty region are both in mm."""
    record = Record(
        "a",
        usable=True,
        affine=np.diag([1.0, -1.0, 2.0, 1.0]).tolist(),
        source_shape=[40, 40, 10],
        source_affine=np.diag([0.5, 0.5, 3.0, 1.0]).tolist(),
    )
    assert record.spacing == [1, 1, 2]
    assert record.source_diagonal == pytest.approx(math.hypot(20, 20, 30))
    module = SegmentationModule()
    module.state = TaskState(InputSpec(("a",), (8, 8, 8), {"near": (1,), "lost": (2,)}))
    label = torch.zeros(1, 2, 12, 12, 12)
    label[0, 0, 3, 3, 3] = label[0, 1, 5, 5, 5] = 1
    logits = torch.full_like(label, -9.0)
    logits[0, 0, 3, 3, 6] = 9  # three voxels of 2 mm away
    monkeypatch.setattr(module, "logits", lambda image: logits)
    module._score({"image": label, "label": label, "subject_id": ["a"], "record": [record]}, distance=True)
    assert module.rows[0]["hd95_near"] == pytest.approx(6)
    assert module.rows[0]["hd95_lost"] == pytest.approx(math.hypot(20, 20, 30))
