import sys

import pytest
from torch.utils.data import Dataset

from common.errors import DataError, StorageError
from datamodules.loading import Draw, EvaluationBatches, ResumableLoader, TrainBatches


class Echo(Dataset):
    def __getitem__(self, draw):
        return draw


def indices(batches):
    return [[(draw.index, draw.draw) for draw in batch] for batch in batches]


def test_every_subject_once_a_pass_in_an_order_of_its_own():
    batches = TrainBatches(10, 2, 5, 0, 1, seed=1)
    epoch = [draw for batch in batches for draw in batch]
    assert sorted((d.index, d.draw) for d in epoch) == [(i, d) for i in range(10) for d in range(2)]
    first, second = [d.index for d in epoch[:10]], [d.index for d in epoch[10:]]
    assert first != second
    batches.set_epoch(1)
    assert [d.index for batch in batches for d in batch][:10] != first
    batches.set_epoch(0)
    assert [d for batch in batches for d in batch] == epoch


def test_two_ranks_with_half_the_batch_see_what_one_rank_sees():
    whole = list(TrainBatches(12, 1, 4, 0, 1, seed=3))
    halves = [list(TrainBatches(12, 1, 2, rank, 2, seed=3)) for rank in (0, 1)]
    assert [a + b for a, b in zip(*halves, strict=True)] == whole


def test_too_few_samples_for_the_ranks():
    with pytest.raises(
        DataError, match=r"gives 3 samples an epoch \(3 subjects x 1 crops\), fewer than one batch of 2 on each of 2"
    ):
        TrainBatches(3, 1, 2, 0, 2, seed=0)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_repeats_nothing_and_leaves_nothing_out(world_size):
    parts = [EvaluationBatches(5, 2, 3, rank, world_size) for rank in range(world_size)]
    seen = [draw for part in parts for batch in part for draw in batch]
    assert sorted(seen) == [Draw(i, 0, d) for i in range(5) for d in range(2)]
    whole = list(EvaluationBatches(5, 2, 3))
    assert all(batch in whole for part in parts for batch in part)
    assert parts[0].common_length == 4 // world_size


def test_every_rank_gets_a_batch_or_the_run_is_refused():
    assert [len(EvaluationBatches(1, 3, 4, rank, 2)) for rank in (0, 1)] == [2, 1]
    with pytest.raises(DataError, match="gives 1 samples, fewer than the 2 ranks"):
        EvaluationBatches(1, 1, 4, 1, 2)
    assert len(EvaluationBatches(0, 1, 4, 1, 2)) == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_position_counts_consumed_batches_and_continues(workers):
    def loader():
        return ResumableLoader(Echo(), TrainBatches(12, 1, 2, 0, 1, seed=0), list, num_workers=workers)

    whole = loader()
    expected = list(whole)
    broken = loader()
    iterator = iter(broken)
    begun = [next(iterator) for _ in range(2)]
    state = broken.state_dict()
    assert state == {"epoch": 0, "consumed": 2}
    resumed = loader()
    resumed.load_state_dict(state)
    assert begun + list(resumed) == expected
    resumed.sampler.set_epoch(1)
    assert len(list(resumed)) == 6


def test_a_finished_epoch_leaves_the_next_one_whole():
    loader = ResumableLoader(Echo(), TrainBatches(6, 1, 2, 0, 1, seed=0), list)
    loader.load_state_dict({"epoch": 0, "consumed": 3})
    loader.sampler.set_epoch(1)
    assert len(list(loader)) == 3


def test_the_epoch_is_read_when_the_first_batch_is_asked_for():
    """Lightning makes the iterator before it tells the epoch."""
    loader = ResumableLoader(Echo(), TrainBatches(6, 1, 2, 0, 1, seed=0), list)
    iterator = iter(loader)
    loader.sampler.set_epoch(4)
    assert next(iterator)[0].epoch == 4


def test_waiting_is_measured():
    loader = ResumableLoader(Echo(), TrainBatches(4, 1, 2, 0, 1, seed=0), list)
    list(loader)
    assert loader.wait_seconds > 0


class Refused(Dataset):
    def __getitem__(self, draw):
        try:
            raise OSError("nested")
        except OSError as error:
            raise StorageError("The cache cannot be written: no space.") from error


@pytest.mark.parametrize("workers", [0, 1])
def test_the_refusal_of_a_worker_is_the_sentence_alone(workers):
    loader = ResumableLoader(Refused(), EvaluationBatches(2, 1, 1, 0, 1), list, workers)
    with pytest.raises(StorageError) as error:
        next(iter(loader))
    assert str(error.value) == "The cache cannot be written: no space."
    loader.close()


class Hooks(Refused):
    def __getitem__(self, draw):
        for error in (ConnectionResetError("gone"), EOFError(), ValueError("another")):
            sys.excepthook(type(error), error, None)
        return sys.excepthook.__name__


def test_workers_of_a_killed_process_print_no_traceback(capfd):
    """The thread that hands tensors over met a connection that was reset, and reported it."""
    loader = ResumableLoader(Hooks(), EvaluationBatches(2, 1, 1, 0, 1), list, 1)
    assert next(iter(loader)) == ["_quiet_without_a_reader"]
    loader.close()
    printed = capfd.readouterr().err
    assert "ValueError: another" in printed
    assert "gone" not in printed
    assert "EOFError" not in printed
