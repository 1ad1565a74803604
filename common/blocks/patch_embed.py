"""Patches of images and volumes, embedded by reshape and Linear.

A Linear over flattened patches equals a convolution with kernel = stride = patch, is faster, and lets an encoder drop
patches before it projects them. Its weight is the convolution's, reshaped.

Letters: B batch, C channels, N patches, P voxels per patch, E width. Patches are flattened channel first, then space,
which is the order of a convolution's weight.
"""

import math
from collections.abc import Sequence

from torch import Tensor, nn

#: Added to a patch's variance when it is standardised.
PATCH_EPS = 1e-6


def grid_of(image_size: Sequence[int], patch_size: Sequence[int]) -> tuple[int, ...]:
    """Return the number of patches along each axis.

    Raises:
        ValueError: an axis is not a multiple of its patch.
    """
    if any(size % patch or size < patch for size, patch in zip(image_size, patch_size, strict=True)):
        raise ValueError(f"An image of {tuple(image_size)} cannot be cut into patches of {tuple(patch_size)}.")
    return tuple(size // patch for size, patch in zip(image_size, patch_size, strict=True))


def patch_sides(patch_size: int | Sequence[int], axes: int) -> tuple[int, ...]:
    """Return a patch's side along each of ``axes`` axes, of which one number names all."""
    return (patch_size,) * axes if isinstance(patch_size, int) else tuple(patch_size)


def patchify(image: Tensor, patch_size: Sequence[int]) -> Tensor:
    """Cut ``(B, C, *space)`` into ``(B, N, C P)``, for any number of spatial axes."""
    dims = len(patch_size)
    grid = grid_of(image.shape[2:], patch_size)
    split = [length for pair in zip(grid, patch_size, strict=True) for length in pair]
    x = image.reshape(*image.shape[:2], *split)
    grid_axes, patch_axes = range(2, 2 + 2 * dims, 2), range(3, 3 + 2 * dims, 2)
    return x.permute(0, *grid_axes, 1, *patch_axes).reshape(image.shape[0], math.prod(grid), -1)


def unpatchify(patches: Tensor, grid: Sequence[int], patch_size: Sequence[int]) -> Tensor:
    """Put ``(B, N, C P)`` back together to ``(B, C, *space)``, the inverse of :func:`patchify`."""
    dims = len(patch_size)
    channels = patches.shape[2] // math.prod(patch_size)
    x = patches.reshape(patches.shape[0], *grid, channels, *patch_size)
    pairs = [axis for i in range(dims) for axis in (1 + i, 2 + dims + i)]
    space = [g * p for g, p in zip(grid, patch_size, strict=True)]
    return x.permute(0, 1 + dims, *pairs).reshape(patches.shape[0], channels, *space)


def patchify_channels_last(image: Tensor, patch_size: Sequence[int]) -> Tensor:
    """Cut ``(B, C, *space)`` into ``(B, N, P C)``; inside a patch by space, then channel, as MAE's targets are."""
    channels = image.shape[1]
    return patchify(image, patch_size).unflatten(2, (channels, -1)).transpose(2, 3).flatten(2)


def normalise_patches(patches: Tensor) -> Tensor:
    """Standardise each patch ``(..., P)`` by its own mean and unbiased variance; a constant one becomes 0."""
    mean, variance = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
    return (patches - mean) / (variance + PATCH_EPS).sqrt()


def linear_to_conv(weight: Tensor, in_channels: int, patch_size: Sequence[int]) -> Tensor:
    """Reshape a patch embedding's Linear weight ``(E, C P)`` to the convolution's ``(E, C, *patch_size)``."""
    return weight.reshape(weight.shape[0], in_channels, *patch_size)


def conv_to_linear(weight: Tensor) -> Tensor:
    """Reshape a convolution's weight ``(E, C, *patch_size)`` to the Linear's ``(E, C P)``."""
    return weight.flatten(1)


class PatchEmbed(nn.Module):
    """Embed patches of an image or a volume.

    Args:
        in_channels: C.
        image_size: Size along each spatial axis; two axes for images, three for volumes.
        patch_size: One size for all axes, or one per axis.
        embed_dim: E.

    Raises:
        ValueError: the image is not a multiple of the patch.
    """

    def __init__(
        self, in_channels: int, image_size: Sequence[int], patch_size: int | Sequence[int], embed_dim: int
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.image_size = tuple(image_size)
        self.patch_size = patch_sides(patch_size, len(self.image_size))
        self.grid_size = grid_of(self.image_size, self.patch_size)
        self.num_patches = math.prod(self.grid_size)
        self.proj = nn.Linear(in_channels * math.prod(self.patch_size), embed_dim)

    def patchify(self, image: Tensor) -> Tensor:
        """Cut ``(B, C, *space)`` into ``(B, N, C P)``.

        Raises:
            ValueError: the image is of another shape than this embedding was made for.
        """
        if tuple(image.shape[1:]) != (self.in_channels, *self.image_size):
            raise ValueError(
                f"Expected an input of {(self.in_channels, *self.image_size)} (channels, space) per sample, "
                f"got {tuple(image.shape[1:])}."
            )
        return patchify(image, self.patch_size)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """Put ``(B, N, C P)`` back together to ``(B, C, *space)``."""
        return unpatchify(patches, self.grid_size, self.patch_size)

    def forward(self, patches: Tensor) -> Tensor:
        """Project ``(B, N, C P)`` or any subset of patches to ``(B, N, E)``."""
        return self.proj(patches)
