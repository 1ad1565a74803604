import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest

from experiments.mrm_genetics.callbacks import GenomeFloor, principal_components


@pytest.fixture(scope="module")
def calls():
    """Calls of 600 persons at 4,000 variants with two planted axes of ancestry, standardised."""
    draw = np.random.default_rng(0)
    shift = draw.normal(size=(600, 2)) @ draw.normal(scale=0.06, size=(2, 4000))
    counts = draw.binomial(2, np.clip(draw.uniform(0.1, 0.9, 4000) + shift, 0.01, 0.99)).astype(np.float32)
    return (counts - counts.mean(0)) / counts.std(0)


def projection_error(values, mean, axes):
    centred = values - mean
    return float(((centred - centred @ axes.T @ axes) ** 2).sum())


def test_the_randomised_axes_explain_what_the_exact_ones_do(calls):
    held, fitted = calls[400:], calls[:400]
    mean, axes = principal_components(fitted, 2)
    exact = np.linalg.svd((fitted - fitted.mean(0)).astype(np.float64), full_matrices=False)[2][:2]
    assert np.allclose(axes @ axes.T, np.eye(2), atol=1e-5)
    assert projection_error(held, mean, axes) <= 1.001 * projection_error(held, fitted.mean(0), exact)
    assert np.array_equal(principal_components(fitted, 2)[1], axes)


def test_memory_is_a_few_copies_of_the_calls(calls):
    tracemalloc.start()
    principal_components(calls, 2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= 3 * calls.nbytes


def fit_on(rank, world, values):
    """Validate twice on a rank; return how often the persons were read, and the axes."""
    reads = []
    data = SimpleNamespace(genome=object(), training_genomes=lambda count: reads.append(count) or values)
    floor = GenomeFloor()
    trainer = SimpleNamespace(datamodule=data, is_global_zero=rank == 0, world_size=world)
    module = SimpleNamespace(device="cpu", reconstruct_genome=None)
    for _ in range(2):
        floor.on_validation_start(trainer, module)
    return reads, floor._fitted[1].numpy()


def test_rank_0_fits_once_for_all(calls, rank_pool):
    (reads, axes), (other_reads, other_axes) = rank_pool.run(fit_on, [(r, 2, calls[:50, :80]) for r in range(2)])
    assert (reads, other_reads) == ([2000], [])
    assert np.array_equal(axes, other_axes)
