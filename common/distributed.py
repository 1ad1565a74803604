"""Ranks: gradient-carrying collectives, agreement between hosts, and a pool of ranks for tests.

The convention for gradients: a loss that looks across samples is summed over ranks with :func:`all_reduce_sum`, every
rank then holds the loss of the joined batch, and the mean over ranks of the parameter gradients, which DDP takes, is
the gradient one rank would have had. On one rank everything here is the identity.
"""

import os
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor


def world_size() -> int:
    """Return the number of ranks; 1 outside a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return this process's rank; 0 outside a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def launched_rank() -> int:
    """Return the rank this process was launched as, known before there is a process group."""
    from lightning.pytorch.utilities import rank_zero_only  # reads it off the environment; encoders load without it

    return int(getattr(rank_zero_only, "rank", 0))


class Traffic:
    """Counts what the collectives of this module receive while its block runs: payload, not bytes on the wire.

    The payload of an all-reduce or a reduce-scatter is the buffer that goes in (an all-reduce sends about twice that),
    of any other collective what comes out.

    Attributes:
        calls: Calls by kind.
        bytes: Payload by kind.
    """

    _open: ClassVar[list["Traffic"]] = []

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __enter__(self) -> "Traffic":
        self._open.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.remove(self)

    @property
    def total(self) -> int:
        """Payload of all kinds."""
        return sum(self.bytes.values())

    @classmethod
    def note(cls, kind: str, payload: Tensor) -> None:
        """Count one collective."""
        for counter in cls._open:
            counter.calls[kind] += 1
            counter.bytes[kind] += payload.numel() * payload.element_size()


def _all_reduce(x: Tensor, **options: Any) -> None:
    Traffic.note("all_reduce", x)
    dist.all_reduce(x, **options)


def _all_gather(x: Tensor, group: Any = None) -> Tensor:
    """Return the equally shaped tensors of all ranks, joined along the first axis."""
    x = x.contiguous()
    result = x.new_empty((world_size() * len(x), *x.shape[1:]))
    Traffic.note("all_gather", result)
    dist.all_gather_into_tensor(result, x, group=group)
    return result


def _all_to_all(x: Tensor, receive: Sequence[int], send: Sequence[int]) -> Tensor:
    """Send the first ``send[0]`` rows to rank 0, the next ``send[1]`` to rank 1, ...; return what others sent."""
    result = x.new_empty((sum(receive), *x.shape[1:]))
    Traffic.note("all_to_all", result)
    dist.all_to_all_single(result, x.contiguous(), list(receive), list(send))
    return result


class _AllReduceSum(torch.autograd.Function):
    """Sum over ranks, forwards and backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        result = x.detach().clone(memory_format=torch.contiguous_format)
        _all_reduce(result)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _AllReduceSum.apply(gradient)


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum a tensor over ranks; the gradient is summed over ranks too."""
    return x if world_size() == 1 else _AllReduceSum.apply(x)


def all_reduce_together(*tensors: Tensor) -> list[Tensor]:
    """Sum tensors of one type over ranks as :func:`all_reduce_sum` does, in one exchange."""
    flat = all_reduce_sum(torch.cat([x.reshape(-1) for x in tensors]))
    parts = flat.split([x.numel() for x in tensors])
    return [part.view(x.shape) for part, x in zip(parts, tensors, strict=True)]


class _AllGather(torch.autograd.Function):
    """Rows of all ranks; the gradient of a rank's own rows is summed over ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _all_gather(x.detach())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _ReduceScatter.apply(gradient)


class _ReduceScatter(torch.autograd.Function):
    """A rank's own rows of the sum over ranks; the transpose of gathering."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.detach().contiguous()
        result = x.new_empty((len(x) // world_size(), *x.shape[1:]))
        Traffic.note("reduce_scatter", x)
        dist.reduce_scatter_tensor(result, x)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _AllGather.apply(gradient)


def all_gather_cat(x: Tensor, dim: int = 0) -> Tensor:
    """Concatenate the equally shaped tensors of all ranks along ``dim``; the gradient is summed over ranks."""
    if world_size() == 1:
        return x
    return _AllGather.apply(x) if dim == 0 else _AllGather.apply(x.movedim(dim, 0)).movedim(0, dim)


class _Transpose(torch.autograd.Function):
    """Turn rows ``(W b, D)``, in W blocks of columns, between ranks: blocks that rank r holds go to rank r.

    Applied twice it is the identity, so its backward pass is itself.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        equal = [len(x) // world_size()] * world_size()
        return _all_to_all(x.detach(), equal, equal)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Transpose.apply(gradient)


def feature_shard(x: Tensor) -> Tensor:
    """Exchange rows ``(b, D)`` of every rank for all rows at this rank's share of the features, ``(B, D / W)``.

    Features are filled up with zeros to a multiple of the ranks. The gradient of a value comes from the rank that holds
    it, so losses of shards must be summed over ranks.
    """
    world, rows = world_size(), len(x)
    if world == 1:
        return x
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % world))
    blocks = padded.view(rows, world, -1).transpose(0, 1).reshape(world * rows, -1)
    return _Transpose.apply(blocks)


def all_gather_rows(x: Tensor, group: Any = None) -> Tensor:
    """Concatenate the equally shaped tensors of all ranks along the first axis, in rank order; without a gradient.

    Args:
        x: The tensor.
        group: Who exchanges; None: all ranks, on their devices.
    """
    return x.detach() if world_size() == 1 else _all_gather(x.detach(), group)


def exchange_rows(x: Tensor, send: Sequence[Sequence[int]], receive: Sequence[int]) -> Tensor:
    """Send each rank the rows that it is to have, and return what the others sent, in rank order; without a gradient.

    Args:
        x: ``(b, ...)``, this rank's rows.
        send: The rows for each rank.
        receive: How many rows each rank sends here.
    """
    index = torch.tensor([row for rows in send for row in rows], dtype=torch.int64, device=x.device)
    return _all_to_all(x.detach().index_select(0, index), receive, [len(rows) for rows in send])


_control: dict[Any, Any] = {}


def control_group() -> Any:
    """Return a CPU group for messages between hosts, so that agreeing never waits for the accelerator.

    It is made at the first call, which all ranks must reach together.
    """
    default = dist.group.WORLD
    if default not in _control:
        _control.clear()
        _control[default] = default if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
    return _control[default]


def highest(value: int) -> int:
    """Return the highest of all ranks' values."""
    if world_size() == 1:
        return value
    tensor = torch.tensor(value)
    _all_reduce(tensor, op=dist.ReduceOp.MAX, group=control_group())
    return int(tensor.item())


def agree(flag: bool) -> bool:
    """Return whether any rank raised its flag."""
    return bool(highest(int(flag)))


def gather_objects(value: Any) -> list[Any]:
    """Return the values of all ranks, in rank order, on every rank. For small records at epoch ends."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=control_group())
    return values


def broadcast_object(value: Any) -> Any:
    """Return rank 0's value on every rank, over the CPU."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=control_group())
    return box[0]


def reduce_sums(sums: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Merge ``name -> (weighted sum, weight)`` over ranks and divide: never a mean of means.

    Ranks may hold different names, or none: a rank without a validation sample adds nothing.
    """
    merged: dict[str, tuple[float, float]] = {}
    for part in gather_objects(dict(sums)):
        for name, (total, weight) in part.items():
            old_total, old_weight = merged.get(name, (0.0, 0.0))
            merged[name] = (old_total + total, old_weight + weight)
    return {name: total / weight for name, (total, weight) in merged.items() if weight > 0}


def loss_and_gradient(
    loss: Callable[..., Tensor],
    tensors: Mapping[str, Tensor],
    projected: Collection[str],
    weight: Tensor,
    **settings: Any,
) -> tuple[Tensor, Tensor]:
    """Run a loss and its backward pass on this rank's part of a batch: what a two-rank test compares.

    A linear layer takes the place of the network.

    Args:
        loss: Called with the tensors and settings by name; returns a scalar.
        tensors: This rank's samples.
        projected: Which of them pass through the layer first, along their last axis.
        weight: The layer, ``(D, D)``; equal on every rank.
        **settings: Further arguments of the loss.

    Returns:
        The loss, and the gradient of the layer, averaged over ranks as DDP does.
    """
    leaf = weight.detach().clone().requires_grad_()
    inputs = {name: tensor @ leaf if name in projected else tensor for name, tensor in tensors.items()}
    value = loss(**inputs, **settings)
    value.backward()
    assert leaf.grad is not None
    return value.detach(), all_reduce_sum(leaf.grad) / world_size()


def _serve_rank(rank_: int, world: int, store: str, inbox: Any, outbox: Any) -> None:
    """Run the jobs of one rank until told to stop."""
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME=os.environ.get("GLOO_SOCKET_IFNAME", "lo"))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank_, world_size=world)
    while (job := inbox.get()) is not None:
        function, args = job
        try:
            outbox.put((rank_, True, function(*args)))
        except Exception as error:
            outbox.put((rank_, False, f"{type(error).__name__}: {error}"))
    dist.destroy_process_group()


class RankPool:
    """Processes joined by gloo on this machine, kept for many jobs because each takes seconds to start.

    Functions and arguments are pickled, so functions must live in an importable module. If one rank fails where others
    wait for it, the pool is of no further use.

    Args:
        world_size: Number of ranks.
    """

    def __init__(self, world_size: int = 2) -> None:
        context = mp.get_context("spawn")
        self.world_size = world_size
        self._folder = tempfile.TemporaryDirectory()
        self._outbox = context.Queue()
        self._inboxes = [context.Queue() for _ in range(world_size)]
        store = os.path.join(self._folder.name, "store")
        self._processes = [
            context.Process(target=_serve_rank, args=(i, world_size, store, inbox, self._outbox), daemon=True)
            for i, inbox in enumerate(self._inboxes)
        ]
        for process in self._processes:
            process.start()

    def run(self, function: Callable[..., Any], args_per_rank: Sequence[Sequence[Any]], timeout: float = 120) -> list:
        """Call ``function`` with its own arguments on every rank and return the results in rank order.

        Raises:
            RuntimeError: the function failed on a rank; names rank and error.
        """
        for inbox, args in zip(self._inboxes, args_per_rank, strict=True):
            inbox.put((function, tuple(args)))
        results: dict[int, Any] = {}
        for _ in self._inboxes:
            index, succeeded, value = self._outbox.get(timeout=timeout)
            if not succeeded:
                raise RuntimeError(f"{function.__qualname__} failed on rank {index}: {value}")
            results[index] = value
        return [results[i] for i in range(self.world_size)]

    def close(self) -> None:
        """Stop the processes."""
        for inbox in self._inboxes:
            inbox.put(None)
        for process in self._processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
        self._folder.cleanup()


def run_ranks(function: Callable[..., Any], args_per_rank: Sequence[Sequence[Any]]) -> list:
    """Run ``function`` once on as many ranks as there are argument lists; see :class:`RankPool`."""
    pool = RankPool(len(args_per_rank))
    try:
        return pool.run(function, args_per_rank)
    finally:
        pool.close()
