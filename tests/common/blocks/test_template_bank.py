import pytest
import torch

from common.blocks.template_bank import TemplateBank, place_of


def filled(values, **settings):
    bank = TemplateBank(len(values), values.shape[1:], **settings)
    with torch.no_grad():
        bank.weight.copy_(values)
        for index, value in enumerate(values):
            bank.extremes[index] = torch.stack(value.aminmax())
    return bank


def test_the_specifications_view():
    bank = filled(torch.arange(216.0).reshape(1, 6, 6, 6))
    place = place_of(0, (1, 0, 2), (4, 4, 4), (6, 6, 6))
    assert place == (0, 2, 1, 3)
    view = bank.view([place], (2, 2, 2)) * 215
    assert view.flatten().tolist() == pytest.approx([81, 82, 87, 88, 117, 118, 123, 124], abs=1e-4)


@pytest.mark.parametrize(
    ("volume", "start", "expected"),
    [((140, 174, 138), (20, 41, 7), (70, 74, 15)), ((150, 180, 161), (0, 0, 0), (45, 30, -3))],
)
def test_realistic_places(volume, start, expected):
    assert place_of(3, start, volume, (240, 240, 155)) == (3, *expected)


def test_beyond_the_atlas_there_is_nothing():
    bank = filled(torch.rand(1, 4, 4, 4) + 1)
    view = bank.view([(0, -1, 2, 0)], (4, 4, 4))[0, 0]
    inside = bank.normalized()[0]
    assert torch.equal(view[1:, :2], inside[:3, 2:])
    assert not view[0].any()
    assert not view[:, 2:].any()
    assert not bank.view([(0, 9, 9, 9)], (4, 4, 4)).any()


def test_gradients_from_zero_are_finite_small_and_only_where_a_crop_looked():
    bank = TemplateBank(2, (12, 12, 12))
    view = bank.view([(1, 2, 3, 4)], (4, 4, 4), track=True)
    target = torch.rand(1, 1, 4, 4, 4)
    (view - target).square().mean().backward()
    (seen,) = bank._seen
    assert torch.isfinite(seen.leaf.grad).all()
    assert seen.leaf.grad.abs().max() < 2 / 64 / bank.MIN_RANGE
    bank.step(1e-3, (4, 4, 4))
    changed = bank.weight != 0
    assert changed[1, 2:6, 3:7, 4:8].all()
    assert int(changed.sum()) == 64
    assert bank.weight.abs().max() <= 1.001e-3
    assert torch.isfinite(bank.weight).all()
    assert bank.range().tolist() == [0.0, pytest.approx(1e-3, rel=1e-2)]


def test_extremes_carry_no_gradient():
    """Through a minimum or maximum two single voxels would collect the gradient of all."""
    bank = filled(torch.rand(1, 6, 6, 6))
    bank.view([(0, 0, 0, 0)], (6, 6, 6), track=True).sum().backward()
    gradient = bank._seen[0].leaf.grad
    assert torch.allclose(gradient, gradient.flatten()[0].expand_as(gradient))


def test_where_everything_is_seen_it_is_adam():
    bank = filled(torch.zeros(1, 3, 4, 5))
    dense = torch.nn.Parameter(torch.zeros(3, 4, 5))
    optimizer = torch.optim.Adam([dense], lr=0.01)
    for step in range(5):
        gradient = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(step))
        bank.view([(0, 0, 0, 0)], (3, 4, 5), track=True)
        bank._seen[0].leaf.grad = gradient
        bank.step(0.01, (3, 4, 5))
        dense.grad = gradient
        optimizer.step()
    assert torch.allclose(bank.weight[0], dense, atol=1e-7)
    assert torch.allclose(bank.extremes[0], torch.stack(dense.detach().aminmax()), atol=1e-7)


def test_a_voxel_takes_the_steps_that_saw_it():
    """Overlapping crops add up; what a step did not see keeps value, moments and count."""
    bank = filled(torch.zeros(1, 6, 4, 4))
    reference = {}
    parts = [[(0, 0, 0, 0), (0, 2, 0, 0)], [(0, 2, 0, 0)]]
    single = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.Adam([single], lr=0.1)
    for places in parts:
        bank.view(places, (4, 4, 4), track=True)
        for entry in bank._seen:
            entry.leaf.grad = torch.ones_like(entry.leaf)
        bank.step(0.1, (4, 4, 4))
        single.grad = torch.full((1,), float(len(places)))
        optimizer.step()
        reference = dict(optimizer.state[single])
    assert bank.count[0, :, 0, 0].tolist() == [1, 1, 2, 2, 2, 2]
    assert bank.weight[0, 2, 0, 0].item() == pytest.approx(single.item(), rel=1e-5)
    assert bank.mean[0, 2, 0, 0].item() == pytest.approx(reference["exp_avg"].item(), rel=1e-5)


def test_between_the_crops_of_a_step_nothing_moves():
    """A step updates one box of a template; what lies in it between two crops must stay as earlier steps left it."""
    bank = filled(torch.zeros(1, 12, 4, 4))
    kept = ()
    for starts in ((0, 4, 8), (0, 8)):
        kept = tuple(part.clone() for part in (bank.weight, bank.mean, bank.square, bank.count))
        bank.view([(0, start, 0, 0) for start in starts], (4, 4, 4), track=True)
        for entry in bank._seen:
            entry.leaf.grad = torch.ones_like(entry.leaf)
        bank.step(0.1, (4, 4, 4))
    assert kept[0][0, 4:8].all()
    for before, after in zip(kept, (bank.weight, bank.mean, bank.square, bank.count), strict=True):
        assert torch.equal(before[0, 4:8], after[0, 4:8])
        assert not torch.equal(before[0, :4], after[0, :4])


def test_it_is_neither_trained_densely_nor_broadcast():
    bank = TemplateBank(1, (4, 4, 4))
    assert not any(parameter.requires_grad for parameter in bank.parameters())
    assert not list(bank.buffers())
    assert {"weight", "mean", "square", "count", "extremes"} == set(bank.state_dict())


def stepped(places, gradients):
    """Take one step with these crops and return the templates."""
    bank = TemplateBank(2, (6, 6, 6)).double()
    bank.view(places, (4, 4, 4), track=True)
    for entry, gradient in zip(bank._seen, gradients, strict=True):
        entry.leaf.grad = gradient[tuple(slice(0, n) for n in entry.leaf.shape)].clone()
    bank.step(0.1, (4, 4, 4))
    return bank.weight.detach(), bank.mean.detach()


@pytest.mark.ddp
def test_two_ranks_equal_one(rank_pool):
    places = [(0, 0, 0, 0), (0, 1, 2, 1), (1, 2, 2, 2), (0, 3, 3, 3)]
    gradients = torch.randn(4, 4, 4, 4, dtype=torch.float64)
    weight, mean = stepped(places, gradients)
    jobs = [(places[:2], 2 * gradients[:2]), (places[2:], 2 * gradients[2:])]
    for other_weight, other_mean in rank_pool.run(stepped, jobs):
        assert torch.allclose(other_weight, weight, rtol=1e-10)
        assert torch.allclose(other_mean, mean, rtol=1e-10)
