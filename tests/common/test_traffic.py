"""What 8 and 64 ranks send each other in one step at the papers' shapes, counted in a world that is not there."""

import re
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from common import distributed
from common.blocks.template_bank import TemplateBank
from common.distributed import Traffic
from common.losses.contrastive import sharded_similarities, similarities, symmetric_info_nce
from common.losses.relation import relation_matching
from common.types import Reconstruction
from experiments.e_mim.model import EMIMOutput
from experiments.e_mim.objective import Correlation, Objective
from experiments.umd.pairs import make_route, matching_pairs

MIB = 2**20
ROOT = Path(distributed.__file__).parents[1]


@contextmanager
def world_of(size):
    """Pretend to be rank 0 of many: collectives are called and do nothing (private to PyTorch, so only here)."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        distributed._control[dist.group.WORLD] = dist.group.WORLD
        yield
    finally:
        distributed._control.clear()
        dist.destroy_process_group()


def counted(size, step: Callable[[], torch.Tensor | None]) -> Traffic:
    with world_of(size), Traffic() as traffic:
        loss = step()
        if loss is not None:
            loss.backward()
    return traffic


@pytest.mark.parametrize("world", [8, 64])
def test_contrast_does_not_grow_with_the_ranks(world):
    rows = [torch.randn(3, 110_592, requires_grad=True) for _ in range(2)]
    traffic = counted(world, lambda: symmetric_info_nce(*rows, 0.1))
    assert traffic.total <= 6 * MIB
    assert traffic.calls == {"all_to_all": 4, "all_reduce": 2}


@pytest.mark.parametrize(("world", "bar"), [(8, 41), (64, 137)])
def test_templates(world, bar):
    bank = TemplateBank(8, (240, 240, 155))
    bank.view([(index, 70, 70, 30) for index in range(3)], (96, 96, 96), track=True).sum().backward()
    assert counted(world, lambda: _stepped(bank)).total <= bar * MIB


def _stepped(bank):
    bank.step(1e-3, (96, 96, 96))


@pytest.mark.parametrize("world", [8, 64])
def test_relations(world):
    vectors = [torch.randn(64, 768, requires_grad=True) for _ in range(4)]

    def step():
        relations = relation_matching(*vectors)
        return relations["self"] + relations["cross"]

    traffic = counted(world, step)
    assert traffic.total <= 1.01 * world * 1.5 * MIB
    assert set(traffic.calls) == {"all_gather", "reduce_scatter", "all_reduce"}
    assert traffic.bytes["all_reduce"] <= 64


@pytest.mark.parametrize(("world", "tokens", "bar"), [(8, 216, 1.4), (64, 216, 1.4), (64, 512, 8.0)])
def test_pyramid_and_error_share_one_exchange(world, tokens, bar):
    taps = [torch.randn(4, tokens, 192, requires_grad=True) for _ in range(6)]
    pred, target = torch.randn(4, 4, tokens, 64, requires_grad=True), torch.randn(4, 4, tokens, 64)
    hidden = torch.rand(4, 4, tokens) < 0.75
    output = EMIMOutput(pred, target, taps[:3], taps[3:])
    objective = Objective("masked", (3, 6, 9), 0.1, Correlation("position", "batch", False, "mean", 1.0))

    def step():
        terms = objective.terms(output, Reconstruction(pred, target, hidden, {}), torch.ones(4, 4) > 0, sync=True)
        return sum(term.weight * term.value for term in terms.values() if term.weight)

    traffic = counted(world, step)
    assert sum(traffic.calls.values()) <= 4
    assert traffic.total <= bar * MIB


@pytest.mark.parametrize("world", [8, 64])
def test_images_that_travel_for_matching(world):
    """32 colour images of 384 x 384 a rank under bfloat16, the configuration's; in float32 twice as much."""
    sent = []
    for seed in range(3):
        route = make_route(torch.arange(32 * world) * 7919 + seed, torch.arange(32 * world), 0, world)
        sent.append(sum(route.receive))
    assert sum(sent) / len(sent) * 3 * 384 * 384 * 2 <= 14 * MIB
    assert max(sent) <= 32


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_routes_show_what_pairs_say(world):
    for seed in range(100):
        keys = torch.arange(4 * world) * 7919 + 31 * seed
        images = torch.arange(4 * world) % (3 * world)
        pairs = matching_pairs(keys, images)
        routes = [make_route(keys, images, rank, world) for rank in range(world)]
        held = [[rank * 4 + i for i in range(4)] for rank in range(world)]
        for rank, route in enumerate(routes):
            received = [held[other][row] for other in range(world) for row in routes[other].send[rank]]
            assert [len(routes[other].send[rank]) for other in range(world)] == route.receive
            shown = [(held[rank] + received)[place] for place in route.place]
            assert shown == pairs.image[rank * 4 : rank * 4 + 4].tolist()
            assert route.label == pairs.label[rank * 4 : rank * 4 + 4].tolist()


def contrasted(a, b):
    a, b = (x.clone().requires_grad_() for x in (a, b))
    matrix = sharded_similarities(a, b)
    loss = (matrix * torch.arange(matrix.numel(), dtype=matrix.dtype).view_as(matrix)).square().sum()
    loss.backward()
    return matrix.detach(), a.grad / distributed.world_size(), b.grad / distributed.world_size()


@pytest.mark.ddp
def test_two_ranks_multiply_what_one_does(rank_pool):
    a, b = torch.randn(2, 6, 17, dtype=torch.float64)
    matrix, gradient_a, gradient_b = contrasted(a, b)
    assert torch.allclose(matrix, similarities(a, b), rtol=1e-12)
    results = rank_pool.run(contrasted, [(a[:3], b[:3]), (a[3:], b[3:])])
    for other, _, _ in results:
        assert torch.allclose(other, matrix, rtol=1e-10)
    for place, whole in ((1, gradient_a), (2, gradient_b)):
        assert torch.allclose(torch.cat([result[place] for result in results]), whole, rtol=1e-10)


def gathered(x, dim):
    x = x.clone().requires_grad_()
    whole = distributed.all_gather_cat(x, dim)
    (whole.cumsum(0).sin() * (distributed.rank() + 1)).sum().backward()
    return whole.detach(), x.grad


@pytest.mark.ddp
@pytest.mark.parametrize("dim", [0, 1])
def test_gathering_sums_the_gradient_over_ranks(rank_pool, dim):
    parts = torch.randn(2, 3, 4, dtype=torch.float64)
    leaf = torch.cat(list(parts), dim).requires_grad_()
    (3 * leaf.cumsum(0).sin()).sum().backward()
    for part, (whole, gradient) in zip(
        leaf.grad.chunk(2, dim), rank_pool.run(gathered, [(part, dim) for part in parts]), strict=True
    ):
        assert torch.equal(whole, leaf.detach())
        assert torch.allclose(gradient, part, rtol=1e-12)


def summed_templates(places, gradients):
    bank = TemplateBank(2, (6, 6, 6)).double()
    return bank._sum_over_ranks(places, list(gradients))


@pytest.mark.ddp
def test_dense_sums_are_those_of_the_crops(rank_pool):
    places = [(0, 0, 0, 0), (0, 1, 2, 1), (1, 2, 2, 2), (0, 3, 3, -2)]
    gradients = torch.randint(-8, 8, (4, 4, 4, 4), dtype=torch.float64)  # exact in bfloat16
    whole = summed_templates(places, gradients)
    assert float(whole.abs().sum()) > 0
    for part in rank_pool.run(summed_templates, [(places[:2], gradients[:2]), (places[2:], gradients[2:])]):
        assert torch.equal(part, whole)


def test_nothing_else_calls_collectives():
    allowed = {"common/distributed.py"}
    names = r"dist\.(all_|reduce|broadcast|gather|scatter)|torch\.distributed\.(all_|reduce|broadcast|gather|scatter)"
    found = [
        str(path.relative_to(ROOT))
        for room in ("common", "datamodules", "experiments")
        for path in (ROOT / room).rglob("*.py")
        if re.search(names, path.read_text())
    ]
    assert set(found) <= allowed
