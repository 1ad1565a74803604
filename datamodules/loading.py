"""Which sample comes when: pure functions of seed and epoch, and a loader that knows its position."""

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.util import Finalize
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from common.errors import DataError, UserError
from common.randomness import numpy_generator


@dataclass(frozen=True, order=True)
class Draw:
    """One request to a data set.

    Attributes:
        index: Subject.
        epoch: Epoch; 0 outside training.
        draw: Which of the subject's draws in this epoch.
    """

    index: int
    epoch: int
    draw: int


class TrainBatches(Sampler[list[Draw]]):
    """Shuffled batches of this rank.

    An epoch passes ``draws`` times over all subjects, each pass in its own order, a function of (seed, epoch, pass).
    The order is cut into global batches, of which each rank takes its consecutive part: two ranks with half the batch
    see, step by step, what one rank with all of it sees. A last incomplete global batch is left out.

    Args:
        num_subjects: Subjects in the set.
        draws: Passes per epoch.
        batch_size: Per rank.
        rank: This rank.
        world_size: Number of ranks.
        seed: Seed of the order.

    Raises:
        DataError: an epoch would not fill one global batch.
    """

    def __init__(self, num_subjects: int, draws: int, batch_size: int, rank: int, world_size: int, seed: int) -> None:
        if num_subjects * draws < batch_size * world_size:
            raise DataError(
                f"The training set gives {num_subjects * draws} samples an epoch ({num_subjects} subjects x {draws} "
                f"crops), fewer than one batch of {batch_size} on each of {world_size} ranks: use fewer ranks, "
                f"a smaller batch, or more crops per subject."
            )
        self.num_subjects, self.draws, self.batch_size = num_subjects, draws, batch_size
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.epoch = 0
        self.start = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next (Lightning calls it)."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_subjects * self.draws // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[list[Draw]]:
        order = self._order()
        for batch in range(self.start, len(self)):
            begin = (batch * self.world_size + self.rank) * self.batch_size
            places = range(begin, begin + self.batch_size)
            yield [Draw(int(order[place]), self.epoch, place // self.num_subjects) for place in places]

    def _order(self) -> NDArray[np.int64]:
        """Return the subjects of the epoch's passes, 8 bytes a sample."""
        passes = [numpy_generator("order", self.seed, self.epoch, draw).permutation(self.num_subjects)
                  for draw in range(self.draws)]  # fmt: skip
        return np.concatenate(passes)

    def uses(self, index: int, batches: int) -> int:
        """Return how often a subject is drawn, by all ranks, in the first ``batches`` of the epoch."""
        return int((self._order()[: batches * self.batch_size * self.world_size] == index).sum())


class EvaluationBatches(Sampler[list[Draw]]):
    """The same batches every time, dealt to the ranks in turn.

    What a batch holds does not depend on the number of ranks, and no sample is repeated to make ranks equal. Only where
    there would be fewer batches than ranks are the batches smaller: Lightning runs no hook on a rank without any.

    Args:
        num_subjects: Subjects in the set.
        draws: Draws per subject.
        batch_size: Samples per batch, at most.
        rank: This rank.
        world_size: Number of ranks.
        first: Subjects that come before all others.
        brief: Tells, when a pass begins, whether it ends with the batches that hold subjects of ``first`` alone (but
            one batch for every rank).

    Raises:
        DataError: there are samples, but fewer than ranks.
    """

    def __init__(
        self,
        num_subjects: int,
        draws: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        first: Sequence[int] = (),
        brief: Callable[[], bool] = bool,
    ) -> None:
        samples = num_subjects * draws
        if 0 < samples < world_size:
            raise DataError(
                f"The validation or test set gives {samples} samples, fewer than the {world_size} ranks: "
                f"use fewer ranks, or more cases."
            )
        batch_size = max(min(batch_size, samples // world_size), 1)
        others = np.setdiff1d(np.arange(num_subjects), first)
        order = np.concatenate([np.asarray(first, dtype=np.int64), others])
        draws_in_order = [Draw(int(index), 0, draw) for index in order for draw in range(draws)]
        batches = [draws_in_order[i : i + batch_size] for i in range(0, len(draws_in_order), batch_size)]
        self.batches = batches[rank::world_size]
        self._brief, self._brief_length = brief, max(len(first) * draws // (batch_size * world_size), 1)
        #: Batches that every rank has, so that ranks may talk to each other during these.
        self.common_length = len(batches) // world_size
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Draw]]:
        return iter(self.batches[: self._brief_length] if self._brief() else self.batches)


def _start_worker(worker_id: int) -> None:
    """Leave stopping to the main process: workers inherit its signal handlers and must not act on them."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


def _stop_workers(loader: DataLoader) -> None:
    iterator = loader._iterator
    if iterator is not None and hasattr(iterator, "_shutdown_workers"):
        iterator._shutdown_workers()
    loader._iterator = None


def _next(iterator: Iterator[Any]) -> Any:
    """Return the next batch, None at the end.

    Raises:
        UserError: as the data set raised it; one from a worker brings its traceback along as text.
    """
    try:
        return next(iterator, None)
    except UserError as error:
        text = str(error)
        if not text.startswith("Caught "):
            raise
        raise type(error)(text.strip().splitlines()[-1].partition(": ")[2]) from error


class ResumableLoader:
    """A loader that can tell how many batches were consumed, and continue from there.

    Batches that workers have fetched ahead do not count. The position is (epoch, consumed); after loading it, the
    next pass over that epoch begins behind the consumed batches, without reading them.

    Args:
        dataset: Takes :class:`Draw`.
        batches: Which draws make which batch.
        collate: Makes a batch from samples.
        num_workers: Worker processes.
        pin_memory: Whether to pin memory for the transfer to an accelerator.
    """

    def __init__(
        self,
        dataset: Dataset,
        batches: TrainBatches | EvaluationBatches,
        collate: Callable[[list], Any],
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.sampler = self.batch_sampler = batches
        self.dataset = dataset
        self.wait_seconds = 0.0
        self._consumed = 0
        self._resume: tuple[int, int] = (-1, 0)
        self._loader = DataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=num_workers,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
            worker_init_fn=_start_worker,
        )
        # At exit Python terminates daemons by the signal that our workers ignore, and waits for them: stop them first.
        Finalize(self, _stop_workers, (self._loader,), exitpriority=100)

    @property
    def consumed(self) -> int:
        """How many batches of the epoch have been handed out."""
        return self._consumed

    def close(self) -> None:
        """Stop the worker processes; iterating again starts new ones."""
        _stop_workers(self._loader)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        # A generator runs at its first `next`: by then Lightning has told the sampler which epoch it is.
        epoch, consumed = self._resume
        self._resume = (-1, 0)
        self._consumed = self.sampler.start = consumed if epoch == self.sampler.epoch else 0
        iterator = iter(self._loader)
        while True:
            begin = time.perf_counter()
            batch = _next(iterator)
            self.wait_seconds += time.perf_counter() - begin
            if batch is None:
                return
            self._consumed += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the position: epoch and consumed batches."""
        return {"epoch": self.sampler.epoch, "consumed": self._consumed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a position."""
        self._resume = (state["epoch"], state["consumed"])
