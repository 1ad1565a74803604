"""What a training step takes, counted without a step: parameters, operations and kept activations."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from common.errors import UserError
from common.module import SSLModule
from common.types import InputSpec

#: Makes a batch of some size; only shapes matter.
BatchOf = Callable[[int], Mapping[str, Any]]


class StepCost(NamedTuple):
    """What one step takes, per sample where it grows with them.

    Attributes:
        parameters: Trained ones.
        forward: Floating-point operations of a sample's forward pass; two for a multiplication and addition.
        operations: Those of forward and backward pass.
        activations: Bytes that a sample keeps for the backward pass under bfloat16.
    """

    parameters: int
    forward: float
    operations: float
    activations: float


class _Kept:
    """Counts the storages that autograd keeps, each once, without those of parameters."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._known = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
        self._storages: dict[int, Any] = {}  # held, so that no address is used twice

    def pack(self, x: Tensor) -> Tensor:
        """Note a tensor that is kept."""
        storage = x.untyped_storage()
        if storage._cdata not in self._known:
            self._storages[storage._cdata] = storage
        return x

    @property
    def bytes(self) -> int:
        """Sum of their sizes."""
        return sum(storage.nbytes() for storage in self._storages.values())


def step_cost(module: SSLModule, spec: InputSpec, batch_of: BatchOf) -> StepCost:
    """Count one training step of a module that is not built yet, at two batch sizes; no value is computed.

    Args:
        module: The module.
        spec: What its batches hold.
        batch_of: Makes them.

    Raises:
        UserError: the module looks at values, of which there are none.
    """
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            module.build(spec)
            module.train()
            counts = [_counted(module, batch_of(size)) for size in (2, 4)]
    except DataDependentOutputException as error:
        raise UserError(f"A step of {type(module).__name__} cannot be counted without values ({error}).") from error
    forward, operations, kept = ((b - a) / 2 for a, b in zip(*counts, strict=True))
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    return StepCost(trained, forward, operations, kept)


def _counted(module: SSLModule, batch: Any) -> tuple[float, float, float]:
    kept = _Kept(module)
    counter = FlopCounterMode(display=False)
    with counter:
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda x: x), torch.autocast("cpu", torch.bfloat16):
            loss = module.step(batch, sync=False).loss()
        forward = counter.get_total_flops()
        loss.backward()
    module.zero_grad()
    return forward, counter.get_total_flops(), kept.bytes
