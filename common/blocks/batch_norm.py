"""Batch normalisation over the samples of all ranks, on any device."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.distributed import all_reduce_sum, world_size
from common.runtime.precision import at_least_float32


class _GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Training statistics of all ranks' samples together, with their gradient.

    ``nn.SyncBatchNorm`` does the same on GPUs alone. On one rank this is torch's own. Ranks may hold different numbers
    of samples. A forward pass that is repeated inside the backward pass (activation checkpointing) leaves the running
    statistics alone, so that they count every step once.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``(B, C, ...)`` per channel."""
        if not self.training:
            return super().forward(input)
        repeated = torch._C._current_graph_task_id() != -1
        if world_size() == 1:
            if not repeated:
                return super().forward(input)
            # Copies, so that the repeated pass keeps for its backward what the first one kept.
            assert self.running_mean is not None
            assert self.running_var is not None
            statistics = self.running_mean.clone(), self.running_var.clone()
            return F.batch_norm(input, *statistics, self.weight, self.bias, True, 0.0, self.eps)
        return self._over_ranks(input, repeated)

    def _over_ranks(self, input: Tensor, repeated: bool) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            x = at_least_float32(input)
            axes = [axis for axis in range(x.ndim) if axis != 1]
            shape = [1, -1] + [1] * (x.ndim - 2)
            count = torch.full((1,), float(x.numel() // x.shape[1]), dtype=x.dtype, device=x.device)
            sums = all_reduce_sum(torch.cat([x.sum(axes), count]))
            total, mean = sums[-1], sums[:-1] / sums[-1]
            centred = x - mean.view(shape)
            # A second sum instead of the mean of squares: no difference of large numbers.
            var = all_reduce_sum(centred.square().sum(axes)) / total
            if not repeated and self.running_mean is not None and self.running_var is not None:
                with torch.no_grad():
                    factor = self.momentum or 0.0
                    self.running_mean.lerp_(mean.to(self.running_mean), factor)
                    self.running_var.lerp_((var * total / (total - 1)).to(self.running_var), factor)
                    if self.num_batches_tracked is not None:
                        self.num_batches_tracked.add_(1)
            result = centred * (var + self.eps).rsqrt().view(shape)
            if self.affine:
                result = result * self.weight.view(shape) + self.bias.view(shape)
            return result.to(input.dtype)


class GlobalBatchNorm1d(_GlobalBatchNorm, nn.BatchNorm1d):
    """``nn.BatchNorm1d`` over the samples of all ranks, of ``(B, C)`` or ``(B, C, L)``."""


class GlobalBatchNorm3d(_GlobalBatchNorm, nn.BatchNorm3d):
    """``nn.BatchNorm3d`` over the samples of all ranks, of ``(B, C, H, W, D)``."""
