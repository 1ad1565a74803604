import pytest
import torch

from common.distributed import loss_and_gradient
from common.downstream.structures import StructureSegmentation, dice_and_cross_entropy
from common.types import InputSpec, TaskState


def test_loss_by_hand():
    label = torch.zeros(1, 2, 2, 2)
    label[0, 0, 0] = 1
    logits = torch.zeros(1, 2, 2, 2)
    dice = ((1 - (2 * 1 + 1) / (4 + 1)) + (1 - 1 / 3)) / 2
    assert dice_and_cross_entropy(logits, label).item() == pytest.approx(0.8 * dice + 0.2 * 0.693147, abs=1e-6)
    right = 40 * (2 * label - 1)
    assert dice_and_cross_entropy(right, label).item() == pytest.approx(0, abs=1e-6)


def test_structures_are_scored_on_the_grid_of_the_file():
    module = StructureSegmentation()
    module.state = TaskState(InputSpec(("a",), (8, 8), regions={"disc": (1,), "atrophy": (1,)}))
    logits = torch.full((1, 2, 8, 8), -5.0)
    logits[0, 0, :4] = 5
    module.network = lambda image: logits
    region = torch.zeros(2, 16, 8, dtype=torch.uint8)
    region[0, :8] = 1
    label = (logits > 0).float()
    batch = {"image": None, "label": label, "region": [region], "subject_id": ["s"], "patient_id": ["p"]}
    scores = module.metrics(module.score(batch))
    assert scores["dice_disc"] == scores["dice_disc_positive"] == 1
    assert scores["dice_atrophy"] == 1
    assert "dice_atrophy_positive" not in scores
    assert scores["dice"] == 1


def test_data_without_structures_are_refused():
    module = StructureSegmentation()
    with pytest.raises(Exception, match="no structures"):
        module.build_network(InputSpec(("a",), (32, 32)))


@pytest.mark.ddp
def test_two_ranks_equal_one(rank_pool):
    tensors = {"logits": torch.randn(4, 2, 3, 3).double(), "label": (torch.rand(4, 2, 3, 3) > 0.5).double()}
    weight = torch.randn(3, 3).double()
    whole = loss_and_gradient(dice_and_cross_entropy, tensors, ["logits"], weight)
    parts = [{name: x[part] for name, x in tensors.items()} for part in (slice(0, 2), slice(2, 4))]
    for result in rank_pool.run(run_part, [(part, weight) for part in parts]):
        for ours, theirs in zip(result, whole, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-5)


def run_part(part, weight):
    return loss_and_gradient(dice_and_cross_entropy, part, ["logits"], weight)
