import pytest
import torch

from common.distributed import loss_and_gradient
from common.losses.relation import relation_matching, sample_relations


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)


CASE = {
    "image": rows([3, 4], [1, 0]),
    "genome": rows([0, 2], [1, 1]),
    "image_masked": rows([4, 3], [0, 1]),
    "genome_masked": rows([0, 1], [2, 0]),
}


def slow(image, genome, image_masked, genome_masked):
    """Eqs. 10 and 12 pair by pair."""

    def cos(a, b):
        return float(a @ b / (a.norm() * b.norm()))

    n = len(image)
    own = sum(
        (cos(a[i], a[j]) - cos(b[i], b[j])) ** 2
        for a, b in ((image, image_masked), (genome, genome_masked))
        for i in range(n)
        for j in range(n)
    )
    cross = sum(
        (cos(image[i], genome[j]) - cos(image_masked[i], genome_masked[j])) ** 2 for i in range(n) for j in range(n)
    )
    return own / (2 * n**2), cross / n**2


def test_numbers_by_hand():
    """Case 4 of the specification."""
    loss = relation_matching(**CASE)
    assert loss["self"].item() == pytest.approx(0.125, abs=1e-12)
    assert loss["cross"].item() == pytest.approx(0.3940202025, abs=1e-10)
    between = sample_relations(CASE["image"], CASE["genome"])
    assert between.flatten().tolist() == pytest.approx([0.8, 0.98994949, 0, 0.70710678], abs=1e-8)
    alone = relation_matching(CASE["image"], None, CASE["image_masked"], None)
    assert (alone["self"].item(), alone["cross"].item()) == (pytest.approx(0, abs=1e-12), 0)


def test_equals_a_slow_reference():
    tensors = [torch.randn(5, 7, dtype=torch.float64) for _ in range(4)]
    loss = relation_matching(*tensors)
    assert (loss["self"].item(), loss["cross"].item()) == pytest.approx(slow(*tensors), rel=1e-10)
    image, _, masked, _ = tensors
    change = sample_relations(image, image) - sample_relations(masked, masked)
    assert relation_matching(image, None, masked, None)["self"].item() == pytest.approx(change.square().mean().item())


def test_length_does_not_matter_and_equal_passes_cost_nothing():
    tensors = [torch.randn(4, 6, dtype=torch.float64) for _ in range(4)]
    scaled = [x * torch.rand(4, 1, dtype=torch.float64) * 9 + 0 for x in tensors]
    for one, two in zip(relation_matching(*tensors).values(), relation_matching(*scaled).values(), strict=True):
        assert one.item() == pytest.approx(two.item(), rel=1e-9)
    same = relation_matching(tensors[0], tensors[1], tensors[0], tensors[1])
    assert (same["self"].item(), same["cross"].item()) == (0, 0)
    assert torch.isfinite(relation_matching(*[torch.zeros(3, 4)] * 4)["cross"])


def test_samples_without_genetics_are_left_out_of_its_relations():
    tensors = [torch.randn(4, 6, dtype=torch.float64) for _ in range(4)]
    present = torch.tensor([True, False, True, True])
    loss = relation_matching(*tensors, present=present)
    rest = relation_matching(*[x[present] for x in tensors])
    own = relation_matching(tensors[0], None, tensors[2], None)["self"]
    own_rest = relation_matching(tensors[0][present], None, tensors[2][present], None)["self"]
    assert loss["cross"].item() == pytest.approx(rest["cross"].item(), rel=1e-9)
    assert loss["self"].item() == pytest.approx((rest["self"] + (own - own_rest) / 2).item(), rel=1e-9)
    nobody = relation_matching(*tensors, present=torch.zeros(4, dtype=torch.bool))
    assert nobody["self"].item() == pytest.approx(own.item())
    assert nobody["cross"].item() == 0


def test_options():
    tensors = [torch.randn(4, 6, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    centred = [x - x.mean(0) for x in tensors]
    assert relation_matching(*tensors, center=True)["self"].item() == pytest.approx(
        relation_matching(*centred)["self"].item()
    )
    loss = relation_matching(*tensors, stop_gradient=True)
    (loss["self"] + loss["cross"]).backward()
    assert tensors[0].grad is None or not tensors[0].grad.any()
    assert tensors[2].grad.abs().max() > 0
    half = relation_matching(*[x.detach().bfloat16() for x in tensors])
    assert half["self"].dtype == torch.float32


def test_shapes_that_do_not_fit():
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match="one shape"):
        relation_matching(x, torch.randn(3, 5), x, x)
    with pytest.raises(ValueError, match="Two or four"):
        relation_matching(x, x, x, None)


def total(image, genome, image_masked, genome_masked, **settings):
    loss = relation_matching(image, genome, image_masked, genome_masked, **settings)
    return loss["self"] + loss["cross"]


@pytest.mark.ddp
@pytest.mark.parametrize("absent", [False, True])
@pytest.mark.parametrize("center", [False, True])
def test_two_ranks_equal_one(rank_pool, absent, center):
    names = ("image", "genome", "image_masked", "genome_masked")
    tensors = {name: torch.randn(6, 5, dtype=torch.float64) for name in names}
    weight = torch.randn(5, 5, dtype=torch.float64)
    present = torch.tensor([True, True, False, True, False, True]) if absent else torch.ones(6, dtype=torch.bool)
    whole = loss_and_gradient(total, tensors | {"present": present}, names, weight, center=center)
    parts = [{name: x[part] for name, x in (tensors | {"present": present}).items()}
             for part in (slice(0, 3), slice(3, 6))]  # fmt: skip
    for result in rank_pool.run(part_of, [(part, names, weight, center) for part in parts]):
        for ours, theirs in zip(result, whole, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-10)


def part_of(part, names, weight, center):
    return loss_and_gradient(total, part, names, weight, center=center)
