"""A depth-wise 3D convolution that is as fast backwards as forwards on a CPU.

Letters: B batch, C channels, H W D space, K side of the kernel.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Depthwise(torch.autograd.Function):
    """The convolution in float32, its gradients by the fast kernels.

    oneDNN has no fast kernel for the gradient of a depth-wise 3D convolution's input, and none at all in bfloat16. That
    gradient is itself a depth-wise convolution, with the kernel turned around.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv3d(x, weight, bias, padding=weight.shape[2] // 2, groups=len(weight))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        (gradient,) = gradients
        padding, channels = weight.shape[2] // 2, len(weight)
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = F.conv3d(gradient, weight.flip(2, 3, 4), padding=padding, groups=channels)
        if ctx.needs_input_grad[1]:
            of_weight = torch.ops.aten.convolution_backward(
                gradient, x, weight, [channels], [1] * 3, [padding] * 3, [1] * 3, False, [0] * 3, channels,
                [False, True, False],
            )[1]  # fmt: skip
        if ctx.needs_input_grad[2]:
            of_bias = gradient.sum((0, 2, 3, 4))
        return of_x, of_weight, of_bias


class DepthwiseConv3d(nn.Conv3d):
    """``nn.Conv3d`` of one group per channel and an odd kernel that keeps the size.

    On a CPU it trains in float32 also under mixed precision, with a backward pass of its own; elsewhere, and where no
    gradient is wanted, it is the plain convolution.

    Args:
        dim: C.
        kernel_size: K, odd.
    """

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve ``(B, C, H, W, D)``."""
        if input.device.type != "cpu" or not torch.is_grad_enabled():
            return super().forward(input)
        with torch.autocast("cpu", enabled=False):
            result: Tensor = _Depthwise.apply(input.to(self.weight.dtype), self.weight, self.bias)
        return result.to(input.dtype)
